# %% [markdown]
# # Lesson 5. Batching, the obvious way
#
# > **The one idea.** A batch of requests shares every step, and so every reading of the weights. Put into one
# > rectangle, it is as wide as its longest prompt and as long as its longest answer.
#
# Lesson 3 found that a step over one token reads as many weights as a step over 64. So requests should be answered
# together. This lesson does it in the way that comes to mind first, and counts what the rectangle wastes.

# %%
from minivllm import viz
from minivllm.coursework import counting_model, course_workload, watch
from minivllm.generate import GenerationStats, greedy_cached, greedy_static_batch, left_pad
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# One request after the other, as in lesson 2: every new token is a pass of its own.

# %%
workload, model = course_workload(), counting_model()
prompts = [request.prompt_token_ids for request in workload.requests]
limits = [request.max_tokens for request in workload.requests]
alone = GenerationStats()
outputs = [greedy_cached(model, prompt, limit, stats=alone) for prompt, limit in zip(prompts, limits)]
print(f"{alone.steps:,} passes over the weights for {workload.num_output_tokens:,} new tokens")

# %% [markdown]
# ## The code
#
# Prompts have different lengths, and a tensor is a rectangle. The shorter ones are filled up on the left, so that all
# prompts end in the same column and every next token goes into the column after it. Positions count from each row's own
# first token, and the mask hides the filling from everybody.
#
# To write it before you read it: `python -m minivllm.learn start 5` now, and come back.

# %%
show(left_pad)

# %%
ids, positions, mask = left_pad([[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]])
for row in range(3):
    print(ids[row].tolist(), positions[row].tolist(), mask[row].int().tolist())

# %%
show(greedy_static_batch)

# %% [markdown]
# ## The same workload in batches of 8
#
# All passes are recorded. The first pass of a batch computes the rectangle of its prompts, the later ones a column
# each.

# %%
static, batched = GenerationStats(), []
with watch(model) as passes:
    for start in range(0, 64, 8):
        batched += greedy_static_batch(
            model, prompts[start : start + 8], limits[start : start + 8], stats=static
        )
assert batched == outputs, "padding changes no token"
print(f"{static.steps:,} passes instead of {alone.steps:,}")
print(f"{static.positions_computed:,} positions instead of {alone.positions_computed:,}")

# %% [markdown]
# This is the first batch. Blue is a prompt, orange an answer. Gray was computed, and is nothing.

# %%
longest = max(len(prompt) for prompt in prompts[:8])
rows = [
    (
        f"row {row}",
        [
            (0, longest - len(prompt), None, ""),
            (longest - len(prompt), longest, 0, str(len(prompt))),
            (longest, longest + limit, 1, str(limit)),
            (longest + limit, longest + max(limits[:8]), None, ""),
        ],
    )
    for row, (prompt, limit) in enumerate(zip(prompts[:8], limits[:8]))
]
viz.timeline(rows, "column of the rectangle", "the first batch of 8: prompt and answer of each request")

# %% [markdown]
# ## The number
#
# How much of the rectangles are tokens? Prefill and decode are counted apart: a pass of 8 positions is decode.

# %%
prefill = sum(len(positions) for positions in passes if len(positions) > 8)
decode = sum(len(positions) for positions in passes if len(positions) == 8)
prefill_useful = workload.num_prompt_tokens / prefill
decode_useful = (workload.num_output_tokens - 64) / decode
viz.bars(
    [("prefill", 100 * prefill_useful), ("decode", 100 * decode_useful)],
    "Positions that belong to a request, in percent",
    "%",
)

# %%
assert [round(100 * share) for share in (prefill_useful, decode_useful)] == [45, 38], "percent"
assert (alone.steps, static.steps) == (3334, 1096), "passes over the weights"
assert (static.positions_computed, static.useful_positions) == (19_320, 8036)

# %% [markdown]
# **1,096 passes instead of 3,334. 45 % of prefill is useful and 38 % of decode, 42 % in all.**
#
# ## What it costs
#
# More arithmetic than before: 19,320 positions instead of 8,036. By lesson 3 that is a fair price, because the passes
# were waiting for memory anyway. But larger batches make the rectangle worse: the longest of 64 answers is 256 tokens,
# and the mean is 52.
#
# It also costs patience. The requests of the second batch wait until the longest answer of the first has ended, and an
# answer that is complete is handed out only then.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 5
# ```
#
# Write `left_pad`, about 20 minutes. The tests compare a padded batch with each of its rows alone.
#
# ## Questions
#
# 1. What would go wrong if prompts were filled up on the right?
# 2. Positions of the padding are negative. Why does it not matter what is computed there?
# 3. Would it help to sort the 64 requests by prompt length? By answer length? Which of the two is known?
#
# ## In vLLM
#
# vLLM has no rectangle: a step is one flat list of tokens (`vllm/v1/worker/gpu_model_runner.py`). Hugging Face's
# `generate` works as this lesson does, with `padding_side="left"`.
