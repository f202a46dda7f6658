"""The `minivllm` command: one name, a subcommand for each thing to do.

    minivllm serve [MODEL] ...      the same as python -m minivllm.serve
    minivllm bench BENCH ...        the same as python -m minivllm.bench
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from minivllm.version import __version__

SUBCOMMANDS = {"serve": "answer OpenAI's HTTP API", "bench": "measure throughput, latency, or a server"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 2 for a name that does not exist."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "serve":
        from minivllm.serve.server import main as serve  # the server's libraries load only for it

        return serve(arguments[1:], "minivllm serve")
    if arguments and arguments[0] == "bench":
        from minivllm.bench.command import main as bench

        return bench(arguments[1:], "minivllm bench")
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    what = f"unknown subcommand {arguments[0]!r}" if arguments else "a subcommand is missing"
    print(f"minivllm: error: {what}: use {', '.join(SUBCOMMANDS)} (minivllm --help)", file=sys.stderr)
    return 2


def usage() -> str:
    lines = [f"  {name:<8} {what}   (minivllm {name} --help)" for name, what in SUBCOMMANDS.items()]
    return "usage: minivllm SUBCOMMAND ...\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
