"""Small random Qwen2 checkpoints, written by transformers, for everybody's tests: real shapes in miniature, real files.

    hf_model, folder = random_qwen2(tmp_path, seed=0, dtype=torch.float64)
    model = load_ours(folder, torch.float64)

Weights are drawn with `initializer_range=0.2`, biases and norms included. With the default of 0.02 and tied embeddings,
greedy output is one repeated token even when attention returns zeros: no test could fail.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from minivllm import model as ours
from minivllm.compare import relative_error
from minivllm.weights import load_model

__all__ = ["hf_logits", "ids", "load_ours", "our_logits", "random_qwen2", "relative_error"]

logging.disable_progress_bar()
_counter = itertools.count()


def random_qwen2(tmp_path: Path | str, seed: int = 0, *, dtype: torch.dtype = torch.float32, layers: int = 2, hidden: int = 64,
                 heads: int = 4, kv_heads: int = 2, vocab: int = 128, initializer_range: float = 0.2, tie: bool = False,
                 rope_theta: float = 10_000.0, max_shard_size: str | int = "5GB",
                 **overrides: Any) -> tuple[Qwen2ForCausalLM, Path]:
    """A transformers model with random weights on sdpa attention, and the new folder under `tmp_path` that holds it.

    `overrides` are fields of Qwen2Config (`head_dim`, `max_position_embeddings`, `rope_parameters`, ...).
    """
    fields = {"intermediate_size": 2 * hidden, "max_position_embeddings": 512, "hidden_act": "silu",
              "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}} | overrides
    config = Qwen2Config(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, tie_word_embeddings=tie, initializer_range=initializer_range, **fields)
    config._attn_implementation = "sdpa"
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    # Not `.to(dtype)`: that would round RoPE's float32 frequencies as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    randomize(model, seed, initializer_range)
    config.dtype = dtype
    folder = Path(tmp_path) / f"qwen2-{os.getpid()}-{next(_counter)}"
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model, folder


def randomize(model: torch.nn.Module, seed: int, initializer_range: float) -> None:
    """Draw every parameter from the seed: norms around 1, all else, biases too, around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * initializer_range
        parameter.data.copy_(noise + 1 if name.endswith("norm.weight") else noise)


def load_ours(folder: Path | str, dtype: torch.dtype | str = "auto") -> ours.Qwen2ForCausalLM:
    """minivllm's model of the same folder."""
    return load_model(folder, dtype)


def ids(seed: int, length: int, vocab: int = 128) -> Tensor:
    """Random token ids (length,)."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))


def our_logits(model: ours.Qwen2ForCausalLM, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits (T, V) of one sequence, everything recomputed."""
    positions = torch.arange(len(input_ids)) if positions is None else positions
    caches = [ours.NoCache() for _ in model.model.layers]
    return model.compute_logits(model(input_ids, positions, caches, SimpleNamespace(slot_mapping=None)))


def hf_logits(model: Qwen2ForCausalLM, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits (T, V) of one sequence from transformers."""
    positions = None if positions is None else positions[None]
    with torch.no_grad():
        return model(input_ids[None], position_ids=positions, use_cache=False).logits[0]
