# %% [markdown]
# # Lesson 11. Prefix caching
#
# > **The one idea.** The same tokens from the beginning on have the same keys and values. So a full block gets a name
# > made of all tokens up to its end, and whoever needs a block of that name takes the one that is there.
#
# Many requests begin alike: one system prompt, one document, one conversation that goes on. Lesson 2 remembers within a
# request. This lesson remembers across requests.

# %%
from minivllm import viz
from minivllm.bench.workload import Source, Workload, prefix_repetition_requests
from minivllm.coursework import run_engine
from minivllm.kv_cache import find_longest_cache_hit, hash_block_tokens
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# 32 requests come with one system prompt of 200 tokens. Each has a question of 40 tokens of its own, and wants 24 new
# tokens.

# %%
source = Source.of(seed=0, allowed_ids=range(256, 4000))
workload = Workload(
    "one system prompt", prefix_repetition_requests(source, 32, 200, 40, 1, 24), temperature=0.0
)
engine_args = {"block_size": 16, "num_blocks": 601, "max_model_len": 512, "max_num_batched_tokens": 256}
plain = run_engine(workload, enable_prefix_caching=False, **engine_args)
print(
    f"{plain.stats.num_scheduled_tokens:,} positions in {plain.stats.num_steps} steps, "
    f"{plain.stats.num_blocks_allocated} blocks"
)

# %% [markdown]
# The same 200 tokens went through the model 32 times, and their keys and values lie in memory 32 times.
#
# ## The code
#
# A block's name is a hash of its tokens and of the name of the block before it. The chain makes the name stand for
# everything from the first token on: the same 16 tokens after another beginning are another block, as they must be,
# because their keys and values differ.
#
# To write them before you read them: `python -m minivllm.learn start 11a` now, then 11b, and come back.

# %%
show(hash_block_tokens)

# %% [markdown]
# A new request names its full blocks and asks the pool for them, from the left. The first name that nobody knows ends
# the hit.

# %%
show(find_longest_cache_hit)

# %% [markdown]
# The last token is never a hit. A request whose whole prompt is known still needs the logits of its last position, and
# those were not kept.
#
# The names of the first two requests show the chain: equal while the tokens are equal, different from the block in
# which they differ.

# %%
for request in workload.requests[:2]:
    names = []
    for start in range(0, 240, 16):
        parent = names[-1] if names else None
        names.append(hash_block_tokens(parent, request.prompt_token_ids[start : start + 16]))
    print(" ".join(name.digest.hex()[:4] for name in names))

# %% [markdown]
# ## The same workload again

# %%
cached = run_engine(workload, enable_prefix_caching=True, **engine_args)
assert cached.token_ids == plain.token_ids, "a hit changes no token"
stats = cached.stats
print(
    f"{stats.num_scheduled_tokens:,} positions in {stats.num_steps} steps, {stats.num_blocks_allocated} blocks"
)
print(f"{stats.prefix_cache_hits:,} of {stats.num_prompt_tokens:,} prompt tokens were found")

# %% [markdown]
# Who owns what after step 3? The first 12 blocks belong to everybody who runs: the pool counts their owners. The label
# is the number of owners where there are several, and the request where there is one.

# %%
viz.blocks(
    [cached.states[3]],
    129,
    f"after step 3: {len(cached.states[3].requests)} requests share their first blocks",
)

# %%
viz.steps(plain.work(), ["decode", "prefill"], 256, "without names: tokens in each step")

# %%
viz.steps(cached.work(), ["decode", "prefill"], 256, "with names: tokens in each step")

# %% [markdown]
# ## The number

# %%
viz.bars(
    [
        ("blocks taken without names", plain.stats.num_blocks_allocated),
        ("with names", stats.num_blocks_allocated),
    ],
    "32 requests, one system prompt",
    "blocks",
)

# %%
skipped = stats.prefix_cache_hits / stats.num_prompt_tokens
assert stats.prefix_cache_hits == 31 * 192, "31 requests find 12 full blocks of 16"
assert skipped == 0.775, "the share of prompt tokens that nobody computes again"
assert (plain.stats.num_blocks_allocated, stats.num_blocks_allocated) == (544, 172)
assert (plain.stats.num_scheduled_tokens, stats.num_scheduled_tokens) == (8416, 2464), "positions"

# %% [markdown]
# **77.5 % of the prompt tokens are skipped, and 172 blocks do instead of 544.** The engine computes 2,464 positions and
# not 8,416.
#
# ## What it costs
#
# One hash for each full block, and a dictionary. No memory: a block that nobody owns keeps its name and its content
# until somebody else takes it. That is why lesson 7's `free_blocks` puts named blocks at the back of the queue.
#
# Only full blocks have names, so the last 8 tokens of the system prompt were computed 32 times. Smaller blocks would
# find more, and need more names. And a workload without common beginnings gains nothing: that of the other lessons has
# 0 hits.
#
# Who can measure time can tell whether a prefix was in the cache, and so whether somebody else sent it. Servers that
# answer for several customers give each one a salt (`cache_salt`), which goes into the first name.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 11a    # the name of a block
# python -m minivllm.learn start 11b    # the longest hit
# python -m minivllm.learn start 11c    # blocks with several owners
# python -m minivllm.learn start 11d    # slots for a request that has hits
# ```
#
# About 90 minutes for the four.
#
# ## Questions
#
# 1. Why would the hash of a block's own 16 tokens be a wrong name?
# 2. A request of exactly 32 tokens is sent twice. How many positions does the second one compute?
# 3. Blocks are freed last first. Which block of a long prompt is evicted first, and why is that the right one?
#
# ## In vLLM
#
# `vllm/v1/core/kv_cache_utils.py` (`hash_block_tokens`) and `find_longest_cache_hit` in
# `single_type_kv_cache_manager.py`, one for each kind of attention layer. The names there also cover images and LoRA
# adapters.
