"""Lesson 14. Decode steps as CUDA graphs: some 300 kernels are launched by one call, and the host stops being the bottleneck.

Owns the fixed addresses that a graph reads and writes, one graph per bucket of batch sizes, and the padding between. Knows no
request: a step is token ids, positions and block tables. Only pure decode steps run here; a step with a prompt in it has a shape
of its own and runs without a graph.

    3 requests -> bucket 4:   input_ids  [17, 4, 99, 0]    positions [12, 80, 7, 0]    a padded row lives in the null block

vLLM: vllm/v1/worker/gpu/cudagraph_utils.py, and its FULL_DECODE_ONLY mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import PagedAttention
from minivllm.flex_attention import make_decode_metadata
from minivllm.model import Qwen2ForCausalLM
from minivllm.sampler import sample
from minivllm.sampling_metadata import RowParams, SamplingMetadata
from minivllm.sampling_params import SamplingParams

WARM_UP_RUNS = 2  # the first compiles, the second runs what was compiled
COMPILED_SHAPES = 64  # torch.compile gives a function up after 8 shapes unless told otherwise; there is one per bucket


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, so that every batch of 1..max_num_seqs fits one: 1, 2, 4, 8, 16, 32, 64, then steps of 64."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < max_num_seqs]
    return [*sizes, *range(128, max_num_seqs, 64), max_num_seqs]


def compile_layers(model: Qwen2ForCausalLM) -> None:
    """Compile the decoder layer once, for any number of tokens, and use it in every layer: the weights are inputs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    for layer in model.model.layers:
        layer.compile(dynamic=True)


class DecodeGraphs:
    """Captured decode steps. After `run`, `logits` and `token_ids` hold the bucket's results until the next run."""

    def __init__(self, model: Qwen2ForCausalLM, kv_caches: Sequence[PagedAttention], max_num_seqs: int, max_blocks: int) -> None:
        self.model = model
        self.kv_caches = kv_caches
        self.buckets = bucket_sizes(max_num_seqs)
        device = kv_caches[0].key_cache.device
        self.input_ids = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        plain = [RowParams(SamplingParams(), 0, 1)] * max_num_seqs
        self.sampling = SamplingMetadata.from_requests(plain, model.config.vocab_size, device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.logits: dict[int, Tensor] = {}
        self.token_ids: dict[int, Tensor] = {}
        # One more compiled function, because drawing from a vocabulary of 151,936 is a dozen passes over it otherwise.
        self.sample = torch.compile(sample, dynamic=False)

    def capture(self) -> None:
        """Compile and record every bucket, the largest first so that the others reuse its memory. Touches the null block only."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.buckets):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self.compute(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.logits[size], self.token_ids[size] = self.compute(size)
            self.graphs[size] = graph

    def compute(self, size: int) -> tuple[Tensor, Tensor]:
        """One decode step of the first `size` rows, as it is captured: logits (B, V) and a token (B,) for each."""
        cache, positions = self.kv_caches[0], self.positions[:size]
        group = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        metadata = make_decode_metadata(positions, self.block_table[:size], cache.block_size, cache.key_cache.shape[1], group)
        hidden = self.model(self.input_ids[:size], positions, self.kv_caches, metadata)  # (B, E)
        logits = self.model.compute_logits(hidden)  # (B, V)
        moved = replace(self.sampling.rows(slice(0, size)), positions=positions.long() + 1)
        return logits, self.sample(logits, moved)

    def bucket_of(self, num_requests: int) -> int:
        """The smallest bucket that holds this many requests."""
        return next(size for size in self.buckets if size >= num_requests)

    def set_sampling(self, metadata: SamplingMetadata) -> None:
        """Put the temperatures and seeds of a new batch where the graphs read them."""
        count = len(metadata.seeds)
        self.sampling.temperature[:count].copy_(metadata.temperature)
        self.sampling.seeds[:count].copy_(metadata.seeds)

    def run(self, token_ids: np.ndarray, positions: np.ndarray, block_table: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and plainly sampled tokens (B,) of one step: token_ids, positions (B,), block_table (B, blocks)."""
        count = len(token_ids)
        size = self.bucket_of(count)
        # Padded rows must not keep what an earlier, larger batch left: they would write into blocks of somebody else.
        inputs = np.zeros((2, size), dtype=np.int32)
        inputs[0, :count], inputs[1, :count] = token_ids, positions
        table = np.zeros((size, block_table.shape[1]), dtype=np.int32)
        table[:count] = block_table
        staged = torch.from_numpy(inputs).pin_memory().to(self.input_ids.device, non_blocking=True)
        self.input_ids[:size].copy_(staged[0])
        self.positions[:size].copy_(staged[1])
        self.block_table[:size, : table.shape[1]].copy_(torch.from_numpy(table).pin_memory(), non_blocking=True)
        self.graphs[size].replay()
        return self.logits[size][:count], self.token_ids[size][:count]
