"""Lesson 14's counters: what the host asks the device for in one decode step, counted on any machine.

Owns counting and a stand-in. On a GPU every operation that writes a tensor launches a kernel, or a few; here torch's dispatcher
says which operations those are. Runs the package's own step, on a model with all layers of a published shape and narrow ones.

    step = DecodeStep(layers=24, num_requests=3)       plain model, paged KV and the rows of a CUDA graph, on a CPU
    launches(step.run)                                 Counter of operations that write; views and empty tensors are left out
    step.count_regions()                               into how many calls compiled_model.py cuts the same step
    recorded("h200-0.5b-anatomy.json")                 a file of the ledger
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minivllm.attention import AttentionMetadata, PagedAttention, allocate_kv_cache
from minivllm.bench.shapes import SHAPES
from minivllm.compiled_model import CompiledModel
from minivllm.config import ModelConfig
from minivllm.cuda_graphs import DecodeGraphs, bucket_of
from minivllm.input_batch import RowTensors
from minivllm.model import Qwen2ForCausalLM
from minivllm.weights import load_dummy_model

NOTHING_TO_RUN = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh", "_local_scalar_dense")
NARROW = {"hidden_size": 56, "intermediate_size": 64, "vocab_size": 512, "max_position_embeddings": 512}  # 14 heads of 4 numbers
BLOCK_SIZE, BLOCKS_PER_ROW = 16, 4


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NOTHING_TO_RUN):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def launches(function: Callable[[], Any]) -> Counter[str]:
    """How often each operation that writes a tensor is dispatched while `function()` runs."""
    with _Counting() as counting:
        function()
    return counting.found


def narrow_model(layers: int) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B with so many layers and few numbers in each: as many operations, and random weights."""
    return load_dummy_model(ModelConfig.from_dict(SHAPES["qwen2.5-0.5b"] | NARROW | {"num_hidden_layers": layers}), "float32")


class Replay:
    """Stands in for a CUDA graph: one call, behind which the device does the whole step by itself."""

    def __init__(self, compute: Callable[[], tuple[Tensor, Tensor]], keep: Callable[[tuple[Tensor, Tensor]], None]) -> None:
        self.compute, self.keep, self.num_replays = compute, keep, 0

    def replay(self) -> None:
        self.num_replays += 1
        with _disable_current_modes():  # what the device does by itself is nobody's launch
            self.keep(self.compute())


class ReadableCache(PagedAttention):
    """The readable attention, written as a compiled layer does: all heads at once, those of queries first, which nobody keeps."""

    def write_heads(self, heads: Tensor, slot_mapping: Tensor) -> None:
        """Put keys and values, the last 2K of heads (T, H + 2K, D), into their slots."""
        k, v = heads[:, -2 * len(self.key_cache) :].chunk(2, dim=1)
        self.write(k, v, slot_mapping)


class DecodeStep:
    """Requests in the middle of their answers: row i is at position 20 + i, in blocks 1 + 4i .. 4 + 4i of a pool."""

    def __init__(self, layers: int = 24, num_requests: int = 3, max_num_seqs: int = 8) -> None:
        self.model, self.rows_used = narrow_model(layers), np.arange(num_requests)
        config, num_blocks = self.model.config, 1 + max_num_seqs * BLOCKS_PER_ROW
        self.kv = allocate_kv_cache(layers, num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.kv.zero_()
        self.rows = RowTensors(max_num_seqs, BLOCKS_PER_ROW * BLOCK_SIZE, num_blocks, BLOCK_SIZE, torch.device("cpu"))
        for row in range(max_num_seqs):
            first = 1 + row * BLOCKS_PER_ROW
            self.rows.block_table[row] = torch.arange(first, first + BLOCKS_PER_ROW)
            self.rows.positions[row] = 20 + row
        self.graphs = DecodeGraphs(self.model, self.forward, [PagedAttention(layer, BLOCK_SIZE) for layer in self.kv], self.rows,
                                   max_num_seqs, use_graphs=False, use_compile=False)
        self.prepared = self.inputs()

    def forward(self, ids: Tensor, positions: Tensor, kv_caches: Any, metadata: Any) -> Tensor:
        """The plain model on what a captured step is given: the readable attention wants plain lengths and tables."""
        return self.model(ids, positions, kv_caches, self.readable(positions, metadata))

    def readable(self, positions: Tensor, metadata: Any) -> AttentionMetadata:
        table = metadata.decode.block_mask.kv_indices[:, 0, 0]  # (B, blocks)
        lens = (positions + 1).tolist()
        plain = AttentionMetadata.build([1] * len(lens), lens, table.tolist(), BLOCK_SIZE)
        return replace(plain, slot_mapping=metadata.slot_mapping)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """The sampled tokens of one step (B,); every row moves on by a position."""
        return self.graphs.run(self.rows_used)[1]

    def plain(self) -> Tensor:
        """The model alone, one operation after the other: ids to logits (B, V)."""
        return self.model.compute_logits(self.model(*self.prepared))

    def count_regions(self) -> Counter[str]:
        """How many functions the compiled model calls in one step of several tokens, by name."""
        calls: Counter[str] = Counter()

        def counted(name: str, function: Any) -> Any:
            return lambda *args: (calls.update([name]), function(*args))[1]

        with torch.compiler.set_stance("force_eager"), torch.inference_mode():
            compiled: Any = CompiledModel(self.model)
            for name in ("opening", "between", "closing"):
                setattr(compiled, name, counted(name, getattr(compiled, name)))
            caches: list[Any] = [ReadableCache(layer, BLOCK_SIZE) for layer in self.kv]
            for cache in caches:
                cache.attend = counted("attention", cache.attend)
            ids, positions, _, metadata = self.inputs()
            compiled(ids, positions, caches, metadata)
        return calls

    def inputs(self) -> tuple[Tensor, Tensor, Any, AttentionMetadata]:
        """Ids, positions, caches and metadata of the rows' next step, for a model that is called by hand."""
        count = len(self.rows_used)
        positions = self.rows.positions[:count].long()
        tables = self.rows.block_table[:count].tolist()
        metadata = AttentionMetadata.build([1] * count, (positions + 1).tolist(), tables, BLOCK_SIZE)
        return torch.zeros(count, dtype=torch.long), positions, self.graphs.kv_caches, metadata

    def use_stand_in(self) -> Replay:
        """From now on `run` replays, as it does on a GPU; returns what counts the replays."""
        size = bucket_of(len(self.rows_used), self.graphs.max_num_seqs)
        replay = Replay(lambda: self.graphs.compute(size), lambda result: self.graphs.results.update({size: result}))
        self.graphs.use_graphs = True
        self.graphs.graphs[size] = replay  # type: ignore[assignment]
        return replay


def recorded(name: str) -> dict[str, Any]:
    """A file of docs/ledger, from the clone in which one stands. Raises `FileNotFoundError` outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        file = folder / "docs" / "ledger" / name
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"docs/ledger/{name} is not here: run this in a clone of minivllm")
