# %% [markdown]
# # Lesson 2. Remember keys and values
#
# > **The one idea.** The past does not change. A token's keys and values depend on the tokens before it and on nothing
# > after it, so they are computed once and kept.
#
# Lesson 0 counted 6,112 positions for 64 new tokens, of which 5,985 were computed before. This lesson keeps them.

# %%
from minivllm import cost, viz
from minivllm.coursework import (
    counting_model,
    course_workload,
    embedded_model,
    embedded_tokenizer,
    watch,
)
from minivllm.dense_cache import DenseCache, causal_mask
from minivllm.generate import GenerationStats, dense_caches, greedy, greedy_cached
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# This is the triangle of lesson 0, with a prompt of this lesson. Blue boxes are positions that are new. A pass needs
# the orange ones for one thing only: attention looks at their keys and values.

# %%
model, tokenizer = embedded_model(), embedded_tokenizer()
prompt = tokenizer.encode("A KV cache keeps")
with watch(model) as passes:
    recomputed = greedy(model, prompt, max_new_tokens=10)
viz.triangle(passes, "recompute: the positions of each pass")

# %% [markdown]
# ## The code
#
# The cache of one layer is two tensors with a row for each request. New keys and values go to their columns.
#
# To write them before you read them: `python -m minivllm.learn start 2a` now, then 2b and 2c, and come back.

# %%
show(DenseCache.append)

# %% [markdown]
# A pass now brings fewer queries than there are keys. Query 0 of the pass may be token 70 of its sequence, so the mask
# compares columns of the cache and not row numbers of the pass. A mask that starts at 0 again is the most common
# mistake here.

# %%
show(causal_mask)

# %% [markdown]
# The loop is that of lesson 0, except that a pass starts where the last one ended.

# %%
show(greedy_cached)

# %% [markdown]
# ## The same prompt again
#
# The first pass computes the prompt. Every later pass computes one position. The tokens are the same.

# %%
with watch(model) as passes:
    cached = greedy_cached(model, prompt, max_new_tokens=10)
assert cached == recomputed, "a cache changes no token"
print(tokenizer.decode(prompt + cached))
viz.triangle(passes, "remember: the positions of each pass")

# %% [markdown]
# ## The number

# %%
prompt_64, stats = list(range(300, 364)), {}
for rung in (greedy, greedy_cached):
    stats[rung.__name__] = GenerationStats()
    rung(model, prompt_64, 64, stats=stats[rung.__name__])
before, after = (one.positions_computed for one in stats.values())
viz.bars(
    [("recompute everything", before), ("keep keys and values", after)],
    "64 new tokens after a prompt of 64",
    "positions",
)

# %%
assert (before, after) == (6112, 127), "positions for 64 new tokens after 64"
assert round(before / after, 1) == 48.1

# %% [markdown]
# **127 positions instead of 6,112: 48.1 times less work.** The whole workload of the course goes from 437,057 positions
# to 8,036: each token once, and the last token of an answer never, because nothing follows it.

# %%
workload, tiny, total = course_workload(), counting_model(), GenerationStats()
for request in workload.requests:
    greedy_cached(tiny, request.prompt_token_ids, request.max_tokens, stats=total)
assert total.positions_computed == 8036, "the whole workload"
assert workload.num_prompt_tokens + workload.num_output_tokens - len(workload.requests) == 8036

# %% [markdown]
# ## What it costs
#
# Memory, and it is reserved before it is needed. The cache below was made for the longest answer that the request might
# have.

# %%
caches = dense_caches(model, num_rows=1, max_len=64 + 64)
num_bytes = sum(tensor.nbytes for cache in caches for tensor in (cache.keys, cache.values))
print(f"{num_bytes:,} bytes for 128 tokens, {num_bytes // 128:,} a token in {len(caches)} layers")
assert num_bytes // 128 == cost.kv_bytes_per_token(model.config, dtype_bytes=4) == 3072

# %% [markdown]
# There is a second surprise. A clock shows a gain too, but nowhere near 48 times (`docs/ledger.md` is where measured
# times live). A pass over one position still reads every weight of the model. Lesson 3 is about that.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 2a     # DenseCache.append
# python -m minivllm.learn start 2b     # causal_mask
# python -m minivllm.learn start 2c     # greedy_cached
# ```
#
# Three short functions, about 30 minutes together. `check` bounds the positions that you compute: a cache that is
# filled and not used gives the right tokens, and it fails.
#
# ## Questions
#
# 1. Keys and values are kept, queries are not. Why?
# 2. Keys are kept after they were rotated by their position (lesson 1). What would have to happen if a token moved to
#    another position?
# 3. Why would this cache be wrong for a model in which tokens may look at later tokens?
#
# ## In vLLM
#
# vLLM has no dense cache any more; its attention writes with `reshape_and_cache` and reads through a block table
# (`vllm/v1/attention/backends/flash_attn.py`). The tensors of this lesson live on in Hugging Face as `StaticCache`
# (`transformers/cache_utils.py`).
