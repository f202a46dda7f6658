"""How a connection is made and how long it may be silent: TLS, the path behind a proxy, and three patiences.

    head     ---- GET /v1/models ... ----      --timeout-receive for all of it, from the first byte or the connection on
    body     ---- {"prompt": ... ----          --timeout-receive between two pieces
    idle     answer ........ next head         --timeout-keep-alive

Whoever sends half a head and then nothing would hold an open file for ever; a thousand of those would hold them all. An answer
may take as long as it takes, and its reader too: a stream keeps only its newest output (streams.py).
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minivllm.exceptions import ValidationError

NAMES = ("root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "timeout_keep_alive", "timeout_receive")


@dataclass(frozen=True)
class ConnectionOptions:
    """What the server's sockets are told. The names are uvicorn's and vLLM's."""

    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    timeout_keep_alive: float = 5.0
    timeout_receive: float = 30.0

    def __post_init__(self) -> None:
        """Raises `ValidationError` that names the flag, so that a mistake is found before a model is loaded."""
        for name in ("timeout_keep_alive", "timeout_receive"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValidationError(f"must be a number of seconds above 0, got {getattr(self, name)}", parameter=name)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/") or not self.root_path.isascii()):
            raise ValidationError(f"must begin with a slash and not end with one, got {self.root_path!r}", parameter="root_path")
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ValidationError("needs --ssl-certfile", parameter=name)
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) and not os.path.isfile(getattr(self, name)):
                raise ValidationError(f"there is no file {getattr(self, name)!r}", parameter=name)
        self._try_certificate()

    def _try_certificate(self) -> None:
        if self.ssl_certfile:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            except (ssl.SSLError, OSError) as error:
                raise ValidationError(f"no certificate with its key: {error}", parameter="ssl_certfile") from error

    def for_uvicorn(self) -> dict[str, Any]:
        """Arguments of `uvicorn.Config`."""
        given = {name: getattr(self, name) for name in NAMES if name != "timeout_receive"}
        return given | {"http": functools.partial(ImpatientProtocol, self.timeout_receive, Outbox())}


def add_connection_flags(group: Any) -> None:
    group.add_argument("--root-path", metavar="PATH", help="where a proxy shows this server, e.g. /llm; it takes that off")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve https with this certificate (PEM, with its chain)")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, if the certificate's file does not hold it")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="who signs clients' certificates, for --ssl-cert-reqs")
    group.add_argument("--ssl-cert-reqs", type=int, choices=(0, 1, 2), help="clients' certificates: 0 none, 1 if there, 2 required")
    group.add_argument("--timeout-keep-alive", type=float, metavar="SECONDS",
                       help="how long a connection may be idle between two requests (default: 5)")
    group.add_argument("--timeout-receive", type=float, metavar="SECONDS",
                       help="how long a request's head may take to come, and its body to go on (default: 30)")


def take_connection_options(values: dict[str, Any]) -> ConnectionOptions:
    """The options among the values of the command line, which are taken out of them. Raises `ValidationError`."""
    return ConnectionOptions(**{name: values.pop(name) for name in NAMES if name in values})


class Outbox:
    """What a step has brought for many readers, sent in one go when all of it is written.

    Every system call gives the GIL away and wants it back, and so does every operation of the engine's thread: the less Python
    there is between two sends, the less they wait for each other (64 streams: 10 of 183 microseconds a token).
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[asyncio.Transport, bytes]] = []

    def add(self, transport: asyncio.Transport, data: bytes) -> None:
        if not self.pieces:
            asyncio.get_running_loop().call_soon(self.send)
        self.pieces.append((transport, data))

    def send(self) -> None:
        pieces, self.pieces = self.pieces, []
        for transport, data in pieces:
            if not transport.is_closing():
                transport.write(data)


class ChunkWriter:
    """Writes pieces of a chunked body past three layers that only hand them on: 20 of 70 microseconds of a streamed token.

    Between the first and the last message of an answer without Content-Length: there h11 writes the same and keeps no state.
    """

    def __init__(self, protocol: H11Protocol, outbox: Outbox) -> None:
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.outbox = outbox
        self.written_at = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether the reader keeps up, so that `post` may be called."""
        return not (self.flow.write_paused or self.transport.is_closing())

    def post(self, data: bytes) -> None:
        """Hand over a piece without waiting. It goes out with everybody's, before anything that is written later."""
        self.written_at = time.monotonic()
        self.outbox.add(self.transport, b"%x\r\n%b\r\n" % (len(data), data))

    def flush(self) -> None:
        """Send what was posted now, before the answer goes on in another way."""
        self.outbox.send()

    async def write(self, data: bytes) -> None:
        """Hand over a piece; waits while the reader is slow. A reader that has gone is noticed elsewhere (streams.py)."""
        self.flush()
        self.written_at = time.monotonic()
        if self.flow.write_paused:
            await self.flow.drain()
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which closes a connection whose request does not come. (uvicorn's own timer is for idle ones.)

    It also shows every request a short way to the socket, `scope["minivllm.writer"]`, and takes the public path off where the
    proxy has not.
    """

    def __init__(self, seconds: float, outbox: Outbox, **given: Any) -> None:
        super().__init__(**given)
        self.seconds = seconds
        self.outbox = outbox
        self.timer: asyncio.TimerHandle | None = None
        self.inner_app, self.app = self.app, self._with_writer

    async def _with_writer(self, scope: Any, receive: Any, send: Any) -> None:
        sent = scope["path"].removeprefix(self.root_path)  # uvicorn has put it in front
        if self.root_path and f"{sent}/".startswith(f"{self.root_path}/"):
            scope["path"] = sent if sent != self.root_path else f"{sent}/"
        if scope["http_version"] == "1.1":  # for HTTP/1.0 there are no chunks
            scope["minivllm.writer"] = ChunkWriter(self, self.outbox)
        await self.inner_app(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def _expect(self) -> None:
        """Give what is missing of a request its time: a head as a whole, a body that somebody reads anew with every piece."""
        state = self.conn.their_state
        if state not in (h11.IDLE, h11.SEND_BODY):
            self._cancel()
        elif self.timer is None or (state is h11.SEND_BODY and self.conn.our_state is not h11.DONE):
            self._cancel()
            self.timer = self.loop.call_later(self.seconds, self._give_up)

    def _cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _give_up(self) -> None:
        """Close without a word: who drips bytes would drip on. A body that we have not taken is not the client's delay."""
        self.timer = None
        if self.flow.read_paused:
            self._expect()
        else:
            self.transport.abort()
