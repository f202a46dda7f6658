"""Running an exercise's tests on a learner's file, in a process of its own, and turning a failure into a story of three lines:

    promise  what the test says in its docstring
    broken   the sentence of the assertion that failed, or of the error
    when     the smallest example that Hypothesis found, or the calls that a test has written down

`run_tests` starts the process; `python -m minivllm.learn_check REPORT SECONDS TEST...` is the process. The tests run where no
learner writes: on a copy of the file, in a temporary folder that shadows the package (see minivllm/__init__.py).
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minivllm.blanks import YOUR_TURN

TIME_LIMIT = 60.0  # seconds: for tests that run a model
GRACE = 5.0  # seconds that a process has to say where it hangs, before it is ended from outside
CALLS = "calls: "  # begins a note that a test adds to an error: what it called, which says more than what Hypothesis drew
MOST_CHARACTERS = 400  # of a line of the story
OPTIONS = ["-x", "-q", "--tb=no", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not gpu",
           "--hypothesis-profile=learn"]


@dataclass
class Story:
    """What became of an exercise's tests. `broken` is empty where all passed."""

    promise: str = ""
    broken: str = ""
    when: str = ""


class StoryTeller:
    """The pytest plugin: notes which test runs, so that one that never ends is known too, and why the first one failed."""

    def __init__(self, report: Path) -> None:
        self.report = report

    def tell(self, story: Story) -> None:
        self.report.write_text(json.dumps(asdict(story)), encoding="utf-8")

    def pytest_runtest_setup(self, item: Any) -> None:
        self.tell(Story(promise_of(item)))

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        error = call.excinfo.value
        self.tell(Story(promise_of(node), broken_by(error), example_of(error) or parameters_of(node)))


def promise_of(node: Any) -> str:
    """The first line of a test's docstring; a file that does not come as far as a test has promised to be imported."""
    doc = getattr(getattr(node, "function", None), "__doc__", None)
    return doc.strip().splitlines()[0] if doc else f"{node.nodeid} can be imported"


def broken_by(error: BaseException) -> str:
    """The sentence of an assertion or of an open blank as it is; of any other error its type and the line it came from."""
    lines = str(error).strip().splitlines() or [""]
    if type(error).__name__ == "CollectError":  # pytest's: the error is somewhere in a printed traceback
        return next((line.removeprefix("E ").strip() for line in reversed(lines) if line.startswith("E ")), lines[-1])
    if lines[0] and (isinstance(error, AssertionError) or lines[0].startswith(YOUR_TURN)):
        return lines[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_mine(frame.filename)]
    where = f" (in {frames[-1].name}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {lines[0]}{where}".replace(": (in", " (in")


def is_mine(filename: str) -> bool:
    mine = os.environ.get("MINIVLLM_MINE")
    return bool(mine) and Path(filename).parent == Path(str(mine))


def example_of(error: BaseException) -> str:
    """The calls that the test has written down, or else Hypothesis' smallest example, from the error's notes, in one line."""
    notes = getattr(error, "__notes__", [])
    for note in notes:
        if note.startswith(CALLS):
            return note.removeprefix(CALLS)
    for note in notes:
        found = re.search(r"^(?:Falsifying|Failing) .*?: \w+\((.*)\)", note, re.DOTALL)
        if found:
            return " ".join(line.strip() for line in found[1].splitlines()).strip(" ,")
    return ""


def parameters_of(node: Any) -> str:
    """The values of a parametrized test, which are the whole example if Hypothesis drew none."""
    values = getattr(getattr(node, "callspec", None), "params", {})
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def run_tests(tests: Sequence[str], overlay: Path, root: Path, time_limit: float = TIME_LIMIT) -> Story:
    """Run tests of the clone at `root` with `overlay` shadowing the package; the story of the first that fails.

    After `time_limit` seconds the process writes down where it is and ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "minivllm.learn_check", str(report), str(time_limit), *tests]
        try:
            done = subprocess.run(command, cwd=root, env=environment(overlay), capture_output=True, text=True, encoding="utf-8",
                                  errors="replace", timeout=time_limit + GRACE, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            done = None
        if place := hanging_at(report.with_suffix(".hang"), overlay):
            return Story(read(report).promise, f"no result after {time_limit:.0f} seconds: {place}")
        if done is None:
            return Story(read(report).promise, f"no result after {time_limit:.0f} seconds: is there a loop that never ends?")
        return conclude(done.returncode, read(report), done.stdout + done.stderr)


def hanging_at(dump: Path, overlay: Path) -> str:
    """Where a process was when its time was over, from faulthandler's report: the innermost line of the learner's file."""
    text = dump.read_text(encoding="utf-8", errors="replace") if dump.exists() else ""
    for filename, number, name in re.findall(r'^  File "(.*)", line (\d+) in (.*)$', text, re.MULTILINE):
        if Path(filename).parent.resolve() == overlay.resolve():
            return f"it hangs in {name}, line {number}: {linecache.getline(filename, int(number)).strip()}"
    return "is there a loop that never ends?" if text else ""


def environment(overlay: Path) -> dict[str, str]:
    """The process's own environment, with the overlay."""
    return os.environ | {"MINIVLLM_MINE": str(overlay), "PYTHONIOENCODING": "utf-8"}


def read(report: Path) -> Story:
    return Story(**json.loads(report.read_text(encoding="utf-8"))) if report.exists() else Story()


def conclude(status: int, story: Story, output: str = "") -> Story:
    """The story that a process left, given its exit status: a process that died between two lines has broken something too."""
    if status == 0:
        return Story()
    if not story.broken:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        story.broken = f"the tests ended with status {status}: {last}"
    story.broken, story.when = shorten(story.broken), shorten(story.when)
    return story


def shorten(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."


def main(arguments: Sequence[str]) -> int:
    """Run tests in this process: the report's path, the seconds they have (0: any number), and their ids."""
    import pytest  # the learner's command says how to install it before it comes here

    report, seconds, *tests = arguments
    if float(seconds):
        dump = open(Path(report).with_suffix(".hang"), "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=dump)
    return int(pytest.main([*OPTIONS, *tests], plugins=[StoryTeller(Path(report))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
