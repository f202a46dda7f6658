"""Models of published sizes without a download: a config.json, and random weights in its shape (`--load-format dummy`).

Speed does not depend on the values of the weights, so anyone can measure a 7B without having it. Owns the numbers of the
published files and nothing else.

    folder = write_shape("qwen2.5-0.5b", tmp_path)      LLM(folder, load_format="dummy", skip_tokenizer_init=True)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "max_position_embeddings": 32_768, "attention_dropout": 0.0, "initializer_range": 0.02,
    "use_cache": True, "use_sliding_window": False, "torch_dtype": "bfloat16",
}


def _shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return COMMON | {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _shape(24, 896, 4864, 14, 2, 151_936, True),
    "qwen2.5-1.5b": _shape(28, 1536, 8960, 12, 2, 151_936, True),
    "qwen2.5-7b": _shape(28, 3584, 18_944, 28, 4, 152_064, False),
    # For a laptop's processor: 29 million parameters, 116 MB in float32, so that it does not fit into a cache.
    "tiny-cpu": _shape(8, 512, 1536, 8, 2, 8192, True) | {"torch_dtype": "float32"},
}


def write_shape(name: str, folder: Path) -> Path:
    """Write the shape's config.json into a new folder of its name below `folder`, and return that."""
    home = folder / name
    home.mkdir()
    (home / "config.json").write_text(json.dumps(SHAPES[name], indent=2), encoding="utf-8")
    return home
