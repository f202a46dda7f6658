"""Lesson 14. Decode steps as CUDA graphs: some 250 kernels are launched by one call, and the host stops being the bottleneck.

Owns the decode step as a function of nothing but device memory, one graph of it per bucket of batch sizes, and the padding
between. A step reads and writes the rows of its requests (`RowTensors`): newest token, position and block table in; sampled
token and next position out. So the host sends nothing while the batch stays the same: the next step can be launched at once.
Only pure decode steps run here; a step with a prompt in it has a shape of its own and runs without a graph.

    3 requests in rows 5, 0, 9 -> bucket 4:   rows [5, 0, 9, padding]    the padding row lives in the null block

vLLM: vllm/v1/worker/gpu/cudagraph_utils.py, and its FULL_DECODE_ONLY mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm import one_token
from minivllm.attention import PagedAttention, slot_mapping, zero_blocks
from minivllm.compiled_model import OneAndMany
from minivllm.flex_attention import FlexMetadata, decode_metadata, ends
from minivllm.input_batch import MOST_NEW_BLOCKS, RowTensors
from minivllm.mailbox import deliver
from minivllm.model import Qwen2ForCausalLM
from minivllm.sampler import sample_plain
from minivllm.transfers import upload, upload_into

IDLE_STREAMS = set[torch.cuda.Stream | None]()  # no engine's: kept, as CUDA's libraries have 33 MiB for each they have seen
ZERO_BUCKETS = (8, MOST_NEW_BLOCKS)
WARM_UP_RUNS = 2  # the first compiles, the second runs what was compiled


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 4, 8, 16, from there in steps of 32 to 128, of 16 to 256, of 64; the last is max_num_seqs.

    Up to 128 rows a product takes as long as its weights take to be read; beyond that each row of padding is arithmetic. A bucket
    of 2 would make two requests faster by 1 %, and a cold start slower by 4 s.
    """
    sizes = (1, 4, 8, 16, *range(32, 128, 32), *range(128, 256, 16), *range(256, max_num_seqs, 64))
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def bucket_of(num_requests: int, max_num_seqs: int) -> int:
    """The smallest bucket that holds this many requests."""
    return next(size for size in bucket_sizes(max_num_seqs) if size >= num_requests)


def next_stream(device: str) -> torch.cuda.Stream | None:
    """One for all that the next engine will launch on "cuda" or "auto"; idle until its start has succeeded. None without a GPU.

    It is not the default one, which cannot be captured. And there is no second: once two have had work, the kernels of a graph are
    0.3 us further apart, a tenth of a small model's step (docs/ledger.md).
    """
    on_gpu = not device.startswith("cpu") and torch.cuda.is_available()
    IDLE_STREAMS.update([torch.cuda.Stream()] if on_gpu and not IDLE_STREAMS else [])
    return next(iter(IDLE_STREAMS)) if on_gpu else None


def record(compute: Callable[[int], Any], sizes: Sequence[int]) -> tuple[dict[int, torch.cuda.CUDAGraph], dict[int, Any], float]:
    """One graph of `compute(size)` for each size, what each of them returns, and the seconds that recording took.

    The others went into compiling, which has to be over by then: a graph holds kernels, and no compiler. The largest size comes
    first, so that the others reuse its memory. All on the current stream, the engine's.
    """
    pool, seconds, graphs, results = torch.cuda.graph_pool_handle(), 0.0, {}, {}
    for size in reversed(sizes):
        for _ in range(WARM_UP_RUNS):
            compute(size)
        graphs[size], began = torch.cuda.CUDAGraph(), time.perf_counter()
        with torch.cuda.graph(graphs[size], pool=pool, stream=torch.cuda.current_stream()):
            results[size] = compute(size)
        seconds += time.perf_counter() - began
    return graphs, results, seconds


def read_rows(rows: RowTensors, index: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Of the rows in `index` (B,) int64: newest token, its position and slot (B,), block tables (B, blocks), `ends` of these.

    The rows move on by one position; that of the padding row stays 0.
    """
    positions = rows.positions[index]
    rows.positions[index] = torch.where(index == rows.padding_row, 0, positions + 1)
    input_ids = rows.token_ids[index, positions.long()]
    table = rows.block_table[index]
    slots = slot_mapping(rows.block_table, index, positions.long(), block_size)
    return input_ids, positions, slots, table, *ends(positions, table, block_size)


def at_least_two(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one row each with that row twice, others as they are: torch.compile would make something of its own of one."""
    return [tensor.repeat(2, *[1] * (tensor.ndim - 1)) if len(tensor) == 1 else tensor for tensor in tensors]


def head(model: Qwen2ForCausalLM, hidden: Tensor) -> Tensor:
    """Logits (R, V) of hidden states (R, E), to be compiled."""
    return model.compute_logits(hidden) if len(hidden) > 1 else one_token.compute_logits(model, hidden)


def sample_into_rows(logits: Tensor, rows: RowTensors, index: Tensor) -> Tensor:
    """A plainly sampled token (R,) from each of the logits (R, V), which becomes its row's newest."""
    positions = rows.positions[index].long()
    token_ids = sample_plain(logits, rows.temperature[index], rows.seed_keys[index], positions)
    deliver(rows, index, positions, token_ids)
    return token_ids


class DecodeGraphs:
    """Captured decode steps. What `run` returns stays valid until the next run.

    `forward` is the model, compiled or not. Without `use_graphs` every step is computed as it would be captured, at the same
    bucket: how a graph is tested, and how it all runs on a CPU.
    """

    def __init__(self, model: Qwen2ForCausalLM, forward: Callable[..., Tensor], kv_caches: Sequence[PagedAttention],
                 rows: RowTensors, max_num_seqs: int, *, use_graphs: bool = True, use_compile: bool = True) -> None:
        self.model = model
        self.forward = forward
        self.kv_caches = kv_caches
        self.rows = rows
        self.max_num_seqs = max_num_seqs
        self.use_graphs, self.use_compile = use_graphs, use_compile
        self.index = torch.full((max_num_seqs,), rows.padding_row, dtype=torch.int64, device=rows.device)
        self.host_index = np.full(max_num_seqs, rows.padding_row)  # what `index` holds
        # (max_num_seqs, E) what the head reads behind other steps. A process that compiles samplers has no model.
        self.states = torch.empty(0) if model is None else model.model.norm.weight.new_zeros(max_num_seqs, model.config.hidden_size)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.heads: dict[int, torch.cuda.CUDAGraph] = {}
        self.tokens: dict[int, Tensor] = {}  # results of `heads`
        self.results: dict[int, tuple[Tensor, Tensor]] = {}
        self.read_rows: Any = OneAndMany(read_rows) if use_compile else lambda _, *args: read_rows(*args)
        self.compute_logits: Any = OneAndMany(head) if use_compile else lambda _, model, hidden: model.compute_logits(hidden)
        self.sample_into_rows: Any = OneAndMany(sample_into_rows) if use_compile else lambda _, *args: sample_into_rows(*args)

    def capture(self) -> float:
        """Compile and record every bucket. Touches the null block only. Returns the seconds that recording took."""
        sizes = bucket_sizes(self.max_num_seqs)
        self.graphs, self.results, seconds = record(self.compute, sizes)
        self.heads, self.tokens, more = record(self.compute_head, sizes)
        return seconds + more

    def compute(self, size: int) -> tuple[Tensor, Tensor]:
        """One decode step of the first `size` entries of `index`: logits (B, V) and a token (B,) for each."""
        logits = self.compute_step_logits(size)
        return logits, self.sample(logits, self.index[:size])

    def compute_step_logits(self, size: int) -> Tensor:
        """The step up to its logits (B, V)."""
        cache, config, index = self.kv_caches[0], self.model.config, self.index[:size]
        input_ids, positions, slots, table, *last = self.read_rows(size, self.rows, index, cache.block_size)
        group = config.num_attention_heads // config.num_key_value_heads
        decode = decode_metadata(last, table, cache.block_size, cache.key_cache.shape[1], group)
        hidden = self.forward(input_ids, positions, self.kv_caches, FlexMetadata(slots, decode, None, size))  # (B, E)
        return self.compute_logits(size, self.model, hidden)

    def compute_head(self, size: int) -> Tensor:
        """Logits and a token (B,) for each of the first `size` hidden states in `states`. The logits go where the decode step of
        this size leaves its own, so whoever draws once more (graph_sampler.py) finds both in one place.
        """
        logits = self.compute_logits(size, self.model, self.states[:size])
        token_ids = self.sample(logits, self.index[:size])
        if self.use_graphs:
            self.results[size][0].copy_(logits)
        else:
            self.results[size] = logits, token_ids
        return token_ids

    def sample(self, logits: Tensor, index: Tensor) -> Tensor:
        """A plainly sampled token (R,) for each of the logits (R, V) of the rows in `index` (R,).

        One row comes twice, two small copies a step: a function of its own would take 3 s of a cold start.
        """
        count, (logits, index) = len(index), at_least_two(logits, index)
        return self.sample_into_rows(len(index), logits, self.rows, index)[:count]

    def run(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and plainly sampled tokens (B,) of one step of the requests in these rows (B,)."""
        size, count = self.choose(rows), len(rows)
        self.launch(size)
        logits, token_ids = self.results[size]
        return logits[:count], token_ids[:count]

    def run_head(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same behind a step of any kind that has left hidden states (B, E) of these rows (B,) in `states`."""
        size, count = self.choose(rows), len(rows)
        if self.use_graphs:
            self.heads[size].replay()
        else:
            self.tokens[size] = self.compute_head(size)
        return self.results[size][0][:count], self.tokens[size][:count]

    def choose(self, rows: np.ndarray) -> int:
        """The bucket for these rows (B,), which `index` holds from now on."""
        count = len(rows)
        size = bucket_of(count, self.max_num_seqs)
        if not np.array_equal(self.host_index[:count], rows) or (self.host_index[count:size] != self.rows.padding_row).any():
            # Entries beyond the batch must not keep what a larger one left: they would write into rows of somebody else.
            self.host_index[:count], self.host_index[count:] = rows, self.rows.padding_row
            upload_into(self.index, self.host_index)
        return size

    def launch(self, size: int) -> None:
        """Let `results[size]` be those of one more step."""
        if self.use_graphs:
            self.graphs[size].replay()
        else:
            self.results[size] = self.compute(size)


class NewBlocks:
    """Zeroes what a step hands out: attention may read all of a block before all of it is written (0 * NaN is NaN).

    By a graph, once there is one and there are few. Their numbers then go to the device with all else that changes in the rows.
    """

    def __init__(self, blocks: Tensor, rows: RowTensors) -> None:
        self.blocks, self.rows = blocks, rows  # (num_blocks, layers, 2, K, P, D): one kernel for all layers
        self.zero_blocks: Callable[..., None] = zero_blocks
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.count = 0  # how many are noted

    def capture(self) -> float:
        """Compile and record every bucket, on null blocks. Returns the seconds that recording took."""
        self.graphs, _, seconds = record(self.compute, ZERO_BUCKETS)
        return seconds

    def compute(self, size: int) -> None:
        self.zero_blocks(self.blocks, self.rows.block_ids_to_zero[:size].long())

    def zero(self, block_ids: np.ndarray) -> None:
        """Zero these now, or note them for `run`."""
        if self.graphs and len(block_ids) <= MOST_NEW_BLOCKS:
            self.count = len(block_ids)
            self.rows.note("block_ids_to_zero", np.arange(MOST_NEW_BLOCKS), np.pad(block_ids, (0, MOST_NEW_BLOCKS - self.count)))
        else:  # a single one comes twice, and needs no kernel of its own
            self.zero_blocks(self.blocks, upload(np.resize(block_ids, max(2, len(block_ids))), self.rows.device))

    def run(self) -> None:
        """Zero what was noted since the last run, and null blocks besides. The rows have been flushed."""
        if self.count:
            self.graphs[min(size for size in ZERO_BUCKETS if size >= self.count)].replay()
            self.count = 0

    def forget(self) -> None:
        """A step that failed may have noted blocks which belong to others by now."""
        self.count = 0
