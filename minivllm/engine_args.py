"""From the arguments that a vLLM script passes to one `EngineConfig`, with nothing ignored in silence.

Owns the spellings: names that minivllm shares with vLLM, aliases, and arguments of vLLM that minivllm lacks. Those are
accepted at the value that changes nothing (`tensor_parallel_size=1`), so that a tutorial's script runs with only the
import changed, and refused by name at any other.

    LLM(model, gpu_memory_utilization=0.8, tensor_parallel_size=1)     runs
    LLM(model, tensor_parallel_size=2)                                 UnsupportedError: ... leave it out, or pass 1
    LLM(model, gpu_memory_utilisation=0.8)                             ValidationError: ... did you mean `gpu_memory_utilization`?

vLLM: vllm/engine/arg_utils.py, some hundred arguments in a dozen groups.
"""

from __future__ import annotations

import dataclasses
import difflib

from minivllm.config import EngineConfig
from minivllm.exceptions import UnsupportedError, ValidationError

ALIASES = {"num_gpu_blocks_override": "num_blocks"}

# vLLM's argument -> the values at which it asks for nothing that minivllm lacks.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "tokenizer_mode": ("auto", "hf"),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "quantization": (None,),
    "kv_cache_dtype": ("auto",),
    "swap_space": (0, None),
    "cpu_offload_gb": (0, None),
    "enable_lora": (False,),
    "compilation_config": (None,),
    "logits_processors": (None,),
    "hf_overrides": (None, {}),
    "distributed_executor_backend": (None, "uni"),
    "limit_mm_per_prompt": (None, {}),
    "scheduling_policy": ("fcfs",),
    "logprobs_mode": ("raw_logprobs",),
}
# vLLM's short forms of keys of speculative_config.
SPECULATIVE = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
# No remote code is ever executed, whatever this says, and nothing is logged that it could turn off.
WITHOUT_EFFECT = ("trust_remote_code", "disable_log_stats", "disable_log_requests", "max_seq_len_to_capture")


def engine_config_from_kwargs(**kwargs: object) -> EngineConfig:
    """The `EngineConfig` that these keyword arguments ask for.

    Raises `UnsupportedError` for an argument of vLLM that would change the result and is not implemented, and
    `ValidationError` for a name that neither knows (with the nearest one that exists).
    """
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    values: dict[str, object] = {}
    for given, value in kwargs.items():
        name = ALIASES.get(given, given)
        if name in fields:
            if name in values:
                raise ValidationError(f"{given} and its alias were both given: keep one", parameter=given, value=value)
            values[name] = value
        elif name in NEUTRAL:
            _require_neutral(name, value)
        elif name not in WITHOUT_EFFECT and name not in SPECULATIVE:
            known = [*fields, *NEUTRAL, *ALIASES, *SPECULATIVE]
            raise ValidationError(f"unknown argument {name!r}{nearest_name(name, known)}", parameter=name)
    if short := {SPECULATIVE[name]: value for name, value in kwargs.items() if name in SPECULATIVE and value is not None}:
        if values.get("speculative_config") is not None:
            raise ValidationError(f"speculative_config and a short form of its {', '.join(short)} were both given: keep one",
                                  parameter="speculative_config")
        values["speculative_config"] = short
    return EngineConfig(**values)  # type: ignore[arg-type]


def _require_neutral(name: str, value: object) -> None:
    if value not in NEUTRAL[name]:
        allowed = " or ".join(repr(choice) for choice in NEUTRAL[name])
        raise UnsupportedError(f"{name}={value!r} is not implemented in minivllm: leave it out, or pass {allowed}",
                               parameter=name, value=value)


def nearest_name(name: str, known: list[str]) -> str:
    """": did you mean `max_tokens`?" for a near miss, else an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f": did you mean `{close[0]}`?" if close else ""
