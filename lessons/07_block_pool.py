# %% [markdown]
# # Lesson 7. The block pool
#
# > **The one idea.** KV memory is cut into blocks of 16 slots, and a block's number is a page number. A request takes a
# > block when it needs one and gives it back when it ends. Nobody cares which number comes next.
#
# Lesson 6 fills every row of a dense cache as soon as it is free. Each row is as long as the longest request may
# become, because nobody knows how long an answer will be. This lesson counts what these rows hold.

# %%
from minivllm import viz
from minivllm.block_pool import BlockPool
from minivllm.coursework import course_workload, run_engine, seat_rows
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# The course has one workload: 64 requests with lognormal lengths, most of them short and a few long. Memory has room
# for 4,096 tokens. A request may have up to 512 tokens, so this memory is 8 dense rows.

# %%
workload = course_workload()
POOL, ROW = 4096, 512
dense = seat_rows(workload, num_rows=POOL // ROW)

dense_filled = sum(num_tokens for step in dense for _, num_tokens in step.values())
dense_reserved = sum(ROW for step in dense for _ in step.values())
print(
    f"{workload.num_prompt_tokens:,} prompt tokens, {workload.num_output_tokens:,} new ones: {len(dense)} steps"
)
print(f"of the slots in rows that somebody owns, {dense_filled / dense_reserved:.0%} hold a token")

# %% [markdown]
# The picture shows the rows after step 100. Gray is reserved for one request and empty.

# %%
step = dense[99]
rows = [
    (
        f"row {row}",
        [(0, used, request, f"request {request}: {used}"), (used, ROW, None, f"{ROW - used}")],
    )
    for row, (request, used) in step.items()
]
viz.timeline(rows, "KV slots of the row", "8 dense rows of 512 slots, after step 100")

# %% [markdown]
# A shorter row would refuse the long requests. A longer one would waste more. The length of an answer is not known
# before it ends, so no row length is right.
#
# ## The code
#
# The way out is the one that operating systems took for memory: pages. The pool below owns 16-slot blocks and knows
# them by number. It has no tensors in it. A queue of free numbers, and a count of owners for each block, are all that
# it needs.
#
# To write them before you read them: `python -m minivllm.learn start 7` now, and come back.

# %%
show(BlockPool.get_new_blocks)

# %%
show(BlockPool.free_blocks)

# %% [markdown]
# Two details prepare later lessons. A block can have several owners (lesson 11), so it becomes free when the last one
# leaves. And a block whose content has a name goes to the back of the queue, so that it can be found again for as long
# as possible.
#
# ## The same memory in blocks
#
# The engine answers the same 64 requests. It has 256 blocks of 16 slots, again 4,096 slots. (Block 0 is the null block:
# padding writes there, and nobody gets it. So `num_blocks` is 257.) Up to 64 requests may run at once. Prefix caching
# waits for lesson 11.

# %%
run = run_engine(
    workload,
    num_blocks=257,
    block_size=16,
    max_model_len=512,
    max_num_seqs=64,
    max_num_batched_tokens=256,
    enable_prefix_caching=False,
)
filled, owned = (sum(counts) for counts in zip(*run.slots()))
print(f"{run.stats.num_steps} steps, up to {run.most_at_once} requests at once")
print(f"of the slots in blocks that somebody owns, {filled / owned:.0%} hold a token")

# %% [markdown]
# This is the pool after step 60. Each box is a block, and its number is that of the request that owns it. Requests lie
# scattered over the pool, and that costs them nothing. Boxes without a number are free.

# %%
viz.blocks([run.states[60]], 257, "256 blocks of 16 slots, after step 60: who owns which block")

# %% [markdown]
# The next picture moves. It is a pool of only 32 blocks that serves the first 12 requests of the workload. Blocks are
# taken as answers grow and come back when requests end. A block that came back last is taken first.

# %%
small = run_engine(
    course_workload(12), num_blocks=33, block_size=16, max_model_len=512, enable_prefix_caching=False
)
frames = small.states[1 :: len(small.states) // 24]
viz.blocks(
    frames, 33, f"32 blocks, 12 requests, {len(frames)} of {small.stats.num_steps} steps", columns=16
)

# %% [markdown]
# ## The number
#
# The only slots that a request wastes are those at the end of its last block.

# %%
num_rows_taken = sum(len(step) for step in dense)
num_tables = sum(len(state.requests) for state in run.states)
dense_waste, paged_waste = (
    (dense_reserved - dense_filled) / num_rows_taken,
    (owned - filled) / num_tables,
)
viz.bars(
    [
        ("dense rows: empty slots a request", dense_waste),
        ("blocks: empty slots a request", paged_waste),
    ],
    "Reserved and empty, on average over all steps",
    "slots",
)

# %%
assert (len(dense), run.stats.num_steps) == (479, 264), "the same work in fewer steps"
assert (POOL // ROW, run.most_at_once) == (8, 45), "requests at once in the same memory"
percent = [round(100 * share) for share in (dense_filled / dense_reserved, filled / owned)]
assert percent == [26, 95], "percent of slots that hold a token"
assert (round(dense_waste), round(paged_waste)) == (381, 7), "empty slots a request"

# %% [markdown]
# **45 requests at once where 8 fit, in the same memory.** 95 % of the owned slots hold a token instead of 26 %. A
# request wastes 7 slots instead of 381: half a block on average.
#
# ## What it costs
#
# Keys and values of a request no longer lie side by side. Attention has to look up where they are, for every token and
# in every layer; lesson 8 is about that. And memory can now run out in the middle of an answer, because nothing was
# reserved for it. In this run the engine had to take the blocks of 7 running requests away; lesson 9 is about that.

# %%
assert run.stats.num_preemptions == 7

# %% [markdown]
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 7
# MINIVLLM_MINE=$PWD/mine jupyter lab lessons/     # the lessons, run on your code
# ```
#
# Fill in `get_new_blocks` and `free_blocks`, about 20 minutes. `python -m minivllm.learn check 7` says which promise is
# broken and with which calls. Started with the second line, this notebook runs on your pool.
#
# ## Questions
#
# 1. With blocks of 256 slots the pool has 16 of them. How many slots would a request waste on average? Why are blocks
#    of 1 slot not the answer?
# 2. `free_blocks` puts a block without a name at the front of the queue. What would change in the run above if it went
#    to the back?
# 3. The pool never moves a block to make room for a larger request. Why does it not have to?
#
# ## In vLLM
#
# `vllm/v1/core/block_pool.py` has the same two functions under the same names. Its free queue is a linked list written
# by hand (`FreeKVCacheBlockQueue` in `kv_cache_utils.py`), because a block must leave the middle of the queue in
# constant time; here an `OrderedDict` does that.
