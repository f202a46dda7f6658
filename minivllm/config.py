"""Two frozen records: what the checkpoint says (`ModelConfig`) and how the engine is to run it (`EngineConfig`).

Every knob is checked once, here, and never changes afterwards; what is left None is decided by the engine at start and
replaced in a new record. No torch: dtypes and devices are strings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM",)
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
ATTENTION_BACKENDS = ("auto", "paged_gather")


@dataclass(frozen=True)
class EngineConfig:
    """Every knob of the engine. Raises `ValidationError` that names the knob and what it may be.

    Names are vLLM's engine arguments. None means "decided at start": from the checkpoint, the device or free memory.
    """

    model: str | None = None  # None: the checkpoint inside the package
    tokenizer: str | None = None  # None: beside the model
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # 0: off
    max_logprobs: int = 20
    attention_backend: str = "auto"
    enforce_eager: bool = False
    generation_config: str = "auto"  # "auto", "none" (alias "vllm"), or a folder
    chat_template: str | None = None
    skip_tokenizer_init: bool = False
    trace: str | None = None  # where to write the step trace, as JSON lines

    def __post_init__(self) -> None:
        self._require_choice("dtype", DTYPES)
        self._require_choice("attention_backend", ATTENTION_BACKENDS)
        for parameter, low, optional in (
            ("max_model_len", 1, True), ("max_num_seqs", 1, False), ("max_num_batched_tokens", 1, True),
            ("block_size", 1, True), ("num_blocks", 2, True), ("kv_cache_memory_bytes", 1, True),
            ("long_prefill_token_threshold", 0, False), ("max_logprobs", -1, False), ("seed", 0, False),
        ):
            self._require_int(parameter, low, optional)
        fraction = self.gpu_memory_utilization
        self._require(isinstance(fraction, (int, float)) and 0 < fraction <= 1, "gpu_memory_utilization", "a number in (0, 1]")
        for parameter in ("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "skip_tokenizer_init"):
            self._require(isinstance(getattr(self, parameter), bool), parameter, "True or False")
        self._check_budget()

    def _require(self, holds: bool, parameter: str, wanted: str) -> None:
        if not holds:
            value = getattr(self, parameter)
            raise ValidationError(f"{parameter} must be {wanted}, got {value!r}", parameter=parameter, value=value)

    def _require_choice(self, parameter: str, choices: tuple[str, ...]) -> None:
        self._require(getattr(self, parameter) in choices, parameter, "one of " + ", ".join(choices))

    def _require_int(self, parameter: str, low: int, optional: bool) -> None:
        value = getattr(self, parameter)
        holds = value is None and optional or isinstance(value, int) and not isinstance(value, bool) and value >= low
        self._require(holds, parameter, f"an integer >= {low}" + (" or None" if optional else ""))

    def _check_budget(self) -> None:
        """Without chunking a prompt runs in one step or never (vllm/config/scheduler.py)."""
        budget, length = self.max_num_batched_tokens, self.max_model_len
        if budget is not None and not self.enable_chunked_prefill and length is not None and budget < length:
            raise ValidationError(
                f"max_num_batched_tokens={budget} is smaller than max_model_len={length} while chunked prefill is off: the longest "
                f"prompt could never run. Raise the budget to {length}, lower max_model_len, or set enable_chunked_prefill=True.",
                parameter="max_num_batched_tokens", value=budget)
