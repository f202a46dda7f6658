"""The folder mine/: a learner's copies of modules, and a note of hints shown and exercises passed.

Owns every write of the course, and one promise: nothing that a learner wrote is ever lost. A file is written beside its place
and then moved there whole (`os.replace`), so an interrupted write leaves the old one; `put_aside` keeps a copy under a new name.

    mine/block_pool.py      the learner's module; its last line is a `Mark`: started exercises, and which reference it is a copy of
    mine/block_pool.1.py    what was there before a reset
    mine/learn.json         hints shown, and digests of what has passed: whoever loses it loses no work
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minivllm
from minivllm.blanks import SourceError, code_of, find, fingerprint, parse
from minivllm.exercises import EXERCISES, Exercise

MARK = re.compile(r"^# minivllm\.learn: ([\w ,-]*) in a copy of ([0-9a-f]{12})[^\n]*\n?", re.MULTILINE)


class LearnError(Exception):
    """What a learner asked for cannot be done; the message says why, and what to do."""


@dataclass(frozen=True)
class Mark:
    """The last line of a learner's file. `fingerprint` is empty where the line is missing."""

    started: tuple[str, ...] = ()
    fingerprint: str = ""

    @classmethod
    def of(cls, source: str) -> Mark:
        found = MARK.findall(source)
        return cls(tuple(found[-1][0].split(", ")), found[-1][1]) if found else cls()

    def __str__(self) -> str:
        return f"# minivllm.learn: {', '.join(self.started)} in a copy of {self.fingerprint} (leave this line: check reads it)"


@dataclass(frozen=True)
class Workshop:
    """The clone at `root`, its reference modules in `package`, and the learner's folder `mine`."""

    root: Path
    package: Path
    mine: Path

    @classmethod
    def find(cls) -> Workshop:
        """Where this package lies; mine/ beside it, or the folder that MINIVLLM_MINE names."""
        package = Path(minivllm.__path__[-1]).resolve()  # the last: an overlay stands before it
        return cls(package.parent, package, Path(os.environ.get("MINIVLLM_MINE") or package.parent / "mine").resolve())

    def need_tests(self) -> None:
        if not (self.root / EXERCISES[0].tests[0].split("::")[0]).is_file():
            raise LearnError(f"the exercises' tests are not beside the package in {self.root}: they come with a clone of the "
                             f"repository, not with the wheel. Clone it, and in the clone: pip install -e '.[dev]'")

    def path(self, module: str) -> Path:
        return self.mine / f"{module}.py"

    def shown(self, module: str) -> str:
        """The path as the learner would type it."""
        return shown(self.path(module))

    def reference(self, module: str) -> str:
        return (self.package / f"{module}.py").read_text(encoding="utf-8")

    def read(self, module: str) -> str:
        """The learner's text, its line ends as they are."""
        try:
            return self.path(module).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise LearnError(f"{self.shown(module)} is not UTF-8: {error.reason} at byte {error.start}") from None

    def mark(self, module: str) -> Mark:
        return Mark.of(self.read(module)) if self.path(module).exists() else Mark()

    def lost_mark(self, module: str) -> tuple[Mark, bool]:
        """What the last line of a file without one would say: exercises whose functions differ from today's reference are started.

        Sure if nothing else differs; an empty mark if the file lacks a function of the module.
        """
        mine, reference, shown = self.read(module), self.reference(module), self.shown(module)
        parse(mine, shown)
        try:
            started = tuple(exercise.name for exercise in EXERCISES if exercise.module == module and any(
                code_of(find(mine, name, shown)) != code_of(find(reference, name, module)) for name in exercise.blanks))
            mark = Mark(started, self.fingerprint(module, started))
            return mark, fingerprint(mine, self.names_of(module, started), shown) == mark.fingerprint
        except SourceError:
            return Mark(), False

    def names_of(self, module: str, started: tuple[str, ...]) -> list[str]:
        return [name for exercise in EXERCISES if exercise.name in started and exercise.module == module
                for name in exercise.blanks]

    def fingerprint(self, module: str, started: tuple[str, ...]) -> str:
        """Of the reference without the functions of these exercises."""
        return fingerprint(self.reference(module), self.names_of(module, started), module)

    def has_aged(self, module: str) -> bool:
        """Whether the reference has changed, outside of the functions that were started, since the learner's file was copied."""
        mark = self.mark(module)
        return mark.fingerprint != self.fingerprint(module, mark.started)

    def write(self, module: str, source: str, started: tuple[str, ...]) -> None:
        """Put a copy of today's reference in its place, with a new mark as its last line."""
        text = MARK.sub("", source)
        ending = "\r\n" if "\r\n" in text else "\n"
        text += "" if text.endswith("\n") else ending
        replace(self.path(module), f"{text}{Mark(started, self.fingerprint(module, started))}{ending}".encode())

    def put_aside(self, module: str) -> str:
        """Keep the file under the first free name, block_pool.1.py, block_pool.2.py, ...; what it is called."""
        content = self.path(module).read_bytes()
        number = 1
        while True:
            aside = self.mine / f"{module}.{number}.py"
            try:
                with open(aside, "xb") as file:  # x: never over a file that is there
                    file.write(content)
                return shown(aside)
            except FileExistsError:
                number += 1

    def notes(self) -> dict[str, Any]:
        path = self.mine / "learn.json"
        try:
            notes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            notes = {}
        return notes if isinstance(notes, dict) else {}

    def note(self, exercise: Exercise, key: str, value: object) -> None:
        notes = self.notes()
        notes.setdefault(exercise.name, {})[key] = value
        replace(self.mine / "learn.json", f"{json.dumps(notes, indent=1)}\n".encode())

    def passed(self, exercise: Exercise) -> object:
        """What stands for the code that passed last, or None."""
        return self.notes().get(exercise.name, {}).get("passed")

    def count_hint(self, exercise: Exercise, most: int) -> int:
        """One more than before, `most` at most."""
        count = min(most, int(self.notes().get(exercise.name, {}).get("hints", 0)) + 1)
        self.note(exercise, "hints", count)
        return count


def shown(path: Path) -> str:
    """Relative to where the learner stands, if it is below."""
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".learn-", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
