# %% [markdown]
# # Lesson 1. The model in one sitting
#
# > **The one idea.** Qwen2 is four small functions: a norm, attention over rotated queries and keys, a gated MLP, and a
# > loop over layers. Every number that they give can be checked against Hugging Face.
#
# Lesson 0 called the model a function from tokens to a next token. This lesson opens it. `minivllm/model.py` is the
# whole model in 256 lines; here are its parts.

# %%
from unittest.mock import patch

import torch
from transformers.utils import logging

from minivllm import cost, model, viz
from minivllm.bench.shapes import SHAPES
from minivllm.compare import compare
from minivllm.config import ModelConfig
from minivllm.coursework import embedded_model, embedded_tokenizer, shapes_of
from minivllm.viz import show
from minivllm.weights import resolve_model

logging.disable_progress_bar()

# %% [markdown]
# ## The way of five tokens
#
# The letters are the same in the whole course: T tokens in the step, E numbers in a token's vector, H query heads, K
# key and value heads, D numbers in a head, V tokens in the vocabulary. The shapes below were recorded while five tokens
# went through.

# %%
ours, tokenizer = embedded_model(), embedded_tokenizer()
ids = tokenizer.encode("A token's keys and values")[:5]
for name, shape in shapes_of(ours, ids):
    print(f"{name:42} {shape}")

# %% [markdown]
# One layer is printed; all six are alike. A layer adds twice to the vectors that flow through: once what a token saw
# when it looked at the others, once what it made of that by itself.
#
# To write them before you read them: `python -m minivllm.learn start 1a` now, then 1b and 1c, and come back.

# %%
show(model.DecoderLayer)

# %% [markdown]
# ## Attention
#
# A query is compared with the keys of all tokens that it may look at. The softmax of the scores says how much of each
# token's value it gets. Tokens have no order here: the sum would be the same for shuffled keys.

# %%
show(model.attention)

# %% [markdown]
# ## Position
#
# Order comes from a rotation. Each pair of numbers of a query or key is a point in a plane, and it is turned by an
# angle that grows with the position. A product of a query and a key then depends on their distance only.

# %%
show(model.rope)

# %%
frequencies, _ = model.rope_frequencies(ours.config)
distances = range(65)
curves = {
    f"pair {pair}": [(d, 1 + float(torch.cos(d * frequencies[pair]))) for d in distances]
    for pair in (0, 4, 8)
}
viz.line(
    curves,
    "distance of query and key in tokens",
    "1 + cos of the angle between them",
    "The first pairs tell neighbors apart, the later ones turn slowly",
)

# %% [markdown]
# The product of a rotated query and a rotated key is the same at positions 3 and 10 as at 503 and 510.

# %%
torch.manual_seed(0)
q, k = torch.randn(2, 1, 1, ours.config.head_dim, dtype=torch.float64)
rotary = model.RotaryEmbedding(ours.config, "cpu")


def product(query_position, key_position):
    positions = torch.tensor([query_position, key_position])
    cos, sin = (table[:, None] for table in rotary(positions, torch.float64))
    return float((model.rope(q, cos[0], sin[0]) * model.rope(k, cos[1], sin[1])).sum())


assert abs(product(10, 3) - product(510, 503)) < 1e-3 < abs(product(10, 3) - product(10, 4))

# %% [markdown]
# ## The same numbers as Hugging Face
#
# `minivllm.compare` runs the same ids through transformers' Qwen2 and compares what every module gives, in float64,
# where rounding hides nothing.

# %%
checked = compare(resolve_model(), torch.tensor(ids))
print(f"{len(checked.errors)} modules compared; first difference: {checked.first_difference}")
assert checked.first_difference is None

# %% [markdown]
# A comparison that cannot fail proves nothing. Without the rotation the text would still look like text for a while.
# The comparison names the place at once.

# %%
with patch.object(model, "rope", lambda x, cos, sin: x):
    broken = compare(resolve_model(), torch.tensor(ids))
print(f"first difference: {broken.first_difference.name}")
assert "layers.0.self_attn" in broken.first_difference.name

# %% [markdown]
# ## The number
#
# Qwen2 shares key and value heads: in Qwen2.5-0.5B seven query heads read the same keys and values. Queries live for
# one pass. Keys and values will be kept from lesson 2 on, so their size decides how many requests fit into memory.

# %%
qwen = ModelConfig.from_dict(SHAPES["qwen2.5-0.5b"])
shared = cost.kv_bytes_per_token(qwen)
alone = shared * qwen.num_attention_heads // qwen.num_key_value_heads
viz.bars(
    [("14 KV heads: one for each query head", alone), ("2 KV heads, as in Qwen2.5-0.5B", shared)],
    "Keys and values of one token in all 24 layers, bfloat16",
    "bytes",
)

# %%
assert (shared, alone) == (12_288, 86_016) and alone == 7 * shared, "bytes a token"
assert cost.num_parameters(ours.config) == sum(p.numel() for p in ours.parameters()) == 5_576_192

# %% [markdown]
# **12,288 bytes a token instead of 86,016: seven times as many tokens in the same memory.**
#
# ## What it costs
#
# The grouping is a choice of those who trained the model, and it cannot be changed afterwards. It gives up some
# freedom: heads that share keys can differ only in what they ask.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 1a     # rotate_half and rope
# python -m minivllm.learn start 1b     # attention
# python -m minivllm.learn start 1c     # norm, MLP and the two additions
# ```
#
# About 60 minutes for the three. `python -m minivllm.compare` on your own version names the first module that differs.
#
# ## Questions
#
# 1. Why are keys rotated and values not?
# 2. The scores are divided by the square root of D. What would softmax give for large D without that?
# 3. The mask puts the lowest number into a score and not minus infinity. Which rows would be a problem?
#
# ## In vLLM
#
# `vllm/model_executor/models/qwen2.py`: the same classes with fused norms (`RMSNorm` takes the residual as a second
# argument), layers split over GPUs (`QKVParallelLinear`), and attention behind one class for all backends.
