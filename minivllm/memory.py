"""How many blocks the KV cache has, and what to say when memory runs out at a start.

Owns the division of what is there by what a block takes. How much is there: on a CPU a quarter of the free memory, on a GPU what
`profile_run` has found to be left.

    available // block_bytes = num_blocks, the null block among them
    4 GiB     // 786,432     = 5,461          Qwen2.5-0.5B in bfloat16: blocks of 64 x 12,288 bytes (lesson 1)

A pool is never larger than its requests could fill: on a small model most of the memory stays free for others. vLLM takes all
that `gpu_memory_utilization` allows, and keeps it for prefixes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minivllm.config import EngineConfig, ModelConfig
from minivllm.exceptions import NotEnoughMemoryError
from minivllm.profile_run import GIB, MemorySum

CPU_SHARE_OF_FREE_MEMORY = 0.25
# Phase of a start -> the knob to turn first, and all that helps.
LESS = {
    "weights": ("dtype", "take a smaller dtype or model"),
    "profile run": ("max_num_batched_tokens", "lower max_num_batched_tokens or max_num_seqs, or take a smaller dtype or model"),
    "KV pool": ("gpu_memory_utilization", "lower num_blocks or kv_cache_memory_bytes if given, else gpu_memory_utilization"),
    "compiling": ("gpu_memory_utilization", "lower gpu_memory_utilization or max_num_seqs, or set enforce_eager=True"),
}


def kv_bytes_per_block(model_config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers, keys and values."""
    heads = model_config.num_hidden_layers * model_config.num_key_value_heads
    return 2 * heads * model_config.head_dim * dtype.itemsize * block_size


def decide_num_blocks(config: EngineConfig, block_bytes: int, block_size: int, longest: int, memory: MemorySum | None) -> int:
    """How many blocks the memory holds, at most what `max_num_seqs` requests of full length could use."""
    most = config.max_num_seqs * -(-longest // block_size) + 1
    available = config.kv_cache_memory_bytes or (host_bytes() if memory is None else memory.for_kv)
    num_blocks = min(most, available // block_bytes)
    if num_blocks < 2:
        raise NotEnoughMemoryError(
            f"no room for the KV cache: one block of {block_size} tokens takes {block_bytes:,} bytes, and {available:,} are there"
            f"{f' ({memory.describe(0)})' if memory else ''}. Free memory that other processes use, raise gpu_memory_utilization, "
            "lower max_num_batched_tokens, max_num_seqs or block_size, or take a smaller model or dtype.",
            parameter="kv_cache_memory_bytes" if config.kv_cache_memory_bytes else "gpu_memory_utilization")
    return num_blocks


def host_bytes() -> int:
    """Bytes that the KV cache may take on a CPU: a quarter of the free memory."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = 4 * GIB
    return int(free * CPU_SHARE_OF_FREE_MEMORY)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, here or in what led here: compiler and capture raise errors of their own on the way up."""
    if error is None or isinstance(error, NotEnoughMemoryError | torch.OutOfMemoryError):
        return error is not None
    is_one = "out of memory" in str(error) or "can't allocate memory" in str(error)  # in CUDA's words, and in the CPU's
    return is_one or is_out_of_memory(error.__cause__ or error.__context__)


def out_of_memory(phase: str, config: EngineConfig) -> NotEnoughMemoryError:
    """The error that says when memory ran out, how much is there when all is given back, and what to change."""
    parameter, way_out = LESS.get(phase, LESS["compiling"])
    there = ""
    if torch.cuda.is_available():
        free, total = (size / GIB for size in torch.cuda.mem_get_info())
        there = f" The GPU has {total:.1f} GiB, and without this engine {free:.1f} of them are free."
    message = f"out of memory at start, in phase {phase!r} (gpu_memory_utilization={config.gpu_memory_utilization}).{there} "
    return NotEnoughMemoryError(f"{message}To get by with less, {way_out}; or end what else uses the memory.", parameter=parameter)
