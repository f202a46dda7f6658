# %% [markdown]
# # Lesson 6. Continuous batching
#
# > **The one idea.** A request leaves the batch when it ends, and another one joins at the very next step. Nobody waits
# > for the longest.
#
# Lesson 5 runs batches that begin and end together. This lesson lets every row of the batch live its own life.

# %%
from minivllm import viz
from minivllm.coursework import counting_model, course_workload, row_timeline, seat_rows
from minivllm.generate import GenerationStats, greedy_static_batch
from minivllm.slot_batching import SlotScheduler, greedy_continuous
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# The workload in batches of 8: each batch runs until its longest answer has ended. A row whose answer is complete goes
# on computing tokens that nobody reads.

# %%
workload, model = course_workload(), counting_model()
prompts = [request.prompt_token_ids for request in workload.requests]
limits = [request.max_tokens for request in workload.requests]
static, outputs = GenerationStats(), []
for start in range(0, 64, 8):
    outputs += greedy_static_batch(
        model, prompts[start : start + 8], limits[start : start + 8], stats=static
    )
print(f"{static.steps:,} steps, {static.positions_computed:,} positions")
print(f"{static.useful_positions / static.positions_computed:.0%} of them are tokens of a request")

# %% [markdown]
# These are the first two batches. Each line is a row, each bar an answer, and gray is a row that has nothing to do.

# %%
first_16 = course_workload(16)
batches = [seat_rows(course_workload(16, part=slice(start, start + 8)), 8) for start in (0, 8)]
viz.timeline(
    row_timeline(batches, 8),
    "step",
    "two static batches of 8, one after the other: request of each row",
)

# %% [markdown]
# ## The code
#
# The cure is a queue and one question at the start of every step: which rows are free?
#
# To write it before you read it: `python -m minivllm.learn start 6` now, and come back.

# %%
show(SlotScheduler.schedule)

# %% [markdown]
# The same 16 requests, row by row.

# %%
viz.timeline(
    row_timeline([seat_rows(first_16, 8)], 8),
    "step",
    "the same 16 requests, each row filled as soon as it is free",
)

# %% [markdown]
# ## The same workload again
#
# A new request brings a whole prompt, and a running one brings one token. Here the prompts are computed one by one, in
# passes of their own; lesson 9 puts both into one pass.

# %%
continuous = GenerationStats()
assert greedy_continuous(model, prompts, limits, stats=continuous, num_rows=8) == outputs, (
    "the tokens are the same"
)
print(f"{continuous.steps} steps, {continuous.positions_computed:,} positions")
print(
    f"{continuous.useful_positions / continuous.positions_computed:.0%} of them are tokens of a request"
)

# %% [markdown]
# ## The number

# %%
viz.bars(
    [("static batches of 8", static.steps), ("continuous, 8 rows", continuous.steps)],
    "64 requests: steps until the last answer",
    "steps",
)

# %%
assert (static.steps, continuous.steps) == (1096, 479), "steps"
assert round(static.steps / continuous.steps, 2) == 2.29
useful = [round(100 * one.useful_positions / one.positions_computed) for one in (static, continuous)]
assert useful == [42, 94], "percent of the positions that belong to a request"

# %% [markdown]
# **479 steps instead of 1,096: 2.29 times fewer. 94 % of the positions are useful instead of 42 %.**
#
# ## What it costs
#
# Each request keeps its row, and the row keeps its length: 8 rows of the longest request. A batch kept tight, without
# such rows, would have to be copied together whenever somebody joins or leaves. This run counted what that would move.

# %%
print(f"{continuous.kv_slots_repacked:,} slots to move, {continuous.kv_slots_written:,} slots written")
assert continuous.kv_slots_repacked == 121_147

# %% [markdown]
# So rows waste memory, and tight batches waste copies. Lesson 7 counts the memory and ends the choice between the two.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 6
# ```
#
# Write `SlotScheduler.schedule`, about 20 minutes. The tests check that no row is idle while somebody waits, and that
# rows are given in the order of arrival.
#
# ## Questions
#
# 1. The last steps of the run have few rows taken. Why can no scheduler avoid that with this workload?
# 2. A prompt of 200 tokens joins while 7 answers run. What do the 7 see? (Lesson 10 is about that.)
# 3. Would sorting the requests by length help the static batches? Who would have to wait for it?
#
# ## In vLLM
#
# The idea is from the Orca paper (2022), and vLLM has had it from its first day. Its scheduler
# (`vllm/v1/core/sched/scheduler.py`) has no rows: `max_num_seqs` is only a number of seats, and memory comes from the
# block pool.
