# %% [markdown]
# # Lesson 0. One token at a time
#
# > **The one idea.** Generation is a loop around one function. The function takes all tokens so far and says which one
# > comes next. The loop appends it and asks again.
#
# A language model does not write a sentence. It answers one question: given these tokens, how likely is each token of
# the vocabulary to be the next one? Everything else in an inference engine is about asking that question often and
# cheaply.

# %%
from minivllm import viz
from minivllm.coursework import (
    counting_model,
    course_workload,
    embedded_model,
    embedded_tokenizer,
    watch,
)
from minivllm.generate import GenerationStats, greedy
from minivllm.viz import show

# %% [markdown]
# ## The loop
#
# The package comes with a small model that was trained on text about this engine. This is the whole loop that makes it
# talk. The model maps token ids to one hidden vector per token; the last one has seen every token, and from it the next
# token is chosen.
#
# To write it before you read it: `python -m minivllm.learn start 0` now, and come back.

# %%
show(greedy)

# %%
model, tokenizer = embedded_model(), embedded_tokenizer()
prompt = tokenizer.encode("The block pool")
output = greedy(model, prompt, max_new_tokens=12)
print(
    [tokenizer.decode([token]) for token in prompt],
    "->",
    [tokenizer.decode([token]) for token in output],
)

# %% [markdown]
# ## What it computes
#
# A **position** is one token that goes through the whole model. It is the unit in which this course counts work. The
# picture shows which positions each pass of the loop above computed. They were recorded while it ran.

# %%
with watch(model) as passes:
    greedy(model, prompt, max_new_tokens=12)
viz.triangle(passes, f"{len(prompt)} prompt tokens, 12 new ones: the positions of each pass")

# %% [markdown]
# Every pass begins at position 0. The orange boxes were computed before, from the same tokens, with the same result.
#
# ## The number
#
# A prompt of 64 tokens and 64 new ones cost 64 + 65 + ... + 127 positions.

# %%
stats = GenerationStats()
greedy(model, list(range(300, 364)), max_new_tokens=64, stats=stats)
print(f"{stats.positions_computed:,} positions for 64 new tokens: {stats.positions_computed / 64} each")
print(f"{stats.useful_positions} of them for the first time, {stats.recomputed_positions:,} again")

# %%
assert stats.positions_computed == 6112 == sum(range(64, 128)), "64 new tokens after 64"
assert stats.useful_positions == 127

# %% [markdown]
# **6,112 positions for 64 tokens, 95.5 each.** All but 127 of them repeat work.
#
# ## The course's workload
#
# From here to the last lesson the course answers the same 64 requests: prompts of 74 tokens and answers of 52 on
# average, most of them short and a few long. Work is counted on a model of one tiny layer, because the count does not
# depend on the size of the model.

# %%
workload, tiny, total = course_workload(), counting_model(), GenerationStats()
for request in workload.requests:
    greedy(tiny, request.prompt_token_ids, request.max_tokens, stats=total)
print(
    f"{workload.num_prompt_tokens:,} prompt tokens, {workload.num_output_tokens:,} new ones, {total.steps:,} passes"
)
print(
    f"{total.positions_computed:,} positions, {total.positions_computed / workload.num_output_tokens:.1f} a new token"
)

# %%
sums = [0]
for request in workload.requests:
    start, new = len(request.prompt_token_ids), request.max_tokens
    sums.append(sums[-1] + sum(range(start, start + new)))
assert sums[-1] == total.positions_computed == 437_057, (
    "the whole workload, one request after the other"
)

# %% [markdown]
# ## What it costs
#
# The loop keeps nothing between two passes: no memory, no state, nothing that could go wrong. That is why it stays in
# the package, as the rung against which the faster ones are tested. Its price grows with the square of the length.

# %%
curve = [(length, sum(range(length))) for length in range(8, 257, 8)]
viz.line(
    {"recompute everything": curve, "each position once": [(n, n) for n, _ in curve]},
    "new tokens",
    "positions computed",
    "An empty prompt: positions by length of the answer",
)

# %% [markdown]
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 0
# MINIVLLM_MINE=$PWD/mine jupyter lab lessons/     # the lessons, run on your code
# ```
#
# Write `greedy` from its docstring, about 15 minutes. `python -m minivllm.learn check 0` compares it with Hugging Face,
# token for token, and counts your positions.
#
# ## Questions
#
# 1. Only the last row of the hidden states is turned into logits. What are the other rows good for during training?
# 2. How many positions do 64 new tokens cost after a prompt of 512? And how many does each new token cost then?
# 3. Two prompts share their first 60 tokens. Which positions does this loop compute twice that nobody has to?
#
# ## In vLLM
#
# There is no such loop: vLLM never computes a position twice if it can help it. The nearest thing is a request that was
# preempted (lesson 9): it starts over with all its tokens as its prompt, in `vllm/v1/core/sched/scheduler.py`.
