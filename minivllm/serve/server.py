"""The process: a socket, an engine, an event loop, and a clean end.

Owns the order of a start (the port is taken before the model is loaded, so a port in use costs no minute of waiting) and of
an end: stop admitting, let requests finish for `--shutdown-timeout`, abort the rest, close the streams, stop the engine. Ctrl-C
and SIGTERM both mean that, and exit with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import uvicorn

from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.serve.app import create_app
from minivllm.serve.args import ServeArgs, parse_args
from minivllm.serve.service import Service

logger = logging.getLogger("minivllm.serve")
ABORT_SECONDS = 1.0  # for the engine to end its step and hand over the last outputs
ERROR_SECONDS = 1.0  # for streams to be told that the engine has failed
WANTED_FILES = 65536
TICK = 0.1  # uvicorn looks for a reason to end this often


class StartError(Exception):
    """The server cannot start; the message is for the user."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m minivllm.serve") -> int:
    """Serve until a signal. Returns only if nothing could be served: 2 for a wrong flag or value, else 1."""
    args = parse_args(sys.argv[1:] if argv is None else argv, prog)
    try:
        with bind(args.host, args.port) as listener:
            serve(args, listener)
    except ValidationError as error:
        flag = f"--{error.parameter.replace('_', '-')}: " if error.parameter else ""
        return _fail(f"{prog}: error: {flag}{error}", 2)
    except CheckpointError as error:
        return _fail(f"{prog}: error: --model: {error}", 2)
    except StartError as error:
        return _fail(f"{prog}: error: {error}", 1)
    except KeyboardInterrupt:  # while loading
        return 130


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is there, other servers from now on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host: cannot listen on {host!r}: {error}") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = "is in use: stop the other server or pass another --port" if error.errno == errno.EADDRINUSE else f": {error}"
        raise StartError(f"--port: {host}:{port} {reason}") from error
    return listener


def serve(args: ServeArgs, listener: socket.socket) -> NoReturn:
    """Load the engine, serve on `listener` until a signal or a failure, and end the process: with 1 after a failure."""
    from minivllm.async_engine import AsyncEngine  # torch and transformers: seconds that a wrong flag should not cost

    _raise_file_limit()
    if not args.is_loopback and not args.server.api_keys:
        logger.warning("listening on %s without --api-key: everyone who reaches this address can use the model", args.host)
    engine = AsyncEngine.from_config(args.engine)
    service = Service(engine, args.server)
    gc.collect()
    gc.freeze()  # what is loaded by now lives to the end: the collector need not look at 400,000 objects again and again
    config = uvicorn.Config(create_app(service), log_level=args.uvicorn_log_level, timeout_graceful_shutdown=1,
                            **args.connection.for_uvicorn())
    server = Server(config, service, args.shutdown_timeout, banner(args, listener.getsockname()[1]))
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again when it has ended; by then there is nothing left to do.
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    # The engine was stopped in `drain`. What is left, a step that nobody waits for and the teardown of torch, takes a second
    # or more and saves nothing.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1 if engine.errored else 0)


def _raise_file_limit() -> None:
    """Every connection is an open file, and many systems start with a limit of 1024."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS names no hard limit and has one; the server serves without
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def banner(args: ServeArgs, port: int) -> str:
    """Where the server is, and a command to try at once."""
    host = "127.0.0.1" if args.host in ("0.0.0.0", "::", "") else f"[{args.host}]" if ":" in args.host else args.host
    url = f"{'https' if args.connection.ssl_certfile else 'http'}://{host}:{port}"
    key = ' -H "Authorization: Bearer $MINIVLLM_API_KEY"' if args.server.api_keys else ""
    return (f"minivllm serves {args.server.served_model_names[0]} at {url}. Open it in a browser, or try:\n\n"
            f'  curl -s {url}/v1/chat/completions -H "Content-Type: application/json"{key} \\\n'
            """    -d '{"messages": [{"role": "user", "content": "What is a block?"}]}'\n""")


class Server(uvicorn.Server):
    """uvicorn, with this project's start and end."""

    def __init__(self, config: uvicorn.Config, service: Service, shutdown_timeout: float, greeting: str) -> None:
        super().__init__(config)
        self.service = service
        self.shutdown_timeout = shutdown_timeout
        self.greeting = greeting
        self.seconds_since_failure = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """A failed engine never comes back: its requests are told, /health says 503 for a moment, and the process ends."""
        if self.service.engine.errored:
            self.seconds_since_failure += TICK
            self.should_exit |= self.seconds_since_failure > ERROR_SECONDS
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.drain()
        await super().shutdown(sockets)

    async def drain(self) -> None:
        """Refuse new requests, wait for those in flight, abort what is left, and end streams that still do not end."""
        self.service.is_draining = True
        self.service.live.end()
        await self._wait_for_requests(self.shutdown_timeout)
        engine: Any = self.service.engine
        await asyncio.get_running_loop().run_in_executor(None, engine.shutdown, ABORT_SECONDS)
        await self._wait_for_requests(TICK)
        self.service.stopping.set()

    async def _wait_for_requests(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            if not self.server_state.tasks or self.force_exit:
                return
            await asyncio.sleep(TICK)
