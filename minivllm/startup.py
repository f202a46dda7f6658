"""Everything that is decided once, before the first request: device, dtype, lengths, the size of the KV pool, EOS, defaults.

Owns the order of a start and the report that says what was decided and why. The rules are plain arithmetic and stand in
`decide_*` functions, so that the report's sum can be checked by hand:

    KV bytes a block = 2 (K and V) x layers x KV heads x head size x bytes of the dtype x block size

How much memory the blocks may take: memory.py, and profile_run.py for a GPU.

    tokenizer | weights | profile run | importing | KV pool | compiling | capturing
    cheap, and most       what a step   the com-    the rest  what a GPU alone
    mistakes show here    needs itself  piler       of memory needs (lesson 14)

The order is not free. What can be wrong in a setting is found before gigabytes are read; the profile run needs the weights in
place, the pool what the profile run leaves and a compiler to tell its shape to, which has to know our cache before, and a graph
the addresses of the pool. vLLM: v1/worker/gpu_worker.py, driven by v1/engine/core.py from another process.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.compile_ahead import compiled_ahead
from minivllm.compile_cache import CompileCache
from minivllm.config import EngineConfig, ModelConfig
from minivllm.cuda_graphs import IDLE_STREAMS, next_stream
from minivllm.draft_model import DraftModelProposer, load_draft, make_proposer, num_drafts
from minivllm.exceptions import CheckpointError, NotEnoughMemoryError, ValidationError
from minivllm.generation_config import GenerationDefaults, read_generation_config
from minivllm.memory import decide_num_blocks, is_out_of_memory, kv_bytes_per_block, out_of_memory
from minivllm.model import Qwen2ForCausalLM
from minivllm.model_runner import ModelRunner
from minivllm.packed_linear import pack_linears
from minivllm.profile_run import MemorySum, measure_memory
from minivllm.speculative import Proposer
from minivllm.threads import set_num_threads
from minivllm.weights import load_dummy_model, load_model, resolve_dtype, resolve_model

logger = logging.getLogger("minivllm")


@dataclass
class Started:
    """What a start hands to the engine. Weights and KV cache are the runner's; nobody else holds a tensor."""

    config: EngineConfig  # nothing left None that the engine needs
    model_config: ModelConfig
    tokenizer: Any | None  # None after skip_tokenizer_init: then there are no texts and no stop strings
    defaults: GenerationDefaults
    chat_template: str | None  # Jinja: what was passed, or else the tokenizer's own
    runner: ModelRunner
    proposer: Proposer | None  # who guesses ahead
    report: str


def start(config: EngineConfig) -> Started:
    """Find and load the checkpoint, size the pool, build the runner. Raises `CheckpointError` or `ValidationError`.

    Where memory runs out, all that was allocated is given back and a `NotEnoughMemoryError` says what to change.
    """
    configure_logging()
    began: dict[str, float] = {}  # phase -> when it began, in seconds of no particular clock; the last one is the one that failed
    try:
        with torch.cuda.stream(next_stream(config.device)):  # weights and warm-up on it as well
            started = _start(config, began)
        IDLE_STREAMS.discard(started.runner.stream)  # until it is closed; a start that fails leaves its stream to the next
        return started
    except (RuntimeError, NotEnoughMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None) if isinstance(error, NotEnoughMemoryError) else None
    # Out here nothing refers to the frames that hold weights and KV: neither the old error nor the new one, for good.
    gc.collect()
    torch.cuda.empty_cache()  # without CUDA it does nothing
    raise failure or out_of_memory(list(began)[-1], config)


def _start(config: EngineConfig, began: dict[str, float]) -> Started:
    """`start`, which tells `began` of each phase, so that a failure is blamed on the phase in which it came.

    Two models may share the memory: with a draft a block holds the KV of both (draft_model.py), so both are loaded before sizes
    are decided.
    """
    began["tokenizer"] = time.perf_counter()
    folder = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(folder, config, model_config.vocab_size)
    began["weights"] = time.perf_counter()
    device = decide_device(config.device)  # only now: importing and reading configs needs no device
    dtype = resolve_dtype(config.dtype, model_config, device)
    is_dummy = config.load_format == "dummy"
    model = load_dummy_model(model_config, dtype, device, config.seed) if is_dummy else load_model(folder, dtype, device)
    draft, speculation = load_draft(config, model, tokenizer, dtype, device)
    # Counted before: packing moves the weights into the layout of oneDNN, and they are parameters no more.
    told = {"threads": set_num_threads(device, num_bytes := sum(weight.numel() * weight.itemsize for weight in model.parameters())),
            "weights": f"{num_bytes:,} bytes, {pack_linears(model, device, config.max_num_seqs)}", "speculation": speculation}
    began["profile run"] = time.perf_counter()
    config, memory = decide_sizes(config, model_config, dtype, device, model, draft)
    began["importing"] = time.perf_counter()
    with compiled_ahead(config, model_config, memory) as wait_for:
        cache = CompileCache() if device.type == "cuda" and config.attention_backend == "flex_attention" else None
        began["KV pool"] = time.perf_counter()
        runner = ModelRunner(model, config, device, tokenizer, num_drafts(config))
        proposer = make_proposer(config, draft, device, tokenizer)
        began["compiling"] = time.perf_counter()
        capturing = runner.warm_up(wait_for) + (proposer.warm_up() if isinstance(proposer, DraftModelProposer) else 0.0)
    # Compiling and capturing take turns, bucket by bucket: what capturing took in all is reported as if it had come last.
    began["capturing"] = time.perf_counter() - capturing
    defaults = read_generation_config(folder, config.generation_config, tokenizer)
    template = load_chat_template(config.chat_template) or getattr(tokenizer, "chat_template", None)
    report = write_report(config, model, told, defaults, template, folder, memory, cache, began)
    logger.info("%s", report)  # as one record, so that other threads' lines do not come in between
    return Started(config, model_config, tokenizer, defaults, template, runner, proposer, report)


def configure_logging() -> None:
    """Show minivllm's own messages unless the program has set up logging itself (as vLLM does)."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(os.environ.get("MINIVLLM_LOGGING_LEVEL", "INFO").upper())


def load_tokenizer(folder: Path, config: EngineConfig, vocab_size: int) -> Any:
    """The folder's tokenizer by transformers. No code from the checkpoint is ever executed.

    An embedding may have more rows than the tokenizer has tokens (Qwen2.5 pads 151,665 to 151,936), and never fewer: an id
    beyond it would be an error of the device in the middle of serving.
    """
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
    """"auto" is CUDA when there is one. Other devices are refused: this engine was never run on one, nor on a GPU by its number."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:0)?", asked):
        raise ValidationError(f"device must be auto, cpu or cuda, got {asked!r}; CUDA_VISIBLE_DEVICES chooses a GPU",
                              parameter="device", value=asked)
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValidationError("device='cuda' was asked for and torch finds no CUDA device: use device='cpu'", parameter="device")
    return device


def decide_sizes(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device,
                 model: Qwen2ForCausalLM | None = None,
                 draft: Qwen2ForCausalLM | None = None) -> tuple[EngineConfig, MemorySum | None]:
    """The same config with every size filled in, and the sum of a GPU's memory if one was needed, by a profile run of `model`.

    A max_model_len that nobody asked for is lowered to what the pool holds; one that was asked for stays, and then a request
    beyond the pool is refused when it is added. With num_blocks given nothing is measured. What holds afterwards:

        max_model_len - 1 <= (num_blocks - 1) x block_size    unless it was asked for: one request alone always fits
    """
    on_gpu = device.type == "cuda"
    # A GPU's kernel reads keys in tiles of up to 64, and no tile is larger than a block; 16 wastes less (lesson 7).
    block_size = config.block_size or (64 if on_gpu else 16)
    longest = model_config.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValidationError(f"max_model_len={config.max_model_len} is beyond the {longest} positions that the model was made "
                              "for: lower it, or set rope_scaling (YaRN) in config.json", parameter="max_model_len",
                              value=config.max_model_len)
    max_model_len = config.max_model_len or longest
    backend = decide_attention_backend(config, model_config, dtype, device, block_size)
    num_blocks, memory = config.num_blocks, None
    if num_blocks is None:
        if on_gpu and model is not None and config.kv_cache_memory_bytes is None:
            # Guesses make a step larger, and a draft model has weights, rows and graphs too: all of it counts before the pool does.
            memory = measure_memory(model, config, backend, max_model_len, decide_budget(config, max_model_len, on_gpu), device,
                                    draft, num_drafts(config))
        # One block id stands for a block of each model: the draft has tensors of its own under the same block table.
        block_bytes = sum(kv_bytes_per_block(one, block_size, dtype) for one in (model_config, *([draft.config] if draft else ())))
        num_blocks = decide_num_blocks(config, block_bytes, block_size, max_model_len, memory)
    if config.max_model_len is None:
        max_model_len = min(max_model_len, (num_blocks - 1) * block_size + 1)  # the last token of a sequence needs no KV
    sized = dataclasses.replace(config, device=str(device), dtype=str(dtype).removeprefix("torch."), block_size=block_size,
                                num_blocks=num_blocks, max_model_len=max_model_len, attention_backend=backend,
                                max_num_batched_tokens=decide_budget(config, max_model_len, on_gpu),
                                # a CPU has nothing to overlap, a trace is easier to read step by step,
                                # and drafts follow the tokens of the step before
                                async_scheduling=(on_gpu and config.trace is None and config.speculative_config is None)
                                if config.async_scheduling is None else config.async_scheduling)
    return sized, memory


def decide_budget(config: EngineConfig, max_model_len: int, on_gpu: bool) -> int:
    """Tokens of a step. Without chunks the longest prompt must fit into one.

    Enough to keep the arithmetic busy (lesson 3: a few hundred on an H200), and few enough that nobody's next token waits long
    for somebody's prompt (lesson 10). A CPU is busy with less.
    """
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    budget = 8192 if on_gpu else 2048
    return budget if config.enable_chunked_prefill else max(budget, max_model_len)


def decide_attention_backend(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device,
                             block_size: int) -> str:
    """"auto" is the fastest that runs here without being asked for more: compiled on CUDA, standing copies on a CPU.

    "paged_gather", the readable rung, runs everywhere; a compiled kernel wants powers of two for what it cuts into tiles. As for
    any setting, what was asked for by name and cannot be is an error, and never silently something slower.
    """
    sizes = (block_size, model_config.head_dim)
    has_kernel = device.type == "cuda" and dtype != torch.float64 and all(size in (16, 32, 64, 128, 256) for size in sizes)
    if config.attention_backend == "flex_attention" and not has_kernel:
        raise ValidationError(
            "attention_backend='flex_attention' needs CUDA, a dtype other than float64, and powers of two from 16 to 256 for "
            f"block_size and head size, got {device.type}, {dtype}, {block_size} and {model_config.head_dim}: use 'auto'",
            parameter="attention_backend", value=config.attention_backend)
    if config.attention_backend == "standing" and device.type != "cpu":
        raise ValidationError("attention_backend='standing' keeps its copies on a CPU: use 'auto'", parameter="attention_backend",
                              value=config.attention_backend)
    if config.attention_backend != "auto":
        return config.attention_backend
    if device.type == "cpu":
        return "standing"
    return "flex_attention" if has_kernel and not config.enforce_eager else "paged_gather"


def resolved_sizes(config: EngineConfig) -> tuple[int, int, int]:
    """(num_blocks, block_size, max_model_len) of a config that a start has filled in."""
    sizes = (config.num_blocks, config.block_size, config.max_model_len)
    assert None not in sizes, "a started engine has decided its sizes"
    return sizes  # type: ignore[return-value]  # mypy does not see that None is ruled out


def write_report(config: EngineConfig, model: Qwen2ForCausalLM, told: dict[str, str], defaults: GenerationDefaults,
                 template: str | None, folder: Path, memory: MemorySum | None, cache: CompileCache | None,
                 began: dict[str, float]) -> str:
    """The start-up report: what was decided, in one place, once.

    A line for each question that a user has asked of such engines: why so few requests at once, why this answer without a
    temperature, why no chat.
    """
    num_blocks, block_size, max_model_len = resolved_sizes(config)
    pool_tokens = (num_blocks - 1) * block_size  # all but the null block
    pool_bytes = num_blocks * kv_bytes_per_block(model.config, block_size, model.model.embed_tokens.weight.dtype)
    chunks, caching = ("on" if is_on else "off" for is_on in (config.enable_chunked_prefill, config.enable_prefix_caching))
    lines = [
        f"checkpoint         {config.model or 'embedded toy model'} ({folder.name}), {config.dtype} on {config.device}",
        f"weights            {told['weights']}",
        f"KV cache           {num_blocks - 1:,} blocks x {block_size} slots = {pool_tokens:,} tokens, {pool_bytes:,} bytes",
        *([f"memory             {memory.describe(pool_bytes)}"] if memory else []),
        f"longest request    {max_model_len:,} tokens; {pool_tokens / max_model_len:.1f} of them fit at once "
        f"(max_num_seqs {config.max_num_seqs})",
        f"budget of a step   {config.max_num_batched_tokens:,} tokens; chunked prefill {chunks}, prefix cache {caching}",
        f"attention          {config.attention_backend}",
        *([f"speculation        {told['speculation']}"] if told.get("speculation") else []),
        *([f"threads            {told['threads']}"] if config.device == "cpu" else []),
        *([f"compile cache      {cache.describe()}"] if cache else []),
        f"sampling defaults  {defaults.describe()}",
        "                   for HTTP fields left out and generate() without params; an explicit SamplingParams stands as it is",
        f"EOS ids            {', '.join(map(str, defaults.eos_token_ids)) or 'none: requests end by length or stop strings'}",
        f"chat template      {'found' if template else 'none: /v1/chat/completions and LLM.chat need chat_template=...'}",
        f"ready in           {describe_seconds(began, time.perf_counter())}",
    ]
    return "minivllm is ready\n  " + "\n  ".join(lines)


def describe_seconds(began: dict[str, float], now: float) -> str:
    """The whole time of a start and that of each phase, which lasts until the next one begins."""
    times = [*began.values(), now]
    seconds = {phase: end - start for phase, start, end in zip(began, times, times[1:])}
    return f"{now - times[0]:.1f} s: " + ", ".join(f"{phase} {took:.1f}" for phase, took in seconds.items() if took >= 0.05)
