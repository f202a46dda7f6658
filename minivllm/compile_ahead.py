"""Lesson 14. On a first start two processes compile the sampler and the attention of decodes, while this one compiles the model.

Owns those processes. torch.compile makes one function at a time, and most of it is Python: a second thread would only wait for the
first. Another process puts what it makes into the same folder (compile_cache.py), and when this one comes to it, torch finds it
there. Half of all compiling is theirs.

    this process     importing | rows, model ................. | found: attention | sampler | capturing
    attention        torch | importing | .............. |
    sampler          torch | importing | .................. |

These two, because a few numbers say all that their kernels are made from: the model's layers would need weights a second time.
torch finds a function again by what it does and by shape, strides and dtype of every argument, by which of the sizes may vary, and
by its own options. So the others have to ask for it exactly as this process will; one number off, and it is compiled twice.

Nothing depends on them but time. What fails, is late or finds no memory is compiled here. The second start finds everything, and
nobody is launched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivllm.attention import allocate_kv_cache
from minivllm.compile_cache import CompileCache, wished_folder, writable_folder
from minivllm.compiled_model import compiling, first_half
from minivllm.config import EngineConfig, ModelConfig
from minivllm.cuda_graphs import DecodeGraphs, bucket_sizes
from minivllm.flex_attention import FlexPagedAttention, num_splits
from minivllm.graph_sampler import SamplerGraphs
from minivllm.input_batch import RowTensors
from minivllm.memory import kv_bytes_per_block
from minivllm.model import DecoderLayer, RotaryEmbedding
from minivllm.profile_run import GIB, SAMPLER_COPIES, MemorySum, NoAttention
from minivllm.prompt_graphs import NOBODYS, decodes_first, padded_decodes
from minivllm.threads import cpu_quota
from minivllm.transfers import upload
from minivllm.version import __version__

logger = logging.getLogger("minivllm")
CORES_EACH = 4  # a compiler wants one, and each of its workers: on few cores three would only take turns
PATIENCE_SECONDS = 60.0  # how long to wait for each when all else is compiled: as long as its part may take here


@dataclass(frozen=True)
class Shapes:
    """All that the kernels are made from."""

    model: ModelConfig
    max_num_seqs: int  # of these sizes some are constants in a kernel, and of others it knows that they are none
    max_model_len: int
    num_blocks: int
    block_size: int
    dtype: str  # as in the config: what goes to another process is JSON
    device: str

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig) -> Shapes:
        """Those of an engine whose sizes are decided."""
        known: dict[str, Any] = {name: getattr(config, name) for name in cls.__annotations__ if name != "model"}
        return cls(model, **known)

    def done_file(self, part: str) -> Path:
        """It is there once this part has been compiled on this machine. Raises `OSError` or `RuntimeError` without a folder."""
        made_from = json.dumps([asdict(self), torch.__version__, __version__])
        return Path(wished_folder() or writable_folder()) / f"{part}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"

    def num_bytes(self, part: str) -> int:
        """What a process takes of the GPU beside this one: CUDA itself, half a GiB, and what it computes on.

        torch.compile runs what it has compiled, so there have to be logits and a cache of their true size. One layer's will do.
        """
        if part == "sampler":
            return GIB + (SAMPLER_COPIES + 2) * self.max_num_seqs * self.model.vocab_size * 4
        block_bytes = kv_bytes_per_block(self.model, self.block_size, getattr(torch, self.dtype))
        return GIB + self.num_blocks * block_bytes // self.model.num_hidden_layers

    def make_rows(self) -> RowTensors:
        """As the engine has them, all empty."""
        return RowTensors(self.max_num_seqs, self.max_model_len, self.num_blocks, self.block_size, torch.device(self.device))


# In the other processes


@torch.inference_mode()
def compile_sampler(shapes: Shapes) -> None:
    """Call all that a warm-up calls behind a decode step, on rows that are nobody's.

    On the largest batch, as a warm-up does first: tiles are chosen by the first size that torch.compile sees.
    """
    size, on_gpu = shapes.max_num_seqs, torch.device(shapes.device).type == "cuda"
    nobody: Any = None  # neither model nor KV
    decodes = DecodeGraphs(nobody, nobody, [], shapes.make_rows(), size, use_graphs=False, use_compile=on_gpu)
    samplers = SamplerGraphs(decodes)
    logits = torch.zeros(size, shapes.model.vocab_size, dtype=getattr(torch, shapes.dtype), device=shapes.device)
    decodes.results[size] = logits, decodes.sample(logits, decodes.index)
    for by_mass in (False, True):
        samplers.compute(size, by_mass)


@torch.inference_mode()
def compile_attention(shapes: Shapes) -> None:
    """Decodes of every bucket that has a kernel of its own.

    The smallest first: it takes the longest, its many parts being written out, and the engine asks for it early.
    """
    model, rows, dtype = shapes.model, shapes.make_rows(), getattr(torch, shapes.dtype)
    num_kv_heads = model.num_key_value_heads
    with torch.inference_mode(False):  # as the engine's: of one layer here, but no kernel can tell
        cache = FlexPagedAttention(allocate_kv_cache(1, shapes.num_blocks, shapes.block_size, num_kv_heads, model.head_dim, dtype,
                                                     shapes.device)[0], shapes.block_size)
    for size in bucket_sizes(shapes.max_num_seqs):
        if num_splits(size, num_kv_heads) > 1:
            decodes = upload(padded_decodes(NOBODYS, size, rows.padding_row), rows.device)
            metadata = decodes_first(decodes[0], decodes, size, rows, cache, model)
            cache.attend(queries(model, size, dtype, shapes.device), metadata)


def queries(model: ModelConfig, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Queries (B, H, D) as a layer makes them.

    They are a part of what it has computed for queries and keys together, so their strides are not those of a tensor made for them.
    A layer on the device "meta", which has shapes and no numbers, says which.
    """
    layer = DecoderLayer(model, dtype, "meta")
    cos, sin = RotaryEmbedding(model, "meta")(torch.zeros(size, device="meta"), dtype)
    q = first_half(size)(layer, torch.zeros(size, model.hidden_size, dtype=dtype, device="meta"), cos, sin, NoAttention(), None)
    return torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=device)  # to be copied there would close the gaps


PARTS = {"sampler": compile_sampler, "attention": compile_attention}


def main(part: str, argument: str) -> None:
    """One of the other processes."""
    sizes = json.loads(argument)
    shapes = Shapes(ModelConfig(**sizes.pop("model")), **sizes)
    done_file = shapes.done_file(part)
    CompileCache()
    with compiling():
        PARTS[part](shapes)
    done_file.parent.mkdir(parents=True, exist_ok=True)
    done_file.touch()


# In this one


def most_processes() -> int:
    """How many there may be beside this one, by the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, int(min(cores, cpu_quota() or math.inf)) // CORES_EACH - 1)


def worthwhile(config: EngineConfig, shapes: Shapes, memory: MemorySum | None) -> list[str]:
    """The parts that will be needed, were not done before, and have cores, and room beside what this engine may fill. Without a sum
    of a GPU's memory nobody knows how much that is.
    """
    if config.attention_backend != "flex_attention" or config.enforce_eager or memory is None:
        return []
    room, parts = memory.total - memory.usable, []
    try:
        for part in list(PARTS)[: most_processes()]:
            if not shapes.done_file(part).exists() and room >= shapes.num_bytes(part):
                parts.append(part)
                room -= shapes.num_bytes(part)
    except (OSError, RuntimeError):
        return []  # no folder: nothing would be found
    return parts


@contextmanager
def compiled_ahead(config: EngineConfig, model: ModelConfig, memory: MemorySum | None) -> Iterator[Callable[[str], None]]:
    """As long as this lasts, other processes compile parts of this engine, where that is worthwhile. Yields a function that waits
    until a part is done.
    """
    shapes = Shapes.of(config, model)
    processes = {part: launch(part, shapes) for part in worthwhile(config, shapes, memory)}

    def wait_for(part: str) -> None:
        if process := processes.get(part):
            try:
                status = process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                status = -1
            if status:  # -1 after all this time
                logger.info("%s was not compiled ahead (exit status %d): it is compiled here", part, status)

    try:
        yield wait_for
    finally:
        for process in filter(None, processes.values()):
            process.kill()  # where a start has failed it must not keep its memory; one that has ended does not mind
            process.wait()


def launch(part: str, shapes: Shapes) -> subprocess.Popen[bytes] | None:
    """Another process, which imports from where this one does. None if the system has no room for it."""
    command = [sys.executable, "-P", "-m", "minivllm.compile_ahead", part, json.dumps(asdict(shapes))]
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing,
                                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    except OSError as error:
        logger.info("%s is not compiled ahead: %s", part, error)
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
