"""Which bench to run. Owns the names and the exit status: 2 for a wrong flag or value, 1 for a run that failed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from minivllm.bench.flags import BenchError
from minivllm.exceptions import CheckpointError, ValidationError

BENCHES = {
    "throughput": "tokens a second, of one engine or of several side by side",
    "latency": "seconds for one batch from start to end",
    "anatomy": "where the milliseconds of a step go on a GPU",
    "serve": "what clients of an OpenAI server see: TTFT, TPOT, ITL, goodput",
    "speculation": "what guessing ahead brings at a known acceptance, and where it loses",
    "scheduler": "microseconds of scheduling a step, however many requests wait",
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m minivllm.bench") -> int:
    """Run one bench. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage(prog))
        return 0
    if not arguments or arguments[0] not in BENCHES:
        what = f"unknown bench {arguments[0]!r}" if arguments else "the name of a bench is missing"
        return _fail(f"{prog}: error: {what}: use {', '.join(BENCHES)} ({prog} --help)", 2)
    name = arguments[0]
    bench = importlib.import_module(f"minivllm.bench.{name}")  # torch loads only for the benches that compute
    try:
        status = bench.main(arguments[1:], f"{prog} {name}")
        sys.stdout.flush()
        return status
    except (ValidationError, CheckpointError) as error:
        parameter = "model" if isinstance(error, CheckpointError) else error.parameter
        flag = f"--{parameter.replace('_', '-')}: " if parameter else ""
        return _fail(f"{prog} {name}: error: {flag}{error}", 2)
    except BenchError as error:
        return _fail(f"{prog} {name}: error: {error}", 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on, as behind `| head`: what is still buffered must not be told either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def usage(prog: str) -> str:
    lines = [f"  {name:<11} {what}   ({prog} {name} --help)" for name, what in BENCHES.items()]
    return f"usage: {prog} BENCH ...\n\n" + "\n".join(lines)


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
