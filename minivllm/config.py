"""Two frozen records: what the checkpoint says (`ModelConfig`) and how the engine is to run it (`EngineConfig`).

Every knob is checked once, here, and never changes afterwards; what is left None is decided by the engine at start and
replaced in a new record. No torch: dtypes and devices are strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError
from minivllm.speculative_config import check_speculation

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM",)
SUPPORTED_ROPE_TYPES = ("default", "yarn")
ROPE_FIELDS = {"rope_type", "type", "rope_theta"}
YARN_FIELDS = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
               "mscale_all_dim", "truncate"}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
ATTENTION_BACKENDS = ("auto", "paged_gather", "standing", "flex_attention")
LOAD_FORMATS = ("auto", "safetensors", "dummy")  # auto is safetensors; dummy is random weights in the true shape


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about a Qwen2, under Hugging Face's names. Made by `from_folder` or `from_dict`.

    The file is read as it is written: transformers' own reader fills in what is missing (rope_theta becomes 10,000), and
    a model with the wrong rope_theta still talks, only worse. Here a missing field is a `CheckpointError` that names it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: dict[str, Any] | None = None  # None, or YaRN with every field filled in (see `_read_yarn`)
    torch_dtype: str | None = None  # of the weights in the files
    architecture: str = "Qwen2ForCausalLM"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: each key/value head serves one group of query heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim={self.head_dim} is odd: RoPE turns the numbers of a head in pairs")

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and output together, that the positions of this checkpoint reach.

        Qwen2.5's documents switch YaRN on without raising max_position_embeddings from 32,768, so the factor counts here
        (vllm/config/model.py does the same).
        """
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = int(self.rope_scaling["original_max_position_embeddings"] * self.rope_scaling["factor"])
        return max(self.max_position_embeddings, stretched)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` in a model folder. Raises `CheckpointError`, or `UnsupportedError` for another kind of model."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: a model folder holds config.json beside its weights") from None
        except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not a {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """The config that `raw`, a parsed config.json, describes. Raises as `from_folder` does."""
        architecture = _read_architecture(raw)
        _refuse_unsupported(raw)
        sizes = {name: _read(raw, name, POSITIVE_INT) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings")}
        rope_theta, rope_scaling = _read_rope(raw)
        return cls(
            **sizes, head_dim=_read_head_dim(raw), rms_norm_eps=float(_read(raw, "rms_norm_eps", POSITIVE_NUMBER)),
            rope_theta=rope_theta, rope_scaling=rope_scaling, tie_word_embeddings=_read(raw, "tie_word_embeddings", BOOL),
            torch_dtype=_read_dtype(raw), architecture=architecture)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python, True is an integer


POSITIVE_INT, POSITIVE_NUMBER, BOOL, STRING = "a positive integer", "a positive number", "true or false", "a string"
IS_KIND: dict[str, Callable[[Any], bool]] = {
    POSITIVE_INT: lambda value: _is_int(value) and value > 0,
    POSITIVE_NUMBER: lambda value: (_is_int(value) or isinstance(value, float)) and 0 < value < math.inf,
    BOOL: lambda value: isinstance(value, bool),
    STRING: lambda value: isinstance(value, str),
}


def _read(raw: dict[str, Any], name: str, kind: str, where: str = "config.json") -> Any:
    """`raw[name]`, of the kind that it must be."""
    if name not in raw:
        raise CheckpointError(f"{where} has no `{name}`: it must be {kind}, and minivllm does not guess it")
    if not IS_KIND[kind](raw[name]):
        raise CheckpointError(f"{where}: `{name}` must be {kind}, got {raw[name]!r}")
    return raw[name]


def _read_architecture(raw: dict[str, Any]) -> str:
    """The supported name in `architectures`; a file without that list is judged by its `model_type`."""
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if names is None and model_type is None:
        raise CheckpointError("config.json has neither `architectures` nor `model_type`: which model is this?")
    given = names if isinstance(names, list) else [names]
    supported = [name for name in SUPPORTED_ARCHITECTURES if names is None or name in given]
    if not supported or model_type not in (None, "qwen2"):
        raise UnsupportedError(
            f"config.json describes architectures={names}, model_type={model_type!r}; minivllm runs "
            f"{', '.join(SUPPORTED_ARCHITECTURES)} (Qwen2 and Qwen2.5, dense)", parameter="architectures", value=names)
    return supported[0]


def _refuse(name: str, value: object, way_out: str) -> None:
    raise UnsupportedError(f"config.json: `{name}` = {value!r} is not implemented in minivllm; {way_out}",
                           parameter=name, value=value)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Refuse, by name, the settings that change what the model computes and that minivllm does not implement."""
    if (quantization := raw.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        _refuse("quantization_config", method, "take the checkpoint before quantization (float32, bfloat16 or float16)")
    if _read(raw, "hidden_act", STRING) != "silu":
        _refuse("hidden_act", raw["hidden_act"], "supported: silu")
    if raw.get("use_sliding_window"):
        _refuse("use_sliding_window", raw["use_sliding_window"], "every layer looks at the whole context here, and this "
                "model was trained to look through a window")
    layer_types = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or set(map(str, layer_types)) != {"full_attention"}:
        _refuse("layer_types", layer_types, "supported: full_attention in every layer")


def _read_head_dim(raw: dict[str, Any]) -> int:
    if raw.get("head_dim") is not None:
        return _read(raw, "head_dim", POSITIVE_INT)
    hidden_size, num_heads = raw["hidden_size"], raw["num_attention_heads"]  # read before
    if hidden_size % num_heads:
        raise CheckpointError(f"config.json: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}, "
                              f"and no `head_dim` says how large a head is")
    return hidden_size // num_heads


def _read_dtype(raw: dict[str, Any]) -> str | None:
    """transformers 5 writes `dtype` where 4 wrote `torch_dtype`. None if neither: then "auto" has nothing to go by on CUDA."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is not None and name not in DTYPES[1:]:
        raise CheckpointError(f"config.json: `torch_dtype` must be one of {', '.join(DTYPES[1:])}, got {name!r}")
    return name


def _read_rope(raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and the scaling, from either spelling.

    transformers 4 wrote `rope_theta` and `rope_scaling` side by side, 5 writes both into `rope_parameters`. Where a file
    has the old scaling and the new dictionary, the old one wins field by field (transformers drops the whole new one, and
    with it rope_theta).
    """
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = raw.get(name) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"config.json: `{name}` must be an object or null, got {given!r}")
        rope |= {field: value for field, value in given.items() if value is not None}
        if "rope_type" in given or "type" in given:
            rope["rope_type"] = given.get("rope_type", given.get("type"))
    rope_theta = float(_read(raw | rope, "rope_theta", POSITIVE_NUMBER))
    if raw.get("rope_theta") not in (None, rope_theta):
        raise CheckpointError(f"config.json gives two values of `rope_theta`: {raw['rope_theta']} and {rope_theta}")
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        _refuse("rope_type", rope_type, f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if unknown := sorted(rope.keys() - ROPE_FIELDS - (YARN_FIELDS if rope_type == "yarn" else set())):
        raise CheckpointError(f"config.json: RoPE of type {rope_type!r} has no {', '.join(unknown)}: is `rope_type` right?")
    return rope_theta, _read_yarn(raw, rope) if rope_type == "yarn" else None


def _read_yarn(raw: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """YaRN with its defaults filled in as transformers does, so that `model.rope_frequencies` has no option to read.

    `attention_factor` scales cos and sin, and thereby the scores: a longer context needs a sharper softmax.
    """
    where = "config.json, RoPE of type yarn"
    factor = _read(given, "factor", POSITIVE_NUMBER, where)
    if factor < 1:
        raise CheckpointError(f"{where}: `factor` stretches the context and must be at least 1, got {factor}")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    inferred = mscale(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        upper, lower = (_read(given, name, POSITIVE_NUMBER, where) for name in ("mscale", "mscale_all_dim"))
        inferred = mscale(upper) / mscale(lower)
    given = {"attention_factor": inferred, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | given
    return {
        "rope_type": "yarn", "factor": factor, "truncate": _read(given, "truncate", BOOL, where),
        # A value outside the dictionary wins, as in transformers.
        "original_max_position_embeddings": _read(given | raw, "original_max_position_embeddings", POSITIVE_INT, where),
    } | {name: _read(given, name, POSITIVE_NUMBER, where) for name in ("attention_factor", "beta_fast", "beta_slow")}


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
    async_scheduling: bool | None = None  # plan a step while the one before it runs; None: on CUDA, unless traced
    max_logprobs: int = 20
    attention_backend: str = "auto"
    enforce_eager: bool = False
    generation_config: str = "auto"  # "auto", "none" (alias "vllm"), or a folder
    chat_template: str | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    trace: str | None = None  # where to write the step trace, as JSON lines
    speculative_config: dict[str, Any] | None = None  # who guesses ahead, see speculative_config.py

    def __post_init__(self) -> None:
        for parameter, choices in (("dtype", DTYPES), ("attention_backend", ATTENTION_BACKENDS), ("load_format", LOAD_FORMATS)):
            self._require_choice(parameter, choices)
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
        self._require(isinstance(self.async_scheduling, bool | None), "async_scheduling", "True, False or None")
        self._check_budget()
        check_speculation(self.speculative_config, self.model is None, self.async_scheduling)

    def _require(self, holds: bool, parameter: str, wanted: str) -> None:
        if not holds:
            value = getattr(self, parameter)
            raise ValidationError(f"{parameter} must be {wanted}, got {value!r}", parameter=parameter, value=value)

    def _require_choice(self, parameter: str, choices: tuple[str, ...]) -> None:
        self._require(getattr(self, parameter) in choices, parameter, "one of " + ", ".join(choices))

    def _require_int(self, parameter: str, low: int, optional: bool) -> None:
        value = getattr(self, parameter)
        holds = optional if value is None else _is_int(value) and value >= low
        self._require(holds, parameter, f"an integer >= {low}" + (" or None" if optional else ""))

    def _check_budget(self) -> None:
        """Without chunking a prompt runs in one step or never (vllm/config/scheduler.py)."""
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValidationError("long_prefill_token_threshold splits prompts, and enable_chunked_prefill=False forbids that: "
                                  "set one of the two back", parameter="long_prefill_token_threshold")
        budget, length = self.max_num_batched_tokens, self.max_model_len
        if budget is not None and not self.enable_chunked_prefill and length is not None and budget < length:
            raise ValidationError(
                f"max_num_batched_tokens={budget} is smaller than max_model_len={length} while chunked prefill is off: the "
                f"longest prompt could never run. Raise the budget to {length}, or set enable_chunked_prefill=True.",
                parameter="max_num_batched_tokens", value=budget)
