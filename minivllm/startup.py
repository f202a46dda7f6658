"""Everything that is decided once, before the first request: device, dtype, lengths, the size of the KV pool, EOS, defaults.

Owns the order of a start and the report that says what was decided and why. The rules are plain arithmetic and stand in
`decide_*` functions, so that the report's sum can be checked by hand:

    KV bytes a block = 2 (K and V) x layers x KV heads x head size x bytes of the dtype x block size
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.config import EngineConfig, ModelConfig
from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.generation_config import GenerationDefaults, read_generation_config
from minivllm.model_runner import ModelRunner
from minivllm.weights import load_dummy_model, load_model, resolve_dtype, resolve_model

logger = logging.getLogger("minivllm")
GIB = 2**30
CPU_SHARE_OF_FREE_MEMORY = 0.25


@dataclass
class Started:
    """What a start hands to the engine."""

    config: EngineConfig  # nothing left None that the engine needs
    model_config: ModelConfig
    tokenizer: Any | None
    defaults: GenerationDefaults
    chat_template: str | None
    runner: ModelRunner
    report: str


def start(config: EngineConfig) -> Started:
    """Find and load the checkpoint, size the pool, build the runner. Raises `CheckpointError` or `ValidationError`."""
    configure_logging()
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    folder = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(folder, config, model_config.vocab_size)
    seconds["tokenizer"] = time.perf_counter() - began
    device = decide_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config, device)
    is_dummy = config.load_format == "dummy"
    model = load_dummy_model(model_config, dtype, device, config.seed) if is_dummy else load_model(folder, dtype, device)
    seconds["weights"] = time.perf_counter() - began - seconds["tokenizer"]
    config = decide_sizes(config, model_config, dtype, device)
    runner = ModelRunner(model, config, device, tokenizer)
    seconds["KV pool"] = time.perf_counter() - began - sum(seconds.values())
    runner.warm_up()
    seconds["compiling"] = time.perf_counter() - began - sum(seconds.values())
    defaults = read_generation_config(folder, config.generation_config, tokenizer)
    template = load_chat_template(config.chat_template) or getattr(tokenizer, "chat_template", None)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    report = write_report(config, model_config, dtype, weight_bytes, defaults, template, folder, seconds)
    logger.info("%s", report)
    return Started(config, model_config, tokenizer, defaults, template, runner, report)


def configure_logging() -> None:
    """Show minivllm's own messages unless the program has set up logging itself (as vLLM does)."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(os.environ.get("MINIVLLM_LOGGING_LEVEL", "INFO").upper())


def load_tokenizer(folder: Path, config: EngineConfig, vocab_size: int) -> Any:
    """The folder's tokenizer by transformers. No code from the checkpoint is ever executed."""
    from transformers import AutoTokenizer

    source = config.tokenizer or str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"no usable tokenizer in {source}: {error}. Pass tokenizer=..., or skip_tokenizer_init=True to work "
                              "with token ids only") from error
    if len(tokenizer) > vocab_size:
        raise CheckpointError(f"the tokenizer in {source} knows {len(tokenizer)} tokens, the model only {vocab_size}: they don't "
                              "belong together. Pass the model's own tokenizer")
    return tokenizer


def load_chat_template(given: str | None) -> str | None:
    """A chat template from a file, or the template itself when it holds Jinja's braces."""
    if given is None or "{" in given:
        return given
    if not Path(given).is_file():
        raise ValidationError(f"chat_template {given!r} is neither a file nor a Jinja template", parameter="chat_template",
                              value=given)
    return Path(given).read_text(encoding="utf-8")


def decide_device(asked: str) -> torch.device:
    """"auto" is CUDA when there is one."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValidationError(f"device must be auto, cpu or cuda, got {asked!r}", parameter="device", value=asked) from error
    if device.type not in ("cpu", "cuda"):
        raise ValidationError(f"device must be auto, cpu or cuda, got {asked!r}", parameter="device", value=asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValidationError("device='cuda' was asked for and torch finds no CUDA device: use device='cpu'", parameter="device")
    return device


def kv_bytes_per_block(model_config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    per_token = 2 * model_config.num_hidden_layers * model_config.num_key_value_heads * model_config.head_dim * dtype.itemsize
    return per_token * block_size


def decide_sizes(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device) -> EngineConfig:
    """The same config with every size filled in.

    A max_model_len that nobody asked for is lowered to what the pool holds; one that was asked for stays.
    """
    on_gpu = device.type == "cuda"
    block_size = config.block_size or (64 if on_gpu else 16)
    longest = model_config.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValidationError(f"max_model_len={config.max_model_len} is beyond the {longest} positions that the model was made "
                              "for: lower it, or set rope_scaling (YaRN) in config.json", parameter="max_model_len",
                              value=config.max_model_len)
    max_model_len = config.max_model_len or longest
    block_bytes = kv_bytes_per_block(model_config, block_size, dtype)
    num_blocks = config.num_blocks or decide_num_blocks(config, block_bytes, block_size, max_model_len, device)
    pool_tokens = (num_blocks - 1) * block_size
    if config.max_model_len is None:
        max_model_len = min(max_model_len, pool_tokens + 1)  # the last token of a sequence needs no KV
    budget = config.max_num_batched_tokens or (8192 if on_gpu else 2048)
    if config.max_num_batched_tokens is None and not config.enable_chunked_prefill:
        budget = max(budget, max_model_len)  # without chunks the longest prompt must fit into one step
    backend = decide_attention_backend(config, model_config, dtype, device, block_size)
    return dataclasses.replace(config, device=str(device), dtype=str(dtype).removeprefix("torch."), block_size=block_size,
                               num_blocks=num_blocks, max_model_len=max_model_len, max_num_batched_tokens=budget,
                               attention_backend=backend,
                               # a CPU has nothing to overlap, and a trace is easier to read step by step
                               async_scheduling=(on_gpu and config.trace is None) if config.async_scheduling is None
                               else config.async_scheduling)


def decide_attention_backend(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device,
                             block_size: int) -> str:
    """"auto" is the compiled rung where its kernels exist and compiling is wanted; asked for elsewhere, it is refused by name."""
    sizes = (block_size, model_config.head_dim)
    has_kernel = device.type == "cuda" and dtype != torch.float64 and all(size in (16, 32, 64, 128, 256) for size in sizes)
    if config.attention_backend == "flex_attention" and not has_kernel:
        raise ValidationError(
            "attention_backend='flex_attention' needs CUDA, a dtype other than float64, and powers of two from 16 to 256 for "
            f"block_size and head size, got {device.type}, {dtype}, {block_size} and {model_config.head_dim}: use 'auto'",
            parameter="attention_backend", value=config.attention_backend)
    if config.attention_backend == "auto":
        return "flex_attention" if has_kernel and not config.enforce_eager else "paged_gather"
    return config.attention_backend


def decide_num_blocks(config: EngineConfig, block_bytes: int, block_size: int, max_model_len: int, device: torch.device) -> int:
    """How many blocks the memory holds, at most what `max_num_seqs` requests of full length could use."""
    most = config.max_num_seqs * -(-max_model_len // block_size) + 1
    available = config.kv_cache_memory_bytes or free_bytes(config, device)
    num_blocks = min(most, available // block_bytes)
    if num_blocks < 2:
        raise ValidationError(
            f"no room for the KV cache: one block of {block_size} tokens takes {block_bytes:,} bytes and {available:,} are there. "
            "Free memory, raise gpu_memory_utilization, lower block_size, or take a smaller model or dtype.",
            parameter="kv_cache_memory_bytes" if config.kv_cache_memory_bytes else "gpu_memory_utilization")
    return int(num_blocks)


def free_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the KV cache may take: a share of the GPU less what is in use, or a quarter of the host's free memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(config.gpu_memory_utilization * total) - (total - free))
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = 4 * GIB
    return int(free * CPU_SHARE_OF_FREE_MEMORY)


def resolved_sizes(config: EngineConfig) -> tuple[int, int, int]:
    """(num_blocks, block_size, max_model_len) of a config that a start has filled in."""
    sizes = (config.num_blocks, config.block_size, config.max_model_len)
    assert None not in sizes, "a started engine has decided its sizes"
    return sizes  # type: ignore[return-value]


def write_report(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, weight_bytes: int,
                 defaults: GenerationDefaults, template: str | None, folder: Path, seconds: dict[str, float]) -> str:
    """The start-up report: what was decided, in one place, once."""
    num_blocks, block_size, max_model_len = resolved_sizes(config)
    pool_tokens = (num_blocks - 1) * block_size
    pool_bytes = num_blocks * kv_bytes_per_block(model_config, block_size, dtype)
    lines = [
        f"checkpoint         {config.model or 'embedded toy model'} ({folder.name}), {config.dtype} on {config.device}",
        f"weights            {weight_bytes:,} bytes",
        f"KV cache           {num_blocks - 1:,} blocks x {block_size} slots = {pool_tokens:,} tokens, {pool_bytes:,} bytes",
        f"longest request    {max_model_len:,} tokens; {pool_tokens / max_model_len:.1f} of them fit at once "
        f"(max_num_seqs {config.max_num_seqs})",
        f"budget of a step   {config.max_num_batched_tokens:,} tokens; chunked prefill {_on(config.enable_chunked_prefill)}, "
        f"prefix cache {_on(config.enable_prefix_caching)}",
        f"attention          {config.attention_backend}",
        f"sampling defaults  {defaults.describe()}",
        "                   for HTTP fields left out and generate() without params; an explicit SamplingParams stands as it is",
        f"EOS ids            {', '.join(map(str, defaults.eos_token_ids)) or 'none: requests end by length or stop strings'}",
        f"chat template      {'found' if template else 'none: /v1/chat/completions and LLM.chat need chat_template=...'}",
        f"ready in           {sum(seconds.values()):.1f} s: "
        + ", ".join(f"{phase} {took:.1f}" for phase, took in seconds.items() if took >= 0.05),
    ]
    return "minivllm is ready\n  " + "\n  ".join(lines)


def _on(flag: bool) -> str:
    return "on" if flag else "off"
