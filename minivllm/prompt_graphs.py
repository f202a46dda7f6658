"""Lesson 14. Short prompts as CUDA graphs too: a step that joins a request to the batch should not cost ten decode steps.

Owns the fixed addresses of a step with prompts in it, one graph per number of tokens, and the padding between. The GPU needs 1 ms
for 64 tokens of a 0.5B model and the host 16 ms to launch the kernels one by one. Beyond the largest bucket the GPU is the slower
of the two again, and the step runs without a graph.

How many of a step's tokens are decodes is not known to a graph, so all of them may be: the kernel for decodes gets every token
that could be one, and the other kernel the tiles of all prompts. Each token then takes what it is told to take.

    2 decodes, prompts of 3 and 290 tokens    -> bucket 320: 25 padded tokens
    kernel for decodes, room for 256          d d . . . . . .  ...     254 look at the null block, and nobody looks at them
    tiles of 64 queries                       ppp | pppp | pppp | pppp | pppp | pp | . | . ...
    places                                    0 1 | 256 257 258 | 320 321 322 ...

Also owns what attention is told where there is no graph.

vLLM captures mixed steps piecewise, attention left out; here it is inside, because its kernels are compiled for any mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import PagedAttention, slot_mapping
from minivllm.config import ModelConfig
from minivllm.cuda_graphs import bucket_of, bucket_sizes, record
from minivllm.flex_attention import QUERY_TILE, FlexMetadata, cut_into_tiles, decode_metadata, ends, prefill_metadata
from minivllm.input_batch import RowTensors, StepInputs
from minivllm.transfers import upload, upload_into

TOKEN_BUCKETS = (*range(32, 193, 32), 256, 320, 384, 512, *range(768, 2049, 256), 2560, 3072, 4096, 5120, 6144, 8192)
MOST_PROMPTS = 32  # in a step of up to 3,072 tokens. Each may need one tile more than its tokens fill, and idle tiles cost time
# Tokens times parameters. A step of less takes the GPU less time, 12 ms for 512 tokens of 7B or 8,192 of 0.5B, than the host to
# launch its kernels one by one, some 16, and 31 on a slow host.
HOST_BOUND_FLOPS = 4_100_000_000_000
NOTHING = np.zeros(0, dtype=np.int64)
NOBODYS = StepInputs(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, 0, NOTHING.astype(bool), NOTHING)  # a step of nobody


def token_buckets(budget: int, num_parameters: int) -> list[int]:
    """Numbers of tokens to capture: so few that the host would be the bottleneck, and none beyond the budget of a step. A small
    budget is the last of them, since many steps fill it.
    """
    most = min(TOKEN_BUCKETS[-1], HOST_BOUND_FLOPS // num_parameters)
    return [size for size in TOKEN_BUCKETS if size <= min(budget - 1, most)] + [budget] * (budget <= most)


class PromptGraphs:
    """Captured steps with prompts. What `run` returns stays valid until the next run.

    A graph has one input, an array of integers: 3 for each token, 2 for each decode that there is room for, 4 for each tile, and
    which tokens sample. One upload fills it. Everything else that a step reads lies in the rows already. The hidden states of the
    tokens that sample go to `states` (max_num_seqs, E), where the head finds them (`DecodeGraphs.run_head`).
    """

    def __init__(self, forward: Callable[..., Tensor], kv_caches: Sequence[PagedAttention], rows: RowTensors, shape: ModelConfig,
                 buckets: list[int], states: Tensor, *, use_graphs: bool = True) -> None:
        self.forward = forward
        self.states = states
        self.kv_caches = kv_caches
        self.rows = rows
        self.shape = shape
        self.use_graphs = use_graphs
        decodes = bucket_sizes(rows.padding_row)  # of the same sizes as in pure decode steps, whose kernels are compiled
        self.most_prompts = {size: max(MOST_PROMPTS, size // 96) for size in buckets}  # as of users who share a prefix
        self.most_decodes = {size: max((most for most in decodes if most <= size), default=0) for size in buckets}
        self.inputs = {size: torch.from_numpy(self.pack(size)).to(rows.device) for size in buckets}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.results: dict[int, Tensor] = {}

    def bucket_for(self, inputs: StepInputs) -> int | None:
        """The smallest graph with room for all tokens, decodes and prompts of a step; None if there is none."""
        num_prompts = len(inputs.rows) - inputs.num_decodes  # each of many may need a tile, however few its tokens
        return next((size for size, most in self.most_decodes.items() if size >= len(inputs.positions)
                     and most >= inputs.num_decodes and num_prompts <= self.most_prompts[size]), None)

    def pack(self, size: int, inputs: StepInputs = NOBODYS) -> np.ndarray:
        """A step's integers in one array: each token's row, position and place, each decode's row and position, the tiles, and
        which tokens sample, if each request has at most one.
        """
        most, num_tiles, padding = self.most_decodes[size], -(-size // QUERY_TILE) + self.most_prompts[size], self.rows.padding_row
        tokens, tiles = np.zeros((3, size), dtype=np.int32), np.zeros((4, num_tiles), dtype=np.int32)
        tokens[0], tiles[0], tiles[3] = padding, padding, 1
        arrays, places = tiles_and_places(inputs, most)
        tokens[:, : len(places)] = inputs.token_rows, inputs.positions, places
        tiles[:, : arrays.shape[1]] = arrays
        sampling = inputs.sampling_tokens[: len(self.states)].astype(np.int32)
        sampling = np.pad(sampling, (0, len(self.states) - len(sampling)))
        return np.concatenate((tokens.ravel(), padded_decodes(inputs, most, padding).ravel(), tiles.ravel(), sampling))

    def capture(self) -> float:
        """Compile and record every bucket. Touches the null block only. Returns the seconds that recording took."""
        self.graphs, self.results, seconds = record(self.compute, list(self.inputs))
        return seconds

    def compute(self, size: int) -> Tensor:
        """Hidden states (size, E) of the step whose integers lie in `inputs[size]`."""
        cache, integers, most = self.kv_caches[0], self.inputs[size], self.most_decodes[size]
        sizes = [3 * size, 2 * most, len(integers) - 3 * size - 2 * most - len(self.states), len(self.states)]
        tokens, decodes, tiles, sampling = integers.split(sizes)
        token_rows, positions, places = tokens.view(3, size).unbind(0)
        input_ids = self.rows.token_ids[token_rows, positions]
        slots = slot_mapping(self.rows.block_table, token_rows, positions, cache.block_size)
        metadata = decodes_first(slots, decodes.view(2, most), most, self.rows, cache, self.shape)
        metadata.prefill = prefill_metadata(tiles.view(4, -1), self.rows.block_table, self.rows.block_index, cache.block_size)
        metadata.places = places.long()
        hidden = self.forward(input_ids, positions, self.kv_caches, metadata)
        self.states.copy_(hidden[sampling])
        return hidden

    def run(self, inputs: StepInputs, size: int) -> Tensor:
        """Hidden states (T, E) of a step that fits into the bucket of this size."""
        upload_into(self.inputs[size], self.pack(size, inputs))
        if self.use_graphs:
            self.graphs[size].replay()
        else:
            self.results[size] = self.compute(size)
        return self.results[size][: len(inputs.positions)]


def padded_decodes(inputs: StepInputs, most: int, padding_row: int) -> np.ndarray:
    """(2, most) int32: row and position of each decode of a step, behind them the padding row's."""
    decodes, count = np.zeros((2, most), dtype=np.int32), inputs.num_decodes
    decodes[0], decodes[:, :count] = padding_row, (inputs.rows[:count], inputs.positions[:count])
    return decodes


def tiles_and_places(inputs: StepInputs, most_decodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of a step's prompts (4, Q), and where each token stands in the answers (T,): first those of all decodes that
    there is room for, then the tiles'.
    """
    count = inputs.num_decodes
    if count == len(inputs.rows):
        return np.zeros((4, 0), dtype=np.int32), np.arange(count)
    tiles = cut_into_tiles(inputs.rows[count:], inputs.query_lens[count:], inputs.seq_lens[count:], count)
    return tiles.arrays, np.concatenate((np.arange(count), most_decodes + tiles.token_rows))


def decodes_first(slots: Tensor, decodes: Tensor, num_decodes: int, rows: RowTensors, cache: PagedAttention,
                  shape: ModelConfig) -> FlexMetadata:
    """What attention has to know of a step's decodes, rows and positions (2, B) int32. Nothing of its prompts yet."""
    if not num_decodes:
        return FlexMetadata(slots, None, None, 0)
    index, positions = decodes.unbind(0)
    table, group = rows.block_table[index], shape.num_attention_heads // shape.num_key_value_heads
    last = ends(positions, table, cache.block_size)
    decode = decode_metadata(last, table, cache.block_size, cache.key_cache.shape[1], group)
    return FlexMetadata(slots, decode, None, num_decodes)


# Without a graph


def ungraphed_metadata(inputs: StepInputs, slots: Tensor, rows: RowTensors, cache: PagedAttention, shape: ModelConfig,
                       max_num_seqs: int) -> FlexMetadata:
    """What the compiled attention has to know of a step of any shape, slots (T,): decodes padded to a bucket, prompts cut into
    tiles.
    """
    count = inputs.num_decodes
    # Padded to a bucket here as well: one compiled kernel for each bucket, and not for each number of decodes.
    padded = padded_decodes(inputs, bucket_of(count, max_num_seqs), rows.padding_row)
    metadata = decodes_first(slots, upload(padded, rows.device), count, rows, cache, shape)
    if count < len(inputs.rows):
        arrays, metadata.places = (upload(array, rows.device) for array in tiles_and_places(inputs, count))
        metadata.prefill = prefill_metadata(arrays, rows.block_table, rows.block_index, cache.block_size)
    return metadata
