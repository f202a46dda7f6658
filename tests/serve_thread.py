"""The application on a real socket and a thread of this process: for what a client does to a connection."""

from __future__ import annotations

import socket
import threading

import uvicorn
from serve_doubles import ScriptedEngine

from minivllm.serve.app import create_app
from minivllm.serve.args import parse_args
from minivllm.serve.service import Service


class ServeThread:
    """A `ScriptedEngine` behind uvicorn with the command line's connection options, on 127.0.0.1 and a free port."""

    def __init__(self, *flags: object, engine: ScriptedEngine | None = None) -> None:
        args = parse_args(list(map(str, flags)))
        self.engine = engine or ScriptedEngine()
        self.service = Service(self.engine, args.server)
        config = uvicorn.Config(create_app(self.service), log_level="critical", timeout_graceful_shutdown=1,
                                **args.connection.for_uvicorn())
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if args.connection.ssl_certfile else 'http'}://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def __enter__(self) -> ServeThread:
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()
