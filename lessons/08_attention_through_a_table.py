# %% [markdown]
# # Lesson 8. Attention through a table
#
# > **The one idea.** Logical order lives in a table and not in memory. Position p of a request lies in block `table[p
# > // 16]`, at offset `p % 16`, and attention looks there.
#
# Lesson 7 scattered a request's blocks over the pool. Attention still wants keys and values in the order of the text.
# This lesson puts a table between the two.

# %%
import torch

from minivllm import viz
from minivllm.attention import AttentionMetadata, context_slots, gather_kv, slot_mapping
from minivllm.coursework import (
    counting_model,
    course_workload,
    embedded_model,
    embedded_tokenizer,
    run_engine,
)
from minivllm.generate import GenerationStats, greedy_cached, greedy_paged, paged_caches
from minivllm.slot_batching import greedy_continuous
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# There are two ways without a table. Rows as long as the longest request waste memory (lesson 7 counted 381 slots for
# each). A batch kept tight has to be copied together again whenever a request joins or leaves. Lesson 6's loop counts
# what that copies.

# %%
workload, tiny = course_workload(), counting_model()
prompts = [request.prompt_token_ids for request in workload.requests]
limits = [request.max_tokens for request in workload.requests]
dense, paged = GenerationStats(), GenerationStats()
expected = greedy_continuous(tiny, prompts, limits, stats=dense, num_rows=8)
print(
    f"{dense.useful_positions:,} tokens to keep, {dense.kv_slots_repacked:,} slots copied to keep the batch tight"
)

# %% [markdown]
# ## A table from a real run
#
# The engine answers the first 12 requests in a pool of 32 blocks. After step 60 request 7 owns these blocks. Above is
# the order of its text, below is memory.

# %%
run = run_engine(
    course_workload(12), num_blocks=33, block_size=16, max_model_len=512, enable_prefix_caching=False
)
request = run.states[60].requests["7"]
print("block table:", request["blocks"])
viz.table(
    request["blocks"],
    request["num_computed_tokens"],
    16,
    33,
    "request 7 after step 60: its blocks in memory",
)

# %% [markdown]
# ## The code
#
# Writing needs one number for each new token: its slot. That is the whole arithmetic of paging.
#
# To write them before you read them: `python -m minivllm.learn start 8a` now, then 8b, and come back.

# %%
show(slot_mapping)

# %% [markdown]
# Reading needs the slots of all tokens so far, in logical order, and one gather.

# %%
show(context_slots)

# %%
show(gather_kv)

# %%
table, positions = torch.tensor([request["blocks"]]), torch.tensor([0, 15, 16, 40])
slots = slot_mapping(table, torch.zeros(4, dtype=torch.long), positions, 16)
for position, slot in zip(positions.tolist(), slots.tolist()):
    print(f"position {position:2}: block {slot // 16:2}, offset {slot % 16:2}, slot {slot}")

# %% [markdown]
# ## Shuffle every block
#
# If order lives in the table, then the blocks may lie anywhere. The same five prompts run over five random orders of
# the blocks, beside the dense cache of lesson 2.

# %%
model, tokenizer = embedded_model(), embedded_tokenizer()
texts = [
    tokenizer.encode(text)
    for text in ("The block pool", "A request", "Once upon a time", "What is", "A")
]
one_by_one = [greedy_cached(model, ids, 24) for ids in texts]
for seed in range(5):
    assert greedy_paged(model, texts, 24, block_size=4, seed=seed) == one_by_one, (
        "the order of blocks changes no token"
    )
print("equal:", tokenizer.decode(texts[0] + one_by_one[0]))

# %% [markdown]
# Equal tokens could hide small differences. So here are the logits of one prompt of 40 tokens, in 10 blocks of 4, for
# two orders.


# %%
@torch.inference_mode()
def logits(block_table):
    ids, caches = torch.arange(300, 340), paged_caches(model, 11, 4)
    metadata = AttentionMetadata.build([40], [40], [block_table], 4)
    return model.compute_logits(model(ids, torch.arange(40), caches, metadata))


in_order, shuffled = list(range(1, 11)), [7, 2, 9, 4, 1, 10, 3, 8, 6, 5]
num_different = int((logits(in_order) != logits(shuffled)).sum())
print(f"{num_different} of {40 * 4096:,} logits differ")

# %% [markdown]
# ## The number

# %%
assert greedy_paged(tiny, prompts, limits, stats=paged) == expected, (
    "paged and dense give the same tokens"
)
viz.bars(
    [
        ("dense and tight: slots copied", dense.kv_slots_repacked),
        ("paged: slots written", paged.kv_slots_written),
    ],
    "64 requests: keys and values that move",
    "slots",
)

# %%
assert num_different == 0, "logits that change when the blocks are shuffled"
assert (dense.kv_slots_repacked, paged.kv_slots_written) == (121_147, 8036)
assert round(dense.kv_slots_repacked / paged.kv_slots_written) == 15

# %% [markdown]
# **Shuffled blocks change 0 of 163,840 logits.** Each key and value is written once, to 8,036 slots. Keeping a dense
# batch tight would have copied 121,147 slots on top, 15 times as many.
#
# ## What it costs
#
# The gather above is a copy of each context, in every layer and every step. It is the readable form of the idea. A
# kernel that reads through the table copies nothing: on a GPU FlexAttention does that (`flex_attention.py`), and on a
# CPU the engine keeps gathered contexts from step to step (`standing_attention.py`). Both give what this one gives; the
# tests compare them.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 8a     # slot_mapping
# python -m minivllm.learn start 8b     # context_slots and gather_kv
# ```
#
# About 30 minutes for both. The tests fill every slot that nobody wrote with NaN: one wrong slot shows at once.
#
# ## Questions
#
# 1. A padded token has position -1. Why does it get a slot of the null block, and not slot -1?
# 2. Two requests have the same first 32 tokens. What would it take to let them share two blocks? (Lesson 11.)
# 3. The slot is computed in 64-bit integers. From how many blocks on would 32 bits be too few?
#
# ## In vLLM
#
# `vllm/v1/worker/block_table.py` keeps the tables and computes `slot_mapping`. The attention backends in
# `vllm/v1/attention/backends/` hand the table to their kernels.
