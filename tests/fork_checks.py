"""Many checks of exercises, each in a process of its own, without paying for the imports each time.

`Checker.run` sends cases to one warm process, which has imported the libraries and nothing of minivllm; it forks for each case,
as many at once as there are cores. Where there is no fork (Windows), every case is run as `learn check` runs it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ != "__main__":  # the warm process must not know the package: each case imports it with its own overlay
    from minivllm.learn_check import Story, conclude, read, run_tests

ROOT = Path(__file__).parent.parent
CAN_FORK = hasattr(os, "fork")
AT_ONCE = min(4, os.cpu_count() or 1)


class Checker:
    """Runs tests with a text in the place of a module. The warm process ends with `close`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, cwd=ROOT) if CAN_FORK else None

    def run(self, module: str, sources: list[str], tests: tuple[str, ...]) -> list[Story]:
        """The story of each source, in order."""
        with tempfile.TemporaryDirectory() as folder:
            cases = []
            for number, source in enumerate(sources):
                overlay = Path(folder, str(number))
                overlay.mkdir()
                (overlay / f"{module}.py").write_text(source, encoding="utf-8")
                cases.append({"overlay": str(overlay), "tests": tests})
            if self.process is None:
                return [run_tests(tests, Path(case["overlay"]), ROOT) for case in cases]
            self.process.stdin.write(json.dumps(cases) + "\n")
            self.process.stdin.flush()
            statuses = json.loads(self.process.stdout.readline())
            return [story_of(Path(case["overlay"]), status) for case, status in zip(cases, statuses, strict=True)]

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(30)


def warm_up() -> None:
    """Import what tests import and what is not minivllm's."""
    import hypothesis
    import pytest
    import torch
    import torch.nn.attention.flex_attention
    import torch.utils.flop_counter
    import transformers.generation
    import transformers.models.qwen2.modeling_qwen2

    assert hypothesis and pytest and torch and transformers
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    gc.collect()
    gc.freeze()  # pytest collects garbage at its end: half a second for what is the parent's


def run_case(case: dict) -> int:
    """In the forked process: what `learn_check.main` does in a fresh one."""
    silent = os.open(str(Path(case["overlay"], "output.txt")), os.O_WRONLY | os.O_CREAT)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.environ["MINIVLLM_MINE"] = case["overlay"]
    from minivllm.learn_check import main

    return main([str(Path(case["overlay"], "report.json")), "0", *case["tests"]])


def fork(case: dict) -> int:
    """Start a case and return its process id."""
    pid = os.fork()
    if pid == 0:
        status = 99
        signal.alarm(60)
        try:
            status = run_case(case)
        finally:
            os._exit(status)
    return pid


def story_of(overlay: Path, status: int) -> Story:
    return conclude(status, read(overlay / "report.json"), (overlay / "output.txt").read_text(encoding="utf-8"))


def serve() -> None:
    """Answer each line of cases with one line of exit statuses."""
    for line in sys.stdin:
        cases, running, status = json.loads(line), {}, {}
        for number, case in enumerate(cases):
            if len(running) == AT_ONCE:
                reap(running, status)
            running[fork(case)] = number
        while running:
            reap(running, status)
        print(json.dumps([status[number] for number in range(len(cases))]), flush=True)


def reap(running: dict[int, int], status: dict[int, int]) -> None:
    pid, code = os.wait()
    status[running.pop(pid)] = os.waitstatus_to_exitcode(code)


if __name__ == "__main__":
    warm_up()
    sys.path[:0] = [str(ROOT)]
    serve()
