# %% [markdown]
# # Lesson 14. On a GPU
#
# > **The one idea.** A GPU computes faster than a host can ask it to. So the host asks less often: operations become
# > regions, regions become one graph, and the next step is asked for before this one has come back.
#
# The lesson runs on a CPU and counts what the host asks for. The milliseconds at its end were recorded on an NVIDIA
# H200, and the ledger has the files.

# %%
import torch

from minivllm import LLM, SamplingParams, cost, viz, viz_bands
from minivllm.bench.shapes import SHAPES
from minivllm.compiled_model import CompiledModel
from minivllm.config import ModelConfig
from minivllm.course_launches import DecodeStep, launches, recorded
from minivllm.coursework import course_workload, run_engine
from minivllm.cuda_graphs import DecodeGraphs, bucket_of, bucket_sizes, read_rows
from minivllm.tiny import draft_path
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# One decode step of three requests, on a model with the 24 layers of Qwen2.5-0.5B. The layers are narrow here, since a
# count does not depend on their width. Every operation that writes a tensor is at least one kernel on a GPU.

# %%
step = DecodeStep(layers=24)
plain = launches(step.plain)
layer = launches(DecodeStep(layers=2).plain) - launches(DecodeStep(layers=1).plain)
print(
    f"{plain.total()} operations: {layer.total()} in each of 24 layers, {plain.total() - 24 * layer.total()} around them"
)
viz.bars(
    [(name, count) for name, count in layer.most_common(8)], "One layer's most frequent operations"
)

# %% [markdown]
# Four of the 33 are matrix products. For such a step Python needs some 16 milliseconds to launch one operation after the
# other, and an H200 needs 1 to run them (`docs/decode_step.md`): most of the time the GPU waits for the host. Sampling
# and the bookkeeping of rows come on top.

# %%
whole = launches(step.run)
print(f"{whole.total()} operations with reading rows, block mask and sampling")
assert (plain.total(), layer.total(), whole.total()) == (821, 33, 953), "operations"

# %% [markdown]
# ## The code: regions
#
# torch.compile makes one kernel out of operations that follow each other and do not mix tokens. Between two attentions
# a layer and the beginning of the next one are one region, and all layers share it.

# %%
show(CompiledModel.__call__)

# %%
regions = DecodeStep(layers=24).count_regions()
print(dict(regions))
assert regions.total() == 49, "calls of the host for the model: 25 regions and 24 attentions"

# %% [markdown]
# On a GPU a region is still several kernels, four around its matrix products. What the host has to do has become less
# by a factor of 17, and fewer results go through memory between two kernels.
#
# ## The code: one graph
#
# A CUDA graph is a recording of launches with all their arguments: addresses of memory. To replay it is one call.
# Nothing that a step needs may then be an argument. It has to lie in device memory, at the address that was recorded.

# %%
show(read_rows)

# %%
show(DecodeGraphs.choose)

# %%
show(DecodeGraphs.run)

# %% [markdown]
# A graph has a shape, so there is one for each of some batch sizes, the buckets. A batch goes into the smallest bucket
# that holds it, and the rest are rows of nobody.
#
# To write it before you read it: `python -m minivllm.learn start 14` now, and come back.

# %%
show(bucket_sizes)

# %%
print(bucket_sizes(256))
sizes = range(1, 97)
viz.steps(
    [(n, bucket_of(n, 256) - n) for n in sizes],
    ["requests", "padding"],
    None,
    "rows of a step by number of requests",
    "requests in the batch",
)

# %% [markdown]
# What does padding cost? The course's 64 requests run on the engine, and each decode step is put into its bucket.

# %%
engine_args = {"model": str(draft_path()), "num_blocks": 601, "block_size": 16, "max_model_len": 512}
run = run_engine(
    course_workload(), max_num_batched_tokens=256, enable_prefix_caching=False, **engine_args
)
batches = [answers for answers, prompts, again in run.work() if answers and not prompts + again]
padded = sum(bucket_of(count, 256) for count in batches)
print(f"{len(batches)} steps are pure decodes; {sum(batches):,} requests in {padded:,} rows")
assert (sum(batches), padded) == (2660, 3631), "rows of use, and rows in all"

# %% [markdown]
# More than a quarter of the rows is padding. A decode step waits for weights, so a row more costs next to nothing.
#
# ## What must stay where it is
#
# Three requests go into a bucket of four. The fourth row is the padding row: its block table is null blocks and its
# position stays 0, so it writes into slot 0, which is nobody's. Here is what a step writes.

# %%
step = DecodeStep(layers=24, num_requests=3)
before = step.kv.clone()
step.run()
slots = (step.kv != before).any(dim=4).any(dim=2).any(dim=1).any(dim=0).nonzero().flatten().tolist()
print([f"block {slot // 16}, offset {slot % 16}" for slot in slots])
assert slots == [0, 36, 101, 166], "one slot for each request, and slot 0 for the padding"

# %% [markdown]
# The tensors of a step are the same objects in the next: rows, index and KV cache. A new tensor with the right content
# would not be seen, because the graph reads at the old address.

# %%
rows = step.rows
tensors = [step.kv, step.graphs.index, rows.token_ids, rows.positions, rows.block_table, rows.seed_keys]
addresses = [tensor.data_ptr() for tensor in tensors]
for _ in range(5):
    step.run()
assert [tensor.data_ptr() for tensor in tensors] == addresses, "a step moves nothing"
print("positions:", rows.positions.tolist())

# %% [markdown]
# The first three rows have moved on by six steps, and the others have not moved. Now the classic mistake: the last
# batch was larger, and the entry of a request that has left was not overwritten with the padding row.

# %%
step.graphs.index[3] = 5
with torch.inference_mode():
    step.graphs.compute(4)
print("positions:", rows.positions.tolist())
assert rows.positions[5] == 26, "row 5 was in no batch, and it has moved"

# %% [markdown]
# Request 5 has a token that nobody sampled for it, and nothing has failed. That is why `choose` compares the index with
# what it should be, beyond the batch as well.
#
# ## The code: one step ahead
#
# With a graph the host has little to launch, but it still has to plan: scheduler, block tables, stop strings. It does
# that while the device computes. A decode step needs no token from the host, since the newest one lies in the row.

# %%
prompts = [list(request.prompt_token_ids) for request in course_workload(16).requests]
params = SamplingParams(temperature=0, max_tokens=40)
answers, stats = {}, {}
for ahead in (False, True):
    with LLM(async_scheduling=ahead, device="cpu", dtype="float64", **engine_args) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers[ahead], stats[ahead] = [one.outputs[0].token_ids for one in outputs], llm.stats
print(
    f"in turn {stats[False].num_steps} steps, ahead {stats[True].num_steps}; "
    f"{stats[True].discarded_positions} positions were computed for nothing"
)
assert answers[True] == answers[False], "planning ahead changes no token"

# %% [markdown]
# The price: a request that ends by its end-of-sequence token is found out a step too late, and its share of the step on
# the way is thrown away.
#
# ## The number
#
# What does the host ask for in a step? With a graph and the same requests as in the step before: nothing but a replay.

# %%
step = DecodeStep(layers=24)
graph = step.use_stand_in()
first, second = launches(step.run), launches(step.run)
print(
    f"a new batch: {first.total()} upload and a replay; the same batch: {second.total()} and a replay"
)
assert (first.total(), second.total(), graph.num_replays) == (1, 0, 2), "launches beside the replay"

# %%
viz.bars(
    [
        ("one operation after the other", whole.total()),
        ("of these the model", plain.total()),
        ("the model in regions", regions.total()),
        ("the whole step as one graph", graph.num_replays - 1),
    ],
    "Calls of the host for one decode step",
    "",
)

# %% [markdown]
# **From 953 calls a step to 1.** (On a CPU a stand-in replays: it does the same work and counts.)
#
# What is left is the device's own time. These were recorded on one H200, bfloat16, contexts of 600 tokens; the floor is
# lesson 3's: bytes moved, divided by the bandwidth that was measured there.

# %%
names = ("0.5b", "7b")
records = {name: recorded(f"h200-{name}-anatomy.json") for name in names}
for name, record in records.items():
    config = ModelConfig.from_dict(SHAPES[f"qwen2.5-{name}"])
    for one in record["steps"]:
        batch, context = [1] * one["batch_size"], [one["context_len"]] * one["batch_size"]
        floor = 1e3 * cost.bytes_moved(config, batch, context) / record["bandwidth"]
        assert abs(floor / one["floor_milliseconds"] - 1) < 0.02, "the ledger's floor is this one"
        kernels = sum(count for _, count in one["groups"].values())
        print(
            f"{name:4} {one['batch_size']:3} requests: {kernels} kernels, {one['milliseconds']:.2f} ms, "
            f"floor {floor:.2f} ms ({floor / one['milliseconds']:.0%})"
        )

# %%
GROUPS = {"attention": 1, "rotation, KV write": 2, "sampling": 3}
table = []
for record in records.values():
    for one in record["steps"]:
        parts = [0.0] * 5
        for group, (microseconds, _) in one["groups"].items():
            parts[GROUPS.get(group, 0)] += microseconds
        parts[4] = max(0.0, 1e3 * one["milliseconds"] - sum(parts))
        table.append((f"batch size {one['batch_size']}", parts))
KINDS = ["products, norms, SiLU", "attention", "rotation, KV write", "sampling", "gaps"]
viz_bands.stacks(
    table[:3], KINDS, "us", "Qwen2.5-0.5B on an H200: contexts of 600, microseconds of a step"
)

# %%
viz_bands.stacks(
    table[3:], KINDS, "us", "Qwen2.5-7B on an H200: contexts of 600, microseconds of a step"
)

# %%
half, seven = (
    [round(one["milliseconds"], 2) for one in record["steps"]] for record in records.values()
)
assert (half, seven) == ([0.55, 0.9, 1.78], [3.85, 4.65, 9.03]), "milliseconds, recorded on an H200"

# %% [markdown]
# A small model is far from its floor, because a kernel has a price of its own. A large one is near it at batch size 1:
# weights are what it reads, and there is nothing left to save but weights. (Where kernels overlap, their sum is
# more than the step.)
#
# ## What it costs
#
# Time before the first request: in these runs 24 seconds for 7B, whose kernels lay on disk from an earlier start, and 39 for
# 0.5B without any, though two more processes compile a part of them (`compile_ahead.py`); `enforce_eager=True` does without.
# Rules: nothing may be allocated, read back or decided by the host inside a step. And mistakes of a new kind, since a graph
# that reads at a wrong address does not fail.
#
# What cannot be known in advance stays outside: steps with long prompts run without a graph. Short prompts have one for each of
# some numbers of tokens, with room for any number of decodes beside them. The penalties and cuts of lesson 4 are a graph
# behind the step. Guessing ahead (lesson 12) has graphs in which each request has a row for every guess; the device
# counts how many were right.

# %%
assert [round(record["ready_seconds"]) for record in records.values()] == [39, 24], (
    "seconds to be ready"
)

# %% [markdown]
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 14
# ```
#
# Write `bucket_sizes` and `bucket_of`, about 15 minutes. On a GPU, `python -m minivllm.bench anatomy` makes the table
# of this lesson anew, and `docs/decode_step.md` reads it line by line.
#
# ## Questions
#
# 1. 256 buckets of all sizes would pad nothing. What would they cost?
# 2. The noise of the sampler is a hash of seed and position (lesson 4). What would a generator with a state do in a
#    graph?
# 3. The padding row's position stays 0. What would happen after 512 steps if it moved on like the others?
#
# ## In vLLM
#
# `vllm/v1/worker/gpu/cudagraph_utils.py` records graphs by bucket as this engine does. vLLM's own kernels need no
# torch.compile for attention, and its compiled pieces are cut at attention too (piecewise), so that steps with prompts
# have graphs as well.
