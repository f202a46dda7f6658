"""Lesson 13's clients: they come, read, read slowly and leave, and all of it is counted in steps of the engine.

Owns the order of things. The engine is the real `AsyncEngine` on its own thread, paused, and makes a step when it is told to; so
what happens between two steps is decided here and not by a clock. Decides nothing that the engine decides.

    served = serve_clients(workload, 8)                    8 clients, each of whom asks again when its answer has ended
    departures = leave_at_random(workload, seed=0)         who left when, and what it held before and after
    parts = read_every(prompt, 7)                          what a reader that looks in every 7 steps is handed
    events = ask_over_http("/v1/completions", body)        the same engine behind the server's application, without a port
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from minivllm.async_engine import AsyncEngine, RequestStream
from minivllm.bench.workload import BenchRequest, Workload
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams
from minivllm.trace import Record

Story = Callable[[AsyncEngine, list[Record]], Awaitable[Any]]


def on_a_held_engine(story: Story, **engine_args: Any) -> Any:
    """What `story(engine, records)` returns, on a paused engine whose trace goes to `records`. In a thread of its own, because a
    notebook has an event loop already.
    """
    async def main() -> Any:
        engine, records = AsyncEngine(LLM(**{"dtype": "float32", "device": "cpu"} | engine_args).engine), list[Record]()
        try:
            await engine.call(lambda core: core.trace.subscribe(records.append))
            await engine.pause()
            return await story(engine, records)
        finally:
            engine.shutdown()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main()).result()


async def ask(engine: AsyncEngine, number: int, request: BenchRequest) -> RequestStream:
    """Queue one request of a workload; its answer has the full length."""
    params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
    return await engine.add_request(request.prompt_token_ids, params, str(number))


async def read_new(streams: dict[int, RequestStream], record: Record) -> None:
    """Let everybody whose request got tokens in the step read its stream, and forget the streams that have ended."""
    for name in record["sampled"]:
        if (await anext(streams[int(name)])).finished:
            del streams[int(name)]


# Many clients


@dataclass
class Served:
    """What a number of clients met, in steps."""

    running: list[int] = field(default_factory=list)  # requests in memory, after each step
    waiting: list[int] = field(default_factory=list)  # requests in the queue, after each step
    first_token: dict[int, int] = field(default_factory=dict)  # steps from asking to the first token
    num_tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / len(self.running)


def serve_clients(workload: Workload, num_clients: int, **engine_args: Any) -> Served:
    """So many clients share out the workload: each asks for its next request as soon as its answer has ended."""
    async def story(engine: AsyncEngine, records: list[Record]) -> Served:
        served, streams, asked = Served(), dict[int, RequestStream](), dict[int, int]()
        queue = list(enumerate(workload.requests))
        while queue or streams:
            while queue and len(streams) < num_clients:
                number, request = queue.pop(0)
                streams[number], asked[number] = await ask(engine, number, request), len(served.running)
            await engine.step_once()
            record = next(record for record in reversed(records) if record["type"] == "step")
            served.running.append(await engine.call(lambda core: len(core.scheduler.running)))
            served.waiting.append(record["waiting"]["count"])
            for name, token_ids in record["sampled"].items():
                served.first_token.setdefault(int(name), len(served.running) - asked[int(name)])
                served.num_tokens += len(token_ids)
            await read_new(streams, record)
        return served

    return on_a_held_engine(story, **engine_args)


# Clients that leave


@dataclass(frozen=True)
class Departure:
    """One client that left: when, and how many blocks its request held before and after, with so many steps between."""

    step: int
    was_running: bool
    held_before: int
    held_after: int
    num_steps: int


def leave_at_random(workload: Workload, seed: int, chance: float = 0.04, **engine_args: Any) -> tuple[list[Departure], int, int]:
    """All clients come at once, and before each step each of them leaves with this probability.

    Returns who left, how many answers were read to their end, and how many blocks are missing in the pool afterwards.
    """
    async def story(engine: AsyncEngine, records: list[Record]) -> tuple[list[Departure], int, int]:
        rng, departures, streams = random.Random(seed), list[Departure](), dict[int, RequestStream]()
        num_free = await engine.call(lambda core: core.kv_cache_manager.num_free_blocks)
        for number, request in enumerate(workload.requests):
            streams[number] = await ask(engine, number, request)
        while streams:
            for number in [number for number in streams if rng.random() < chance]:
                departures.append(await leave(engine, str(number), streams.pop(number)))
            if streams:
                await engine.step_once()
                await read_new(streams, next(record for record in reversed(records) if record["type"] == "step"))
        num_missing = num_free - await engine.call(lambda core: core.kv_cache_manager.num_free_blocks)
        return departures, len(workload.requests) - len(departures), num_missing

    return on_a_held_engine(story, **engine_args)


async def leave(engine: AsyncEngine, request_id: str, stream: RequestStream) -> Departure:
    """Close a stream, and look at the request's blocks before that and at the next moment at which the engine listens."""
    def look(core: Any) -> tuple[int, int, bool]:
        request = core.scheduler.requests.get(request_id)
        num_held = len(core.kv_cache_manager.get_block_ids(request_id)) if request is not None else 0
        return num_held, core.stats.num_steps, request in core.scheduler.running

    held, step, was_running = await engine.call(look)
    stream.close()
    held_after, step_after, _ = await engine.call(look)
    return Departure(step, was_running, held, held_after, step_after - step)


# Clients that read slowly, and clients behind HTTP


def read_every(request: BenchRequest, num_steps: int, **engine_args: Any) -> list[int]:
    """How many tokens a reader knows each time it has read, if it lets so many steps go by before it reads again."""
    async def story(engine: AsyncEngine, records: list[Record]) -> list[int]:
        stream, known, ended = await ask(engine, 0, request), list[int](), False
        while not ended:
            for _ in range(num_steps):
                await engine.step_once()
            output = await anext(stream)
            ended = output.finished
            known.append(len(output.outputs[0].token_ids))
        return known

    return on_a_held_engine(story, **engine_args)


def ask_over_http(path: str, body: dict[str, Any], **engine_args: Any) -> list[str]:
    """The lines of the answer to one POST, from the server's own application: without a port, and on an engine that runs freely."""
    import httpx

    from minivllm.serve.app import create_app
    from minivllm.serve.service import ServerOptions, Service

    async def story(engine: AsyncEngine, records: list[Record]) -> list[str]:
        await engine.resume()
        transport = httpx.ASGITransport(create_app(Service(engine, ServerOptions(log_stats=False))))
        async with httpx.AsyncClient(transport=transport, base_url="http://course") as client:
            response = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        return [line for line in response.text.split("\n") if line]

    return on_a_held_engine(story, **engine_args)
