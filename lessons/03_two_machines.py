# %% [markdown]
# # Lesson 3. Two machines in one
#
# > **The one idea.** A prompt keeps the arithmetic busy, and an answer keeps the memory busy: every step reads all
# > weights, whether for one token or for a thousand. So tokens should share steps.
#
# Lesson 2 did 48 times less work, and a clock shows much less than that. This lesson counts what else a step has to do.

# %%
from minivllm import cost, viz
from minivllm.bench.shapes import SHAPES
from minivllm.config import ModelConfig
from minivllm.coursework import counting_model, watch
from minivllm.generate import greedy, greedy_cached
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# Both loops answer a prompt of 64 tokens with 64 new ones. The passes are recorded, and what they would cost on
# Qwen2.5-0.5B in bfloat16 is worked out from their lengths.

# %%
qwen = ModelConfig.from_dict(SHAPES["qwen2.5-0.5b"])
model, flops, bytes_moved = counting_model(), {}, {}
for rung in (greedy, greedy_cached):
    with watch(model) as passes:
        rung(model, list(range(300, 364)), 64)
    lengths = [(len(positions), positions[-1] + 1) for positions in passes]
    flops[rung.__name__] = sum(cost.flops(qwen, [new], [context]) for new, context in lengths)
    bytes_moved[rung.__name__] = sum(
        cost.bytes_moved(qwen, [new], [context]) for new, context in lengths
    )
for name in flops:
    print(
        f"{name:14} {flops[name] / 1e9:8,.0f} billion operations, {bytes_moved[name] / 1e9:5.1f} billion bytes"
    )

# %%
fewer_flops, fewer_bytes = (one["greedy"] / one["greedy_cached"] for one in (flops, bytes_moved))
assert (round(fewer_flops, 1), round(fewer_bytes, 2)) == (40.7, 1.0), "times less of each"

# %% [markdown]
# The cache saves arithmetic and no traffic at all. Both loops make 64 passes, and each pass reads the whole model: 988
# million bytes. A machine that can read 100 billion bytes a second needs 10 milliseconds for that, even for one token.
#
# ## The code
#
# Two functions count a step. One sums the multiplications, with 2 operations for each multiplication and its addition.
#
# To write them before you read them: `python -m minivllm.learn start 3a` now, then 3b, and come back.

# %%
show(cost.flops)

# %% [markdown]
# The other sums the bytes that have to come from memory: every weight once, however many requests there are, and each
# request's keys and values.

# %%
show(cost.bytes_moved)

# %% [markdown]
# ## Two kinds of step
#
# Operations divided by bytes say which of the two a step waits for. An H200 does about 185 operations in the time of
# one byte. A step below that waits for memory, and a step above it for arithmetic.

# %%
H200 = 790e12 / 4.26e12
sizes = [1, *range(8, 513, 8)]
prefill = [(n, cost.arithmetic_intensity(qwen, [n], [n])) for n in sizes]
decode = [(n, cost.arithmetic_intensity(qwen, [1] * n, [512] * n)) for n in sizes]
viz.line(
    {
        "prefill of one prompt": prefill,
        "decode of many requests": decode,
        "an H200": [(0, H200), (512, H200)],
    },
    "tokens in the step",
    "operations a byte",
    "Qwen2.5-0.5B, bfloat16: what a step asks of the machine",
)

# %% [markdown]
# The two kinds of step have names. **Prefill** computes a prompt, and **decode** computes one token of an answer. A
# prefill of a few hundred tokens is enough for the machine. Decode brings one token of each request, and their curve
# starts at 1. It grows with every request that joins the step. It bends because each request brings keys and values of
# its own, which nobody shares.
#
# ## The number

# %%
one, many, prompt = (
    cost.arithmetic_intensity(qwen, *step)
    for step in (([1], [512]), ([1] * 64, [512] * 64), ([512], [512]))
)
viz.bars(
    [
        ("decode, 1 request", one),
        ("decode, 64 requests", many),
        ("prefill of 512 tokens", prompt),
        ("H200", H200),
    ],
    "Operations a byte",
    "",
)

# %%
assert [round(value) for value in (one, many, prompt, H200)] == [1, 47, 389, 185], "operations a byte"

# %% [markdown]
# **Decode does 1 operation a byte, a prefill of 512 tokens 389.** Decoding 64 requests in one step does 47: nearly 64
# tokens for the price of one.
#
# What is the least time of such steps on an H200? The slower of the two sides decides.

# %%
for name, queries, contexts in (
    ("1 decode", [1], [512]),
    ("64 decodes", [1] * 64, [512] * 64),
    ("prefill", [512], [512]),
):
    work, traffic = cost.flops(qwen, queries, contexts), cost.bytes_moved(qwen, queries, contexts)
    arithmetic, memory = work / 790e12, traffic / 4.26e12
    assert cost.roofline_seconds(work, traffic, 790e12, 4.26e12) == max(arithmetic, memory)
    print(
        f"{name:12} {'arithmetic' if arithmetic > memory else 'memory':10} decides: "
        f"{1e6 * max(arithmetic, memory):4.0f} microseconds for {sum(queries)} tokens"
    )

# %% [markdown]
# ## What it costs
#
# Nothing was built in this lesson. These are bounds and no measurements: no real step is faster, and most are slower.
# On a GPU the starts of kernels alone can take longer than the bytes (`docs/decode_step.md` measures that).
#
# There is a third side to it, electricity. 790 is the rate of a short burst: an H200 may draw 700 W, and kept busy for
# seconds by arithmetic alone, or by reading alone, it is at that limit and lowers its clock, to 659 TFLOP/s. Then the
# slower of the two sides decides no more. 256 answers of a 7B model took 7.3 kJ; at what a byte and an operation cost
# alone, reads are 3.3 of these and arithmetic 4.0 (`docs/ledger.md`).
#
# A batch has a price too: every request in it waits until the step is done, and a prompt in the same step makes it
# long. Lessons 5 to 10 are about who shares a step with whom.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 3a     # flops
# python -m minivllm.learn start 3b     # bytes_moved
# ```
#
# About 30 minutes for both. The tests compare your count with what PyTorch's own counter sees.
#
# ## Questions
#
# 1. How many requests with a context of 4,096 tokens does it take until keys and values are as many bytes as the
#    weights?
# 2. Weights of 4 bits are a quarter of the bytes. Which of the two kinds of step gains?
# 3. A prompt of 512 tokens is above the line. What changes for it if it is cut into 8 pieces of 64 tokens?
#
# ## In vLLM
#
# vLLM does not compute this, it lives by it: `max_num_batched_tokens` and `max_num_seqs` in `vllm/config/scheduler.py`
# are set so that steps are large. `python -m minivllm.bench anatomy` measures where the time of a step goes.
