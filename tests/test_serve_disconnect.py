"""Clients that leave at a chosen moment, and clients that read slowly: a real engine held between two steps, and real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from serve_doubles import ScriptedEngine, ScriptedStream
from serve_thread import ServeThread
from test_serve_limits import counts, folder, serve, until  # noqa: F401 (folder is a fixture)

from minivllm.request import CompletionOutput, RequestOutput

ASK = {"prompt": [1, 2, 3, 4, 5, 6], "max_tokens": 4, "ignore_eos": True, "temperature": 0}


class Visitor:
    """One request to the application itself, whose client can hang up."""

    def __init__(self, client, body) -> None:
        self.received: asyncio.Queue = asyncio.Queue()
        self.received.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent = b""
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "scheme": "http",
                 "http_version": "1.1", "headers": [(b"content-type", b"application/json")]}
        self.task = asyncio.create_task(client._transport.app(scope, self.received.get, self._send))

    async def _send(self, message) -> None:
        self.sent += message.get("body", b"")

    def hang_up(self) -> None:
        self.received.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "before the second token", "mid-stream"])
@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1}, {"prompt": [[1, 2], [3, 4, 5]]}], ids=["one", "n", "prompts"])
def test_who_leaves_gives_every_block_back_without_another_step(folder, stream, num_steps, more):  # noqa: F811
    """Whatever the moment: the request is gone and its blocks are free before the engine makes its next step."""
    num_requests = {"n": 3, "prompt": 2}.get(next(iter(more), ""), 1)

    async def story(client, engine):
        visitor = Visitor(client, ASK | {"stream": stream} | more)
        await until(engine, num_requests, 0)
        for _ in range(num_steps):
            await engine.step_once()
        before = await engine.call(lambda core: (core.kv_cache_manager.usage > 0, core.stats.num_steps))
        assert before == (num_steps > 0, num_steps)
        visitor.hang_up()
        await visitor.task
        assert await counts(engine) == (0, 0), "the abort has come before anything else"
        assert await engine.call(lambda core: (core.kv_cache_manager.usage, core.stats.num_steps)) == (0, num_steps)

    serve(folder, story, max_num_seqs=4)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_in_the_finishing_step_leaves_nothing_either(folder, stream):  # noqa: F811
    """The end and the hang-up meet: whichever is noticed first, the blocks are free and the engine goes on."""
    async def story(client, engine):
        for _ in range(5):
            visitor = Visitor(client, ASK | {"stream": stream})
            await until(engine, 1, 0)
            for _ in range(3):
                await engine.step_once()
            last_step = asyncio.create_task(engine.step_once())
            visitor.hang_up()
            await last_step
            await visitor.task
            assert await counts(engine) == (0, 0)
            assert await engine.call(lambda core: core.kv_cache_manager.usage) == 0
        await engine.resume()
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200

    serve(folder, story)


# Slow readers -----------------------------------------------------------------------------------------------------------------

STEP_TEXT, NUM_TOKENS = "x" * 2_000, 300


class Fountain(ScriptedStream):
    """300 tokens of 2,000 characters each, as fast as they are asked for: 600 kB."""

    async def __anext__(self):
        if self.num_tokens == NUM_TOKENS:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        self.num_tokens += 1
        ended = self.num_tokens == NUM_TOKENS
        answer = CompletionOutput(0, STEP_TEXT * self.num_tokens, [7] * self.num_tokens, None, None, "length" if ended else None)
        return RequestOutput(self.request_id, None, self.prompt, [answer], ended)


class FountainEngine(ScriptedEngine):
    async def add_request(self, prompt, params, request_id, *, cache_salt=None, final_only=False):
        kind = Fountain if params.max_tokens == 1 else ScriptedStream
        self.streams.append(kind(self, prompt, params, request_id))
        return self.streams[-1]


def test_a_stream_waits_for_its_reader_and_holds_little_for_it():
    """A reader that stops: chunks are made no further than the buffers go, others are served, and later nothing is missing."""
    body = json.dumps({"prompt": "Once", "max_tokens": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with ServeThread(engine=FountainEngine()) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # connections inherit it: the kernel holds little
        with server.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            slow.sendall(head.encode() + body)
            taken = -1
            while not server.engine.streams or taken != server.engine.streams[0].num_tokens:  # until it stands still
                taken = server.engine.streams[0].num_tokens if server.engine.streams else -1
                time.sleep(0.3)
            assert 0 < taken < NUM_TOKENS / 2, f"{taken} of {NUM_TOKENS} chunks were made for a reader that reads none"
            (connection,) = server.server.server_state.connections
            assert connection.transport.get_write_buffer_size() < 2**17, "at most uvicorn's 64 KiB and one chunk"
            with server.connect() as other:
                other.sendall(head.encode().replace(str(len(body)).encode(), b"17") + b'{"prompt":"Once"}')
                assert other.recv(65536).startswith(b"HTTP/1.1 200"), "nobody waits for a slow reader"
            answer = b""
            while b"data: [DONE]" not in answer[-100:]:
                answer += slow.recv(1 << 20)
    assert answer.count(b"x") >= NUM_TOKENS * len(STEP_TEXT), "everything arrived in the end"
    assert server.engine.streams[0].num_tokens == NUM_TOKENS
