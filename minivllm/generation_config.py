"""generation_config.json: the model maker's sampling defaults, and the ids that end a text.

Hidden defaults are a classic trap: Qwen2.5 ships temperature 0.7, top_p 0.8, top_k 20 and a repetition penalty, and a
request that names none of them gets all of them. So they are read in one place and named in the start-up report.
`generation_config="none"` (alias "vllm") turns the defaults off; EOS ids stay, they are facts about the model.

    the request's own value  >  the checkpoint's default  >  SamplingParams' default      for HTTP, and `generate()` without params

An explicit `SamplingParams` in Python stands as it is. That is vLLM's rule too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.sampling_params import SamplingParams

# generation_config.json's name -> SamplingParams' name; the list is vLLM's (vllm/config/model.py)
SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
FIELDS = {name: name for name in SAME} | {"max_new_tokens": "max_tokens"}
OFF = ("none", "vllm")


@dataclass
class GenerationDefaults:
    """What a request gets where it says nothing (`sampling`), where that comes from, and the ids that end it.

    `eos_token_ids[0]` is the tokenizer's own: ending on it has no stop_reason, ending on another one reports its id.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    source: str = "minivllm's own"
    eos_token_ids: tuple[int, ...] = ()

    def describe(self) -> str:
        """For the report: the values in force and where they come from."""
        shown = ", ".join(f"{name} {value}" for name, value in self.sampling.items()) or "temperature 1.0, nothing else"
        return f"{shown} (from {self.source})"


def read_generation_config(folder: Path, choice: str, tokenizer: Any | None) -> GenerationDefaults:
    """Defaults and EOS ids of a checkpoint. Raises `ValidationError` for a folder without the file or a wrong value in it."""
    own = _read_json(folder / "generation_config.json")
    eos_token_ids = collect_eos_token_ids(own, _read_json(folder / "config.json"), tokenizer)
    if choice in OFF:
        return GenerationDefaults(source="minivllm's own, generation_config is off", eos_token_ids=eos_token_ids)
    source = own
    if choice != "auto":
        source = _read_json(Path(choice) / "generation_config.json")
        if not source:
            raise ValidationError(f'generation_config must be "auto", "none" or a folder with a generation_config.json, '
                                  f"got {choice!r}", parameter="generation_config", value=choice)
    sampling = {ours: source[theirs] for theirs, ours in FIELDS.items() if source.get(theirs) is not None}
    try:
        SamplingParams(**sampling)
    except ValidationError as error:
        raise CheckpointError(f"generation_config.json: {error}. Correct the file, or pass generation_config='none'") from error
    return GenerationDefaults(sampling, "generation_config.json" if sampling else "minivllm's own", eos_token_ids)


def collect_eos_token_ids(generation: dict[str, Any], config: dict[str, Any], tokenizer: Any | None) -> tuple[int, ...]:
    """All ids that end a text, the tokenizer's own first.

    Base and instruct checkpoints disagree about which one it is (traps.md T41), so all of them count.
    """
    ids: list[int] = []
    tokenizer_eos = getattr(tokenizer, "eos_token_id", None)
    for given in (tokenizer_eos, generation.get("eos_token_id"), config.get("eos_token_id") if not generation else None):
        ids += given if isinstance(given, list) else [] if given is None else [given]
    return tuple(dict.fromkeys(ids))


def _read_json(path: Path) -> dict[str, Any]:
    """The file's content; {} if there is no such file. Raises `CheckpointError` if it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return content
