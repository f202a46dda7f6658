"""The engines under test: a list of requests in, their token ids out. minivllm and vLLM here, Hugging Face in hf_backends.py.

Owns how each engine is called, in its best fair form, and no clock. A backend is used like this, by measure.py:

    backend = open_backend("minivllm", model)      loads; not timed
    backend.prepare(workload, size)                empties its prefix cache; not timed
    backend.generate(workload)                     timed: exactly max_tokens ids for each request, EOS ignored
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from minivllm.bench.environment import installed_version
from minivllm.bench.flags import BenchError
from minivllm.bench.workload import BenchRequest, Workload
from minivllm.exceptions import ValidationError

BACKENDS = ("minivllm", "hf", "hf-continuous", "vllm")
# What vLLM is told as well: sizes and switches of the same name and meaning. The rest are minivllm's own.
SHARED_WITH_VLLM = ("model", "dtype", "seed", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
                    "kv_cache_memory_bytes", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "load_format",
                    "async_scheduling")


@dataclass
class ModelSpec:
    """What every backend loads: the engine's arguments as given, and what was decided about them before the first load."""

    folder: str
    dtype: torch.dtype
    device: torch.device
    engine_kwargs: dict[str, Any]  # model, dtype, seed, load_format, sizes: `LLM(**engine_kwargs)`
    hf_batch_sizes: list[int] = field(default_factory=list)  # empty: the bench chooses
    hf_static_cache: bool = False

    @property
    def is_dummy(self) -> bool:
        return self.engine_kwargs.get("load_format") == "dummy"


@dataclass
class Counters:
    """Deterministic counts of a backend's work since it was loaded; None where it does not tell."""

    prefix_cache_queries: int | None = None  # in tokens
    prefix_cache_hits: int | None = None
    num_preemptions: int | None = None
    num_steps: int | None = None

    def since(self, before: Counters) -> Counters:
        return Counters(*(None if now is None or then is None else now - then
                          for now, then in zip(vars(self).values(), vars(before).values())))


class Backend(Protocol):
    """An engine that is loaded. `sizes` is what to sweep: batch sizes where the engine needs one chosen for it, else [None]."""

    name: str

    def sizes(self, workload: Workload) -> Sequence[int | None]: ...

    def prepare(self, workload: Workload, size: int | None) -> None: ...

    def generate(self, workload: Workload) -> list[list[int]]: ...

    def counters(self) -> Counters: ...

    def close(self) -> None: ...


def open_backend(name: str, model: ModelSpec) -> Backend:
    """Load one backend. Raises `ValidationError` for vLLM where it is not installed."""
    if name == "minivllm":
        return MinivllmBackend(model)
    if name == "vllm":
        return VllmBackend(model)
    from minivllm.bench import hf_backends  # transformers' modelling code: only when it is asked for

    return hf_backends.StaticBackend(model) if name == "hf" else hf_backends.ContinuousBackend(model)


def require_installed(names: Sequence[str]) -> None:
    if "vllm" in names and installed_version("vllm") is None:
        raise ValidationError("vllm is not installed here: pip install vllm (an environment of its own is best), or leave it out",
                              parameter="backend")


def release_memory() -> None:
    """The next backend must find the memory that this one had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sampling_kwargs(workload: Workload, request: BenchRequest) -> dict[str, Any]:
    """What minivllm and vLLM are asked for, by the same names."""
    return {"temperature": workload.temperature, **workload.cuts, "max_tokens": request.max_tokens, "ignore_eos": True,
            "detokenize": False}


class MinivllmBackend:
    """This engine, through the same `LLM` as everybody's."""

    name = "minivllm"

    def __init__(self, model: ModelSpec) -> None:
        from minivllm.llm import LLM

        self.llm = LLM(**(model.engine_kwargs | {"skip_tokenizer_init": True}))

    def sizes(self, workload: Workload) -> Sequence[int | None]:
        return [None]

    def prepare(self, workload: Workload, size: int | None) -> None:
        if not self.llm.reset_prefix_cache():
            raise BenchError("minivllm still holds blocks of the run before: its prefix cache cannot be emptied")

    def generate(self, workload: Workload) -> list[list[int]]:
        from minivllm.sampling_params import SamplingParams

        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in workload.requests]
        params = [SamplingParams(**sampling_kwargs(workload, request)) for request in workload.requests]
        return [output.outputs[0].token_ids for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def counters(self) -> Counters:
        stats = self.llm.stats
        return Counters(stats.prefix_cache_queries, stats.prefix_cache_hits, stats.num_preemptions, stats.num_steps)

    def close(self) -> None:
        self.llm.close()
        del self.llm
        release_memory()


class VllmBackend:
    """vLLM's offline `LLM` with its own defaults, and the arguments that both engines know.

    So it keeps no statistics, which cost its front end time in every step, and has no counters to tell (docs/ledger.md).
    """

    name = "vllm"

    def __init__(self, model: ModelSpec) -> None:
        require_installed(["vllm"])
        from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

        # Its engine is a process of its own. A fork would inherit that CUDA was asked about here, and could not use it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        shared = {name: value for name, value in model.engine_kwargs.items() if name in SHARED_WITH_VLLM}
        self.llm = LLM(**(shared | {"model": model.folder, "skip_tokenizer_init": True}))

    def sizes(self, workload: Workload) -> Sequence[int | None]:
        return [None]

    def prepare(self, workload: Workload, size: int | None) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, workload: Workload) -> list[list[int]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in workload.requests]
        params = [SamplingParams(**sampling_kwargs(workload, request)) for request in workload.requests]
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()  # that process holds the GPU's memory
        del self.llm
        release_memory()
