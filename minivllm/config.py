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
