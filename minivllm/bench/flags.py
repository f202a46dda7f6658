"""Flags that the benches share, and how a wrong one is answered: one line that names it.

Owns no meaning: workload flags go to workload.py, and every field of `EngineConfig` is a flag of its own name, made from the
dataclass, so that a new knob of the engine can be benched on the day it exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from minivllm.config import ATTENTION_BACKENDS, DTYPES, LOAD_FORMATS, EngineConfig
from minivllm.engine_args import ALIASES, NEUTRAL, WITHOUT_EFFECT, nearest_name
from minivllm.exceptions import ValidationError

ENGINE_FIELDS = tuple(field.name for field in dataclasses.fields(EngineConfig))
CHOICES = {"dtype": DTYPES, "attention_backend": ATTENTION_BACKENDS, "load_format": LOAD_FORMATS}
SCALARS = {"int": int, "float": float, "str": str}


class BenchError(RuntimeError):
    """A run that cannot go on; the message is for the user, and the exit status is 1."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage in front of the one line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(parser: OneLineParser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags, or exit status 2. --max_model_len is --max-model-len; an unknown flag is answered with the nearest one.

    Raises `ValidationError` for an `--output-json` that cannot be written.
    """
    args, unknown = parser.parse_known_args([_dashed(argument) for argument in argv])
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{nearest_name(unknown[0].partition('=')[0], known)}")
    require_file_name(getattr(args, "output_json", None), "output_json")
    return args


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_engine_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """A flag for every field of `EngineConfig`, None where it is not given, and vLLM's that change nothing, without help."""
    group = parser.add_argument_group("engine", "fields of EngineConfig, under vLLM's names")
    for field in dataclasses.fields(EngineConfig):
        if field.name in without:
            continue
        spellings = [flag(field.name), *(flag(alias) for alias, name in ALIASES.items() if name == field.name)]
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            group.add_argument(*spellings, action=argparse.BooleanOptionalAction, default=None, help=f"(default: {field.default})")
        else:
            group.add_argument(*spellings, type=SCALARS.get(kind, json_or_text), choices=CHOICES.get(field.name),
                               help=f"(default: {field.default})")
    for name in (*NEUTRAL, *WITHOUT_EFFECT):
        if name not in ENGINE_FIELDS:
            group.add_argument(flag(name), nargs="?", const=True, type=json_or_text, help=argparse.SUPPRESS)


def engine_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's arguments that were given, for `LLM(**kwargs)`."""
    names = (*ENGINE_FIELDS, *NEUTRAL, *WITHOUT_EFFECT)
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def require(holds: bool, parameter: str, wanted: str, value: object) -> None:
    """Raise the `ValidationError` that becomes `--parameter: must be ..., got ...`."""
    if not holds:
        raise ValidationError(f"must be {wanted}, got {value!r}", parameter=parameter, value=value)


def require_at_least(args: argparse.Namespace, low: int, *names: str) -> None:
    for name in names:
        require(getattr(args, name) >= low, name, f"{low} or more", getattr(args, name))


def require_file_name(path: str | None, parameter: str) -> None:
    """Raise for a result file that cannot be written: told before the run, not after it."""
    if path is not None and Path(path).is_dir():
        raise ValidationError(f"{path!r} is a folder: name a file in it", parameter=parameter)
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise ValidationError(f"{path!r} lies in a folder that does not exist", parameter=parameter)


def own_command() -> str:
    """How to do it again. Folders are this machine's own affair, and a result is there to be shown: only their last names stay."""
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", "minivllm.bench", *arguments])
