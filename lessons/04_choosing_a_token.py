# %% [markdown]
# # Lesson 4. Choosing a token
#
# > **The one idea.** Sampling is a pure function of logits, parameters, seed and position. No generator, no state: the
# > same request gets the same tokens alone, in a batch, and after it was interrupted.
#
# The lessons so far took the likeliest token. This lesson draws one, so that an answer may differ each time, and can
# still be repeated.

# %%
from dataclasses import replace

import torch
from torch import Tensor

from minivllm import sampler, viz
from minivllm.coursework import (
    course_workload,
    embedded_model,
    embedded_tokenizer,
    next_token_logits,
    run_engine,
)
from minivllm.viz import show

# %% [markdown]
# ## What the model says
#
# The model gives a number for each of its 4,096 tokens. Softmax makes probabilities of them. These are the likeliest
# ones after a few words.

# %%
model, tokenizer = embedded_model(), embedded_tokenizer()
logits = next_token_logits(model, tokenizer.encode("Once upon a time there was a"))  # (1, V)
likeliest = logits[0].topk(8).indices.tolist()


def chart(logits: Tensor, title: str) -> viz.Svg:
    percent = 100 * logits[0].softmax(-1)
    return viz.bars(
        [(repr(tokenizer.decode([token])), float(percent[token])) for token in likeliest], title, "%"
    )


chart(logits, "after 'Once upon a time there was a': probabilities")

# %% [markdown]
# ## What hurts
#
# The usual way to draw is a generator with a state. Every draw changes the state, so what a request gets depends on who
# was served before it.

# %%
batch = logits.repeat(4, 1).softmax(-1)
alone = torch.multinomial(batch[:1], 1, generator=torch.Generator().manual_seed(0))
third = torch.multinomial(batch, 1, generator=torch.Generator().manual_seed(0))[2]
print(f"alone: {tokenizer.decode(alone[0])!r}, as the third of four: {tokenizer.decode(third)!r}")
assert alone.item() != third.item(), "the same request, the same seed, another token"

# %% [markdown]
# ## How bold
#
# Three parameters shape the probabilities before the draw. Temperature divides the logits: below 1 it favors the likely
# tokens, above 1 it levels them. `top_k` keeps the k likeliest tokens. `top_p` keeps the likeliest until their
# probabilities sum to p.
#
# To write them before you read them: `python -m minivllm.learn start 4a` now, then 4b, and come back.

# %%
show(sampler.top_k)

# %%
show(sampler.top_p)

# %%
chart(sampler.apply_temperature(logits, torch.tensor([0.2])), "temperature 0.2")

# %%
chart(sampler.top_k(logits, torch.tensor([3])), "top_k 3")

# %%
chart(sampler.top_p(logits, torch.tensor([0.5])), "top_p 0.5")

# %% [markdown]
# ## The draw
#
# Chance is a hash here. Seed, position and token id go in, and a number comes out that looks random and is always the
# same. Among tokens that race, the best sum of logit and noise wins, and each wins as often as its probability says.

# %%
show(sampler.race)

# %% [markdown]
# A hash and two logarithms for each of 150,000 tokens would take longer than anything else in the choice. So parts of
# the vocabulary race first, each for the sum of its tokens' probabilities, and then the tokens of the part that won.

# %%
show(sampler.draw)

# %%
seeds, position = torch.arange(2000), torch.full((2000,), 7)
drawn = sampler.draw(logits.expand(2000, -1), sampler.seed_keys(seeds), position).bincount(minlength=4096) / 2000
furthest = (drawn - logits[0].softmax(-1)).abs().max()
print(
    f"2,000 seeds: no token is drawn more than {100 * float(furthest):.1f} percent points more or less often than it should"
)
assert furthest < 0.03

# %% [markdown]
# ## The number
#
# The course's 64 requests run at temperature 1, each with a seed of its own: all together, in so little memory that
# some are interrupted and computed again (lesson 9), and the first six one at a time.

# %%
args = {"block_size": 16, "max_model_len": 512, "dtype": "float64"}
workload = replace(course_workload(), temperature=1.0)
together = run_engine(workload, num_blocks=601, max_num_seqs=64, **args)
scarce = run_engine(workload, num_blocks=129, max_num_seqs=64, max_num_batched_tokens=256, **args)
first_6 = replace(course_workload(6), temperature=1.0)
one_by_one = run_engine(first_6, num_blocks=601, max_num_seqs=1, **args)


# %%
def num_different(left: list[list[int]], right: list[list[int]]) -> int:
    return sum(x != y for one, other in zip(left, right) for x, y in zip(one, other, strict=True))


interrupted = num_different(together.token_ids, scarce.token_ids)
separate = num_different(together.token_ids, one_by_one.token_ids)
print(
    f"{scarce.stats.num_preemptions} interruptions: {interrupted} of {workload.num_output_tokens:,} tokens differ"
)
print(f"one at a time: {separate} of {first_6.num_output_tokens:,} tokens differ")

# %%
assert (interrupted, workload.num_output_tokens) == (0, 3334), (
    "tokens that differ after an interruption"
)
assert (separate, scarce.stats.num_preemptions) == (0, 23), "tokens that differ when served alone"

# %% [markdown]
# **0 of 3,334 tokens differ.** A seed is a promise about the answer, whoever else is served.
#
# ## What it costs
#
# A hash for each token of the vocabulary, for each request, in each step. And the promise is only as exact as the
# logits: a batch may round them differently. In float64, as here, that does not show. In bfloat16 it does, in every
# engine.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 4a     # top_k
# python -m minivllm.learn start 4b     # top_p
# python -m minivllm.learn start 4c     # penalties
# ```
#
# About 45 minutes for the three. The token that crosses p stays, and tokens that tie stay together: the tests know
# both.
#
# ## Questions
#
# 1. Why does the hash take the position? What would the answer look like without it?
# 2. Temperature 0 is the likeliest token. Which division does that case have to avoid?
# 3. `top_k` before `top_p`, or the other way around: when do the results differ?
#
# ## In vLLM
#
# `vllm/v1/sample/sampler.py` and `vllm/v1/sample/ops/topk_topp_sampler.py`. A request with a seed has a
# `torch.Generator` of its own there, and its state moves with each draw.
