# %% [markdown]
# # Lesson 10. Chunked prefill
#
# > **The one idea.** A long prompt is many short ones. Cut where the budget of a step ends, it fills the room beside
# > the answers that are on their way, and nobody waits for it.
#
# Lesson 9's scheduler gives each request as many tokens as the budget has left. This lesson looks at what happens
# without that.

# %%
from minivllm import viz
from minivllm.coursework import Run, answers_then_prompt
from minivllm.scheduler import Scheduler
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# Eight answers are on their way, a token in every step. After 10 steps a prompt of 1,900 tokens arrives. Without
# chunked prefill a prompt runs whole, in one step.

# %%
whole = answers_then_prompt(
    num_streams=8, prompt_len=1900, after=10, enable_chunked_prefill=False, max_num_batched_tokens=2048
)
longest_whole = max(map(sum, whole.work()))
print(
    f"the longest step computes {longest_whole:,} positions, the others {min(map(sum, whole.work()))} or so"
)

# %%
NAMES = ["decode", "prefill"]
viz.steps(
    whole.work()[5:40], NAMES, None, "whole prompts: tokens in steps 6 to 40", "step, from the sixth on"
)

# %% [markdown]
# All eight readers wait for that one step. Work is counted here and not time, but a step with 1,908 positions takes as
# long as its arithmetic (lesson 3), and for eight readers that is a pause in the middle of a sentence.
#
# ## The code
#
# The cut is one function of the scheduler, and its last line is all there is to it.
#
# To write it before you read it: `python -m minivllm.learn start 10` now, and come back.

# %%
show(Scheduler._split)

# %% [markdown]
# Nothing else has to know. A request whose prompt is half computed misses some tokens, like any other request.
# Attention looks at what is in the blocks, whoever put it there and when. A token is sampled only when none is missing.
#
# ## The same arrivals with a budget of 256

# %%
cut = answers_then_prompt(num_streams=8, prompt_len=1900, after=10, max_num_batched_tokens=256)
assert cut.token_ids == whole.token_ids, "a cut prompt gives the same tokens"
longest_cut = max(map(sum, cut.work()))
viz.steps(
    cut.work()[5:40],
    NAMES,
    256,
    "prompts cut at 256: tokens in steps 6 to 40",
    "step, from the sixth on",
)

# %% [markdown]
# How much is computed between two tokens of the first reader? That is the gap that the reader sees.


# %%
def gaps(run: Run) -> list[tuple[float, float]]:
    return [(number, sum(counts)) for number, counts in enumerate(run.work()[5:40], 6)]


viz.line(
    {"whole": gaps(whole), "cut at 256": gaps(cut)},
    "token of the reader",
    "positions computed since the token before",
    "what eight readers wait for",
)

# %% [markdown]
# ## The number

# %%
last_whole, last_cut = (
    max(step for step, work in enumerate(run.work(), 1) if work[1]) for run in (whole, cut)
)
print(
    f"the long prompt is complete in step {last_whole} or {last_cut}; all is done in step {cut.stats.num_steps}"
)
assert (longest_whole, longest_cut) == (1908, 256), "positions in the longest step"
assert (last_whole, last_cut) == (11, 18), "the step in which the long prompt has its first token"
assert whole.stats.num_steps == cut.stats.num_steps == 64

# %% [markdown]
# **The longest step computes 256 positions instead of 1,908: 7.5 times fewer.** The number of steps is the same.
#
# ## What it costs
#
# The long prompt has its first token 7 steps later, because its share of each step is smaller and because every piece
# reads the weights and the keys and values before it again. A small budget is good for readers and bad for prompts.
# That is why it is a setting: `max_num_batched_tokens`. A second one, `long_prefill_token_threshold`, keeps a single
# long prompt from taking the whole budget while others wait.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 10
# ```
#
# Write `Scheduler._split`, about 15 minutes. Five lines, and each of them is a case in the tests.
#
# ## Questions
#
# 1. A budget of 8 with eight answers on their way: when does the long prompt make progress?
# 2. Why does the engine refuse `enable_chunked_prefill=False` together with a budget below `max_model_len`?
# 3. Which tokens of the piece in the middle need logits?
#
# ## In vLLM
#
# `vllm/v1/core/sched/scheduler.py` has the same cut inline (`num_new_tokens = min(num_new_tokens, token_budget)`). It
# is on by default since V1. The idea is described in the Sarathi-Serve paper (2024).
