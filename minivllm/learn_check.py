"""Running an exercise's tests on a learner's file, in a process of its own, and turning a failure into a story of three lines:

    promise  what the test says in its docstring
    broken   the sentence of the assertion that failed, or of the error
    when     the smallest example that Hypothesis found

`run_tests` starts the process; `python -m minivllm.learn_check REPORT TEST...` is the process. The tests run where no learner
writes: on a copy of the file, in a temporary folder that shadows the package (see minivllm/__init__.py).
"""

from __future__ import annotations

import json
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

TIME_LIMIT = 60.0  # seconds
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
    if missing := re.match(r"DID NOT RAISE (?:<class ')?([\w.]+)", lines[0]):  # pytest.raises, as the next one
        return f"nothing was raised, and the right answer raises {missing[1]}"
    if lines[0].startswith("Regex pattern did not match"):
        return " ".join(line.strip() for line in lines)
    if lines[0] and (isinstance(error, AssertionError) or lines[0].startswith(YOUR_TURN)):
        return lines[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_mine(frame.filename)]
    where = f" (in {frames[-1].name}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {lines[0]}{where}".replace(": (in", " (in")


def is_mine(filename: str) -> bool:
    mine = os.environ.get("MINIVLLM_MINE")
    return bool(mine) and Path(filename).parent == Path(str(mine))


def example_of(error: BaseException) -> str:
    """Hypothesis' smallest example, as it stands in the error's notes, in one line."""
    for note in getattr(error, "__notes__", []):
        found = re.search(r"^(?:Falsifying|Failing) .*?: \w+\((.*)\)", note, re.DOTALL)
        if found:
            return " ".join(line.strip() for line in found[1].splitlines()).strip(" ,")
    return ""


def parameters_of(node: Any) -> str:
    """The values of a parametrized test, which are the whole example if Hypothesis drew none."""
    values = getattr(getattr(node, "callspec", None), "params", {})
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def run_tests(tests: Sequence[str], overlay: Path, root: Path, time_limit: float = TIME_LIMIT) -> Story:
    """Run tests of the clone at `root` with `overlay` shadowing the package; the story of the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "minivllm.learn_check", str(report), *tests]
        try:
            done = subprocess.run(command, cwd=root, env=environment(overlay), capture_output=True, text=True, encoding="utf-8",
                                  errors="replace", timeout=time_limit, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return Story(read(report).promise, f"no result after {time_limit:.0f} seconds: is there a loop that never ends?")
        return conclude(done.returncode, read(report), done.stdout + done.stderr)


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
    """Run the tests named behind the report's path, in this process."""
    import pytest  # the learner's command says how to install it before it comes here

    report, *tests = arguments
    return int(pytest.main([*OPTIONS, *tests], plugins=[StoryTeller(Path(report))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
