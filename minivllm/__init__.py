"""minivllm: a vLLM-style inference engine in pure PyTorch. The modules, in the order in which a request meets them:

config, weights, model      what is computed          (generate, dense_cache, slot_batching, cost: the rungs below the engine)
block_pool, kv_cache        where keys and values live
attention                   how they are read
request, scheduler          who computes how much in this step
model_runner, sampler       from a schedule to tokens
detokenizer                 from tokens to text
engine, llm, async_engine   schedule, run, sample, update
serve                       the same engine behind HTTP
"""

import os

from minivllm.version import __version__

# A learner's file in mine/ shadows the module of the same name (see minivllm/learn.py).
if os.environ.get("MINIVLLM_MINE"):
    __path__.insert(0, os.path.abspath(os.environ["MINIVLLM_MINE"]))
    os.environ["MINIVLLM_MINE"] = __path__[0]  # processes that are started in other folders read it too
    if not os.path.isdir(__path__[0]):
        raise ImportError(f"MINIVLLM_MINE is {__path__[0]!r} and there is no such folder: make it, or unset the variable")

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import `LLM` and `SamplingParams` on first use: the scheduler's tests must not pay for torch."""
    if name == "LLM":
        from minivllm.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minivllm.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
