"""HTTP to any OpenAI server: payloads as vLLM's tool sends them, one streamed request, and questions before and after a run.

Owns the wire. What the times mean stands in stream.py. A request that fails becomes a record with its error, never an exception.
aiohttp, as in vLLM's tool: where server and client share a machine, a client with 200 microseconds a chunk measures itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from minivllm.bench.flags import BenchError
from minivllm.bench.sse import EventReader
from minivllm.bench.stream import RequestRecord, StreamTimer

POLL_SECONDS = 0.5
BROKEN = (aiohttp.ClientError, TimeoutError, OSError)  # what may become of a connection
CACHE_COUNTER = re.compile(r"^\w+:prefix_cache_(queries|hits)(?:_total)?(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """The server, and what every request to it has in common."""

    base_url: str
    endpoint: str
    model: str
    is_chat: bool = False
    ignore_eos: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCard:
    """What the server says of a model: the name to ask for, and the folder or hub id that it was loaded from."""

    model_id: str
    root: str


@dataclass(frozen=True)
class Prompt:
    """What one request sends: text, or token ids where the server takes them."""

    content: str | list[int]
    num_tokens: int
    max_tokens: int
    request_id: str = ""  # sent as a header, so that the server's log can be laid beside the result


def payload_of(target: Target, prompt: Prompt) -> dict[str, Any]:
    """The body, field for field what vLLM's tool sends."""
    if target.is_chat:
        message = {"role": "user", "content": [{"type": "text", "text": prompt.content}]}
        body = {"model": target.model, "messages": [message], "max_completion_tokens": prompt.max_tokens}
    else:
        body = {"model": target.model, "prompt": prompt.content, "repetition_penalty": 1.0, "max_tokens": prompt.max_tokens,
                "logprobs": None}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if target.ignore_eos:
        body["ignore_eos"] = True
    return body | target.extra_body


def make_client(api_key: str | None) -> aiohttp.ClientSession:
    """No limit on connections and no time-out: a slow answer is a measurement. Made inside the event loop that uses it."""
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None),
                                 connector=aiohttp.TCPConnector(limit=0), trust_env=False)


async def stream_one(client: aiohttp.ClientSession, target: Target, prompt: Prompt, clock: Callable[[], float]) -> RequestRecord:
    """Send one request and time its stream."""
    body = payload_of(target, prompt)
    record = RequestRecord(prompt.num_tokens, clock())
    timer, reader = StreamTimer(record, target.is_chat), EventReader()
    headers = {"x-request-id": prompt.request_id} if prompt.request_id else {}
    try:
        async with client.post(target.base_url + target.endpoint, json=body, headers=headers) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {(await response.read()).decode(errors='replace')}"
                return record
            async for piece in response.content.iter_any():
                now = clock()
                for event in reader.feed(piece):
                    timer.on_event(event, now)
    except (*BROKEN, ValueError, RecursionError) as error:  # a connection, a stream not OpenAI's, brackets a thousand deep
        record.error = record.error or f"{type(error).__name__}: {error}"
    return timer.finish()


async def get(client: aiohttp.ClientSession, url: str, seconds: float) -> tuple[int, str]:
    """Status and body. Raises one of `BROKEN` if there is no answer in time."""
    async with client.get(url, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
        return response.status, (await response.read()).decode(errors="replace")


async def find_model(client: aiohttp.ClientSession, base_url: str) -> ModelCard:
    """The first model that the server names. Raises `BenchError` if none answers."""
    try:
        status, text = await get(client, base_url + "/v1/models", 30)
        if status != 200:
            raise ValueError(f"HTTP {status}")
        card = json.loads(text)["data"][0]
        model_id, root = card["id"], card.get("root")  # root is vLLM's addition
        if not isinstance(model_id, str):
            raise TypeError(f"its id is {model_id!r}")
        return ModelCard(model_id, root if root and isinstance(root, str) else model_id)
    except (*BROKEN, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"--base-url: {base_url}/v1/models gives no model ({type(error).__name__}: {error}): start the server, "
                         "wait for it with --ready-check, or name a model with --model") from error


async def wait_until_ready(client: aiohttp.ClientSession, base_url: str, seconds: float, clock: Callable[[], float],
                           sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Ask /v1/models until it answers with 200. Raises `BenchError` after so many seconds."""
    deadline, last = clock() + seconds, ""
    while True:
        try:
            status, _ = await get(client, base_url + "/v1/models", 5)
            if status == 200:
                return
            last = f"HTTP {status}"
        except BROKEN as error:
            last = f"{type(error).__name__}: {error}"
        if clock() >= deadline:
            raise BenchError(f"--ready-check: {base_url} was not ready after {seconds:g} s ({last})")
        await sleep(POLL_SECONDS)


async def read_cache_counters(client: aiohttp.ClientSession, base_url: str) -> dict[str, float] | None:
    """Prefix-cache queries and hits of the server so far, in tokens, from /metrics; None where it does not tell."""
    try:
        status, text = await get(client, base_url + "/metrics", 30)
        return parse_cache_counters(text) if status == 200 else None
    except (*BROKEN, ValueError):  # nobody there, or a counter that is no number
        return None


def parse_cache_counters(metrics: str) -> dict[str, float] | None:
    """From Prometheus' text; several engines behind one server are added up."""
    totals: dict[str, float] = {}
    for name, value in CACHE_COUNTER.findall(metrics):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals if len(totals) == 2 else None


def hit_rate(before: dict[str, float] | None, after: dict[str, float] | None) -> float | None:
    """Share of the prompt tokens between two readings that the prefix cache had."""
    if before is None or after is None:
        return None
    queries = after["queries"] - before["queries"]
    return (after["hits"] - before["hits"]) / queries if queries > 0 else 0.0
