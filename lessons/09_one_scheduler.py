# %% [markdown]
# # Lesson 9. One scheduler
#
# > **The one idea.** A step is nothing but "how many tokens for each request", under one budget. When memory runs out,
# > the newest request gives its blocks back and starts over later.
#
# Lesson 7 admits requests without reserving memory for their answers, so a step may find no free block for a token that
# is due. Somebody has to decide who runs, with how many tokens, and who gives way. One class does.

# %%
from minivllm import viz
from minivllm.coursework import course_workload, run_engine
from minivllm.scheduler import Scheduler
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# The 64 requests of the course run with so much memory that nobody waits for a block.

# %%
workload = course_workload()
engine_args = {
    "block_size": 16,
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": False,
}
plenty = run_engine(workload, num_blocks=601, **engine_args)
need = max(owned for _, owned in plenty.slots())
print(
    f"{plenty.stats.num_steps} steps, {plenty.stats.num_scheduled_tokens:,} positions, "
    f"up to {plenty.most_at_once} requests and {need:,} slots at once"
)

# %% [markdown]
# A machine with 2,048 slots has less than half of that. Admitting only requests whose longest answer is sure to fit
# would bring lesson 7's empty slots back. Refusing the others is no answer either.
#
# ## The code
#
# Every request has `num_tokens` that are known and `num_computed_tokens` whose keys and values are in memory. A prompt
# is a request that misses many tokens; an answer in progress is a request that misses one. A step lets them catch up,
# and there is no other difference between the two. First the running requests get their tokens, then waiting ones are
# admitted.

# %%
show(Scheduler.schedule)

# %%
show(Scheduler._schedule_running)

# %% [markdown]
# The first five requests with a budget of 32 tokens a step show it. Blue is decode: one token for each answer in
# progress. Orange is prefill, which takes what the budget has left: a prompt is cut where the budget ends.

# %%
NAMES = ["decode", "prefill", "recomputed"]
small = run_engine(course_workload(5), **engine_args | {"max_num_batched_tokens": 32, "num_blocks": 65})
viz.steps(small.work()[:14], NAMES[:2], 32, "five requests, 32 tokens a step: the first 14 steps")

# %% [markdown]
# When a running request needs a block and none is free, the newest running request is preempted: its blocks go back,
# its progress goes to 0, and it moves to the front of the queue. Its tokens are kept. When it comes back, prompt and
# answer so far are computed like one longer prompt.
#
# To write them before you read them: `python -m minivllm.learn start 9b` now, and come back.

# %%
show(Scheduler._allocate_or_preempt)

# %%
show(Scheduler._preempt)

# %% [markdown]
# ## The same requests in less than half of the memory

# %%
scarce = run_engine(workload, num_blocks=129, **engine_args)
stats = scarce.stats
print(
    f"{stats.num_steps} steps instead of {plenty.stats.num_steps}, {stats.num_preemptions} preemptions"
)
print(
    f"{stats.num_recomputed_tokens:,} of {stats.num_scheduled_tokens:,} positions were computed before"
)

# %% [markdown]
# Below is the work of every step. With scarce memory the prompts come in over more steps, and some of the work is done
# again.

# %%
viz.steps(plenty.work(), NAMES[:2], 256, "64 requests, 600 blocks: tokens in each step")

# %%
viz.steps(scarce.work(), NAMES, 256, "64 requests, 128 blocks: tokens in each step")

# %% [markdown]
# Every decision is a sentence in the trace. This is the first preemption.

# %%
decisions = [decision for record in scarce.records for decision in record.get("decisions", ())]
first = next(number for number, decision in enumerate(decisions) if decision["action"] == "preempt")
for decision in decisions[first : first + 3]:
    print(decision["reason"])

# %% [markdown]
# ## The number

# %%
assert scarce.token_ids == plenty.token_ids, (
    "memory changes when a token is computed, never which token it is"
)
assert (need, 128 * 16) == (5440, 2048), "slots: needed at once, and there"
assert (plenty.stats.num_steps, stats.num_steps) == (264, 308)
assert (stats.num_preemptions, stats.num_recomputed_tokens) == (23, 1494)
assert (
    stats.num_scheduled_tokens
    == plenty.stats.num_scheduled_tokens + stats.num_recomputed_tokens
    == 9530
)

# %% [markdown]
# **Memory for 38 % of the need: 308 steps instead of 264, 23 preemptions, 1,494 positions computed again, and all 3,334
# tokens are the same.**
#
# ## What it costs
#
# 19 % more positions than lesson 2's 8,036. A preempted request keeps its tokens and loses their keys and values. The
# alternative is to copy them to the host's memory and back; vLLM had that in its first design and left it out of V1.
# (With prefix caching, lesson 11, a request often finds some of its own blocks again.)
#
# The newest gives way so that the oldest always moves. If any request could be taken, two of them could take memory
# from each other for ever, and no answer would end.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 9a     # who is admitted
# python -m minivllm.learn start 9b     # who gives way
# ```
#
# About 40 minutes for both. The tests draw thousands of small workloads and check after every step that each block is
# free or owned, that the budget holds, and that nobody waits for ever.
#
# ## Questions
#
# 1. In a step that had to preempt nobody new is admitted. What could happen otherwise?
# 2. A request that waits for memory is not overtaken by a smaller one that would fit. What does that cost, and what
#    does it prevent?
# 3. The queue holds a request of 500 prompt tokens and the pool has 20 blocks in all. When is it refused?
#
# ## In vLLM
#
# `vllm/v1/core/sched/scheduler.py`: `schedule`, `_preempt_request` and `update_from_output` are the same three steps,
# with multimodal inputs, LoRA, structured output and connectors to remote memory in between.
