"""Where does this model leave Hugging Face's? Both run the same ids, and the first module whose output differs is named.

    $ python -m minivllm.compare FOLDER --prompt "Once upon a time"
    ...
    model.layers.0.self_attn.qkv_proj      0.0e+00
    model.layers.0.self_attn.o_proj input  9.0e-01  <- first difference: RoPE, mask, softmax, or the grouping of heads

For learners and for debugging. The only module of the package that runs transformers' modelling code, as the oracle.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from minivllm.model import NoCache, Qwen2ForCausalLM
from minivllm.weights import FUSED, load_model, resolve_model

# Rounding, with room for another order of summation. Half types round every product. RMSNorm rounds to float32 even in
# float64 (as Hugging Face), so once in about 100 random models a sum that differs by 1e-16 falls on the other side: 2e-11.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# The last part of a module's name -> where to look when its output is the first that differs.
HINTS = {
    "embed_tokens": "the embedding's rows", "rotary_emb": "rope_frequencies: theta, YaRN, positions",
    "input_layernorm": "RMSNorm", "qkv_proj": "the rows q, k, v and their biases",
    "o_proj input": "RoPE, mask, softmax, or the grouping of heads", "o_proj": "the output projection",
    "post_attention_layernorm": "the residual sum, or RMSNorm", "gate_up_proj": "the rows gate and up",
    "down_proj input": "silu(gate) * up", "down_proj": "the down projection", "norm": "the residual sum, or the last RMSNorm",
    "lm_head": "the head: is it tied?",
}


@dataclass(frozen=True)
class ModuleError:
    """How far one module's output is from Hugging Face's: max|difference| / max|Hugging Face's|."""

    name: str
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """Every module's error, in the order of computation. `str()` of it is the table."""

    errors: list[ModuleError]
    tolerance: float

    @property
    def first_difference(self) -> ModuleError | None:
        """The first module beyond the tolerance (NaN is), or None."""
        return next((error for error in self.errors if not error.relative_error <= self.tolerance), None)

    def __str__(self) -> str:
        width = max(len(error.name) for error in self.errors)
        first = self.first_difference
        lines = [f"{error.name:{width}}  {error.relative_error:.1e}" + (f"  <- {self._hint(error)}" if error is first else "")
                 for error in self.errors]
        verdict = "differs from" if first else "equals"
        return "\n".join([*lines, f"minivllm {verdict} Hugging Face (tolerance {self.tolerance:.0e})"])

    @staticmethod
    def _hint(error: ModuleError) -> str:
        return f"first difference: {HINTS.get(error.name.split('.')[-1], error.name)}"


def compare(folder_or_models: str | Path | tuple[Qwen2ForCausalLM, nn.Module], input_ids: Tensor,
            dtype: torch.dtype = torch.float64, tolerance: float | None = None, first_position: int = 0) -> Comparison:
    """Run minivllm and Hugging Face on input_ids (T,), one sequence without a cache, and compare every module's output.

    Takes a model folder, or both models: (minivllm's, Hugging Face's). In float64 rounding hides nothing. A large
    `first_position` asks how RoPE does far out, at the price of a short text.
    """
    if isinstance(folder_or_models, tuple):
        ours, theirs = folder_or_models
    else:
        ours, theirs = load_model(folder_or_models, dtype), _load_hugging_face(folder_or_models, dtype)
    dtype = ours.lm_head.weight.dtype
    with torch.no_grad(), record_outputs(ours) as our_outputs, record_outputs(theirs) as their_outputs:
        caches = [NoCache() for _ in ours.model.layers]
        positions = torch.arange(first_position, first_position + len(input_ids))
        ours.compute_logits(ours(input_ids, positions, caches, SimpleNamespace(slot_mapping=None)))
        theirs(input_ids[None], position_ids=positions[None], use_cache=False)
    errors = [ModuleError(name, relative_error(output, find_output(their_outputs, name)))
              for name, output in our_outputs.items()]
    return Comparison(errors, TOLERANCES[dtype] if tolerance is None else tolerance)


def _load_hugging_face(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM  # takes seconds to import

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


@contextmanager
def record_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fill the dictionary, in order, with the output of every module without children, and the input of some.

    What enters `o_proj` is what the attention itself made, and no module has that as its output; `down_proj` likewise.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            if name.endswith(("o_proj", "down_proj")):
                outputs[f"{name} input"] = inputs[0]
            outputs[name] = output if isinstance(output, Tensor) else torch.cat(output, dim=-1)  # a tuple is cos and sin

        return keep

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(hook(name)))
        yield outputs


def find_output(outputs: dict[str, Tensor], name: str) -> Tensor:
    """Hugging Face's output for minivllm's module `name`: its own, or the parts of a fused matrix side by side."""
    parent, _, module = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in FUSED[module]] if module in FUSED else [name]
    return torch.cat([outputs[part] for part in parts], dim=-1)


def relative_error(output: Tensor, oracle: Tensor) -> float:
    """max|difference| / max|oracle|, in float64; 0 where both are all zeros."""
    output, oracle = output.double(), oracle.double().reshape(output.shape)  # theirs has a batch axis of 1
    difference, scale = (output - oracle).abs().max().item(), oracle.abs().max().item()
    return difference / scale if scale else difference


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m minivllm.compare", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or hub id; without it, the embedded checkpoint")
    parser.add_argument("--prompt", default="Once upon a time there was a little engine.")
    parser.add_argument("--dtype", default="float64", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES])
    options = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    folder = resolve_model(options.model)
    input_ids = AutoTokenizer.from_pretrained(folder)(options.prompt, return_tensors="pt").input_ids[0]
    comparison = compare(folder, input_ids, getattr(torch, options.dtype))
    print(comparison)
    return 1 if comparison.first_difference else 0


if __name__ == "__main__":
    raise SystemExit(main())
