"""Tokens written as they arrive, past the tasks of their streams: the same bytes in the same order; and comments in silence."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from serve_doubles import ScriptedEngine
from serve_thread import ServeThread

from minivllm.async_engine import RequestStream
from minivllm.request import CompletionOutput, RequestOutput
from minivllm.serve.args import parse_args
from minivllm.serve.chat import ChatAnswer
from minivllm.serve.completions import CompletionAnswer
from minivllm.serve.connection import ChunkWriter, Outbox
from minivllm.serve.prompts import Prompt
from minivllm.serve.protocol import ChatBody, CompletionBody
from minivllm.serve.service import ServerOptions, Service
from minivllm.serve.streams import EventStream

TEXTS = ["Once", ' "a"\n', "", " \u2028", " \U0001f600", "\ud800", " block", "\\", ".", "</s>"]  # one a token
SERVICE = Service(ScriptedEngine(), ServerOptions())


class Wire:
    """A connection as `ChunkWriter` sees it: keeps what is written, and can be told to be slow."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.write_paused = False
        self.writable = asyncio.Event()
        self.transport = SimpleNamespace(write=self.pieces.append, is_closing=lambda: False)
        self.flow = self
        self.writer = ChunkWriter(self, Outbox())
        self.num_posted = 0
        post = self.writer.post
        self.writer.post = lambda data: (setattr(self, "num_posted", self.num_posted + 1), post(data))

    def pause(self, is_paused: bool) -> None:
        self.write_paused = is_paused
        (self.writable.clear if is_paused else self.writable.set)()

    async def drain(self) -> None:
        await self.writable.wait()

    async def send(self, message) -> None:
        if message["type"] == "http.response.body":
            if self.write_paused:
                await self.drain()
            self.pieces.append(message["body"])

    def events(self) -> list:
        data = b"".join(piece for piece in self.pieces).replace(b"\r\n", b"\n")
        return [part if part == b"[DONE]" else json.loads(part) for part in re.findall(rb"data: (.*)\n\n", data)]


def output(num_tokens: int, n: int = 1, *, is_last: bool = False) -> RequestOutput:
    """The answer's n choices so far: the first `num_tokens` texts."""
    reason = "length" if is_last else None
    choices = [CompletionOutput(index, "".join(TEXTS[:num_tokens]), [7] * num_tokens, finish_reason=reason) for index in range(n)]
    return RequestOutput("r", None, [1, 2], choices, is_last)


def begin(body: dict, *, is_chat: bool = False) -> tuple[RequestStream, Wire, asyncio.Task]:
    """A stream of the engine, whose answer goes to a wire by the application's own way."""
    kind, answer_kind = (ChatBody, ChatAnswer) if is_chat else (CompletionBody, CompletionAnswer)
    asked = {"messages": [{"role": "user", "content": "?"}]} if is_chat else {"prompt": "?"}
    stream, wire = RequestStream("r", lambda request_id: None), Wire()
    answer = answer_kind(SERVICE, kind(**asked, **body, stream=True), "cmpl-r", [Prompt([1, 2])], [stream])
    answer.head = re.sub(rb'"created":\d+', b'"created":0', answer.head)
    events = EventStream(answer.chunks(), answer.close, asyncio.Event(), push_to=answer.push_to)

    async def receive():
        await asyncio.Event().wait()

    scope = {"type": "http", "minivllm.writer": wire.writer}
    return stream, wire, asyncio.create_task(events(scope, receive, wire.send))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("is_chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("body", [{}, {"n": 2}, {"stream_options": {"include_usage": True}}], ids=["one", "two", "usage"])
def test_a_token_written_as_it_arrives_is_the_same_bytes(is_chat, body):
    """Of ten tokens the eight in the middle go the short way; without it every byte is the same."""
    n = body.get("n", 1)

    async def story(takes_part: bool) -> Wire:
        stream, wire, task = begin(body, is_chat=is_chat)
        for number in range(1, 11):
            if not takes_part:
                stream.takes = lambda output: False
            stream.put(output(number, n, is_last=number == 10))
            await settle()
        await task
        return wire

    short, long = asyncio.run(story(True)), asyncio.run(story(False))
    assert (short.num_posted, long.num_posted) == (8 * n, 0), "the first and the last output go through the stream's task"
    assert b"".join(short.pieces) == b"".join(long.pieces)
    tokens = [event for event in short.events() if event != b"[DONE]" and event["choices"]]
    assert len(tokens) == (10 + is_chat) * n, "a chunk for each token, and in chat one that names the role"


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_reader_does_its_text_is_whole_and_in_order(seed):
    """Outputs come, alone or several at once, to a reader that stops and goes on at random: nothing is lost, doubled or swapped."""
    numbers = random.Random(seed)
    n = numbers.choice((1, 2))

    async def story() -> Wire:
        stream, wire, task = begin({"n": n, "stream_options": {"include_usage": True}})
        number = 0
        while number < 10:
            kind = numbers.choice(("output", "output", "pause", "go on", "wait", "settle"))
            if kind == "output":
                number += 1
                stream.put(output(number, n, is_last=number == 10))
            elif kind in ("pause", "go on"):
                wire.pause(kind == "pause")
            for _ in range({"wait": 2, "settle": 20}.get(kind, 0)):
                await asyncio.sleep(0)
        wire.pause(False)
        await asyncio.wait_for(task, 10)
        return wire

    *chunks, usage, done = asyncio.run(story()).events()
    expected = "".join(TEXTS).encode("utf-8", "replace").decode()
    for index in range(n):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == expected, f"choice {index} of seed {seed}"
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert usage["usage"]["completion_tokens"] == 10 * n and done == b"[DONE]"


def test_a_slow_reader_is_written_nothing_that_it_has_not_asked_for():
    """While its buffer is full no token is written past it: five outputs are one chunk when it goes on."""
    async def story() -> Wire:
        stream, wire, task = begin({})
        stream.put(output(1))
        await settle()
        wire.pause(True)
        for number in range(2, 8):
            stream.put(output(number))
            await settle()
        before = wire.num_posted, len(wire.pieces)
        wire.pause(False)
        await settle()
        stream.put(output(10, is_last=True))
        await task
        assert before == (0, 1), "only the first token was written before the reader stopped"
        return wire

    texts = [event["choices"][0]["text"] for event in asyncio.run(story()).events()[:-1]]
    assert texts[:2] == TEXTS[:2] and len(texts) == 4, f"the one that waited, the newest of the others, the last: {texts}"


def test_what_was_posted_goes_out_before_what_is_written():
    """Posted pieces leave together at the end of the loop's turn, or at once if the answer goes on in another way."""
    async def story() -> Wire:
        wire = Wire()
        wire.writer.post(b"1")
        wire.writer.post(b"2")
        assert wire.pieces == [], "they wait for the others'"
        await wire.writer.write(b"3")
        wire.writer.post(b"4")
        await asyncio.sleep(0)
        return wire

    assert asyncio.run(story()).pieces == [b"1\r\n%b\r\n" % digit for digit in (b"1", b"2", b"3", b"4")]


def test_outputs_are_not_taken_past_one_that_waits():
    """Who takes outputs as they arrive is not asked while an older one has not been read."""
    async def story():
        stream, taken = RequestStream("r", lambda request_id: None), []
        stream.takes = lambda output: False
        stream.put(output(1))
        stream.takes = lambda output: taken.append(output) or True
        stream.put(output(2))
        assert (taken, await anext(stream)) == ([], output(2))
        stream.put(output(3))
        assert taken == [output(3)]

    asyncio.run(story())


def test_an_error_comes_behind_the_tokens_before_it():
    """A piece that waits to be sent with the others' goes out before the event of the failure."""
    async def story() -> Wire:
        stream, wire, task = begin({})
        stream.put(output(1))
        await settle()
        stream.put(output(2))
        assert wire.num_posted == 1 and len(wire.pieces) == 1, "the second token waits for the end of this turn of the loop"
        stream.put(RuntimeError("out of luck"))
        await task
        return wire

    first, second, error, done = asyncio.run(story()).events()
    assert [event["choices"][0]["text"] for event in (first, second)] == TEXTS[:2]
    assert error["error"]["code"] == 500 and done == b"[DONE]"


# Silence ----------------------------------------------------------------------------------------------------------------------


def bytes_within(server: ServeThread, seconds: float, version: str = "1.1") -> bytes:
    """What comes of a stream in that time."""
    body = '{"prompt":"Once","stream":true}'
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall((head + body).encode())
        read, until = b"", time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                piece = connection.recv(65536)
            except TimeoutError:
                break
            if not piece:
                break
            read += piece
    return read


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("hold_after", [0, 1], ids=["before the first token", "in the middle"])
def test_silent_streams_say_that_they_live(hold_after, version):
    """--sse-keep-alive-interval 0.2: in a second of silence some comments come, and nothing else."""
    with ServeThread("--sse-keep-alive-interval", 0.2) as server:
        server.engine.hold_after = hold_after
        read = bytes_within(server, 1.1, version)
    assert read.startswith(b"HTTP/1.1 200") and read.count(b"data: ") == hold_after
    assert 2 <= read.count(b": keep-alive\n\n") <= 5, read


def test_streams_are_silent_unless_asked():
    """Without the flag a stream that waits says nothing; with it, one that does not wait says nothing either."""
    with ServeThread() as server:
        server.engine.hold_after = 1
        assert b"keep-alive\n" not in bytes_within(server, 0.5)
    with ServeThread("--sse-keep-alive-interval", 60) as server:
        assert b"keep-alive\n" not in bytes_within(server, 0.5)


def test_a_client_never_sees_the_comments():
    """A reader of events gets the tokens alone, and the stream ends as always."""
    engine = ScriptedEngine()
    with ServeThread("--sse-keep-alive-interval", 0.1, engine=engine) as server:
        engine.hold_after = 2
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/completions", b'{"prompt":"Once","stream":true}', {"content-type": "application/json"})
        answer = connection.getresponse()
        lines = [answer.readline() for _ in range(8)]
        connection.close()
    assert {line for line in lines if not line.startswith(b"data: ")} == {b"\n", b": keep-alive\n"}


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_wrong_interval_is_one_line(value, capsys):
    """Found before a model is loaded, and it names the flag."""
    with pytest.raises(SystemExit):
        parse_args([f"--sse-keep-alive-interval={value}"])
    assert "--sse-keep-alive-interval: must be a number of seconds, 0 or more" in capsys.readouterr().err
