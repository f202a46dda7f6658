"""Lesson 14. Short prompts as CUDA graphs too: a step that joins a request to the batch should not cost ten decode steps.

Owns the fixed addresses of a step with prompts in it, one graph per number of tokens, and the padding between. The GPU needs 1 ms
for 64 tokens of a 0.5B model and the host 16 ms to launch the kernels one by one. Every request of the step, decodes too, is
cut into tiles, so one kernel serves any mix of them. Beyond the largest bucket the GPU is the slower of the two again, and the
step runs without a graph.

    300 tokens of 2 requests -> bucket 384:   84 padded tokens and all unused tiles live in the null block

Also owns what attention is told where there is no graph.

vLLM captures mixed steps piecewise, attention left out; here it is inside, because its kernel is compiled for any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import PagedAttention, slot_mapping
from minivllm.config import ModelConfig
from minivllm.cuda_graphs import bucket_of, record
from minivllm.flex_attention import QUERY_TILE, FlexMetadata, cut_into_tiles, decode_metadata, ends, prefill_metadata
from minivllm.input_batch import RowTensors, StepInputs, upload

TOKEN_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
MOST_REQUESTS = 32  # each may need one tile more than its tokens fill
# A step of fewer flops takes the GPU less time than it takes the host to launch its kernels one by one: some 10 ms.
HOST_BOUND_FLOPS = 2_000_000_000_000


def token_buckets(budget: int, num_parameters: int) -> list[int]:
    """Numbers of tokens to capture: within the budget of a step, and so few that the host would be the bottleneck."""
    most = min(budget, HOST_BOUND_FLOPS // num_parameters)
    return [size for size in TOKEN_BUCKETS if size <= most]


class PromptGraphs:
    """Captured steps with prompts. What `run` returns stays valid until the next run.

    A graph has one input, an array of integers: 3 x size for the tokens, 4 x (size / QUERY_TILE + MOST_REQUESTS) for the tiles. One
    upload fills it. Everything else that a step reads lies in the rows already.
    """

    def __init__(self, forward: Callable[..., Tensor], kv_caches: Sequence[PagedAttention], rows: RowTensors,
                 buckets: list[int], *, use_graphs: bool = True) -> None:
        self.forward = forward
        self.kv_caches = kv_caches
        self.rows = rows
        self.use_graphs = use_graphs
        self.buckets = buckets
        self.inputs = {size: torch.from_numpy(self.pack(size)).to(rows.device) for size in self.buckets}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.results: dict[int, Tensor] = {}

    def fits(self, inputs: StepInputs) -> bool:
        """Whether there is a graph for a step of so many tokens and requests."""
        # Few tokens of many requests would need more tiles than there are.
        return bool(self.buckets) and len(inputs.positions) <= self.buckets[-1] and len(inputs.rows) <= MOST_REQUESTS

    def pack(self, size: int, inputs: StepInputs | None = None) -> np.ndarray:
        """A step's integers in one array: for each token its row, position and place in the tiles, then the tiles' four numbers."""
        num_tiles = -(-size // QUERY_TILE) + MOST_REQUESTS
        tokens, tiles = np.zeros((3, size), dtype=np.int32), np.zeros((4, num_tiles), dtype=np.int32)
        tokens[0], tiles[0], tiles[3] = self.rows.padding_row, self.rows.padding_row, 1
        if inputs is not None:
            count = len(inputs.positions)
            cut = cut_into_tiles(inputs.rows, inputs.query_lens, inputs.seq_lens)
            tokens[:, :count] = inputs.token_rows, inputs.positions, cut.token_rows
            tiles[:, : cut.arrays.shape[1]] = cut.arrays
        return np.concatenate((tokens.ravel(), tiles.ravel()))

    def capture(self) -> float:
        """Compile and record every bucket. Touches the null block only. Returns the seconds that recording took."""
        self.graphs, self.results, seconds = record(self.compute, self.buckets)
        return seconds

    def compute(self, size: int) -> Tensor:
        """Hidden states (size, E) of the step whose integers lie in `inputs[size]`."""
        cache, integers = self.kv_caches[0], self.inputs[size]
        token_rows, positions, places = integers[: 3 * size].view(3, size).unbind(0)
        tiles = integers[3 * size :].view(4, -1)
        input_ids = self.rows.token_ids[token_rows, positions]
        slots = slot_mapping(self.rows.block_table, token_rows, positions, cache.block_size)
        prefill = prefill_metadata(tiles, places, self.rows.block_table, self.rows.block_index, cache.block_size)
        return self.forward(input_ids, positions, self.kv_caches, FlexMetadata(slots, None, prefill, 0))

    def run(self, inputs: StepInputs) -> Tensor:
        """Hidden states (T, E) of a step that `fits`."""
        count = len(inputs.positions)
        size = next(size for size in self.buckets if size >= count)
        self.inputs[size].copy_(upload(self.pack(size, inputs), self.rows.device), non_blocking=True)
        if self.use_graphs:
            self.graphs[size].replay()
        else:
            self.results[size] = self.compute(size)
        return self.results[size][:count]


# Without a graph


def ungraphed_metadata(inputs: StepInputs, slots: Tensor, rows: RowTensors, cache: PagedAttention, shape: ModelConfig,
                       max_num_seqs: int) -> FlexMetadata:
    """What the compiled attention has to know of a step of any shape, slots (T,): decodes padded to a bucket, prompts cut into
    tiles.
    """
    count, decode, prefill, group = inputs.num_decodes, None, None, shape.num_attention_heads // shape.num_key_value_heads
    if count:
        # Padded to a bucket here as well: one compiled kernel for each bucket, and not for each number of decodes.
        padded = np.zeros((2, bucket_of(count, max_num_seqs)), dtype=np.int64)
        padded[0], padded[0, :count], padded[1, :count] = rows.padding_row, inputs.rows[:count], inputs.positions[:count]
        index, positions = upload(padded, rows.device)
        table = rows.block_table[index]
        last = ends(positions.int(), table, cache.block_size)
        decode = decode_metadata(last, table, cache.block_size, cache.key_cache.shape[1], group)
    if count < len(inputs.rows):
        tiles = cut_into_tiles(inputs.rows[count:], inputs.query_lens[count:], inputs.seq_lens[count:])
        arrays, token_rows = upload(tiles.arrays, rows.device), upload(tiles.token_rows, rows.device)
        prefill = prefill_metadata(arrays, token_rows, rows.block_table, rows.block_index, cache.block_size)
    return FlexMetadata(slots, decode, prefill, count)
