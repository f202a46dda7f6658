"""A crowd: a thousand streams at once, half of them cut off; hours of mixed use in small; and readers that do not read."""

from __future__ import annotations

import asyncio
import random
import re
import time
from pathlib import Path

import pytest
from depth import DEFAULT_EXAMPLES
from hypothesis import settings

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from serve_load import RawClient, assert_adds_up, scrape, wait_until_idle
from serve_process import ServeProcess

NUM_STREAMS, NUM_CANCELLED = 1000, 500
SHORT = {"max_tokens": 8, "ignore_eos": True, "stream": True}
IS_DEEP = settings().max_examples > DEFAULT_EXAMPLES
SOAK_SECONDS = 300 if IS_DEEP else 10
SOAK_CLIENTS = 24


@pytest.fixture(scope="module")
def server():
    with ServeProcess("--uvicorn-log-level", "error", "--num-blocks", 3000) as one:
        yield one


def open_files() -> int:
    resource = pytest.importorskip("resource", reason="limits of open files are asked for with the resource module")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return max(soft, wanted)


async def one_stream(url: str, number: int, leaves_after: int | None) -> bytes:
    """A stream of 8 tokens, or its first events: 0 of them is a client that leaves before the first token."""
    async with RawClient(url) as client:
        client.post("/v1/completions", SHORT | {"prompt": f"Number {number} is a block of", "seed": number})
        if leaves_after == 0:
            await asyncio.sleep(random.Random(number).random())
            return b""
        return await client.events(leaves_after)


def test_a_thousand_streams_and_half_of_them_cut_off_leave_nothing_behind(server):
    """Those that stay get every token and their [DONE]; of the others no block, no place and no count is left."""
    if open_files() < 2 * NUM_STREAMS + 100:
        pytest.skip("this system allows too few open files for a thousand connections of one process")
    numbers = random.Random(1)
    leaves = [numbers.randrange(8) for _ in range(NUM_CANCELLED)] + [None] * (NUM_STREAMS - NUM_CANCELLED)
    numbers.shuffle(leaves)

    async def story():
        return await asyncio.gather(*(one_stream(server.url, number, after) for number, after in enumerate(leaves)))

    answers = asyncio.run(story())
    for answer, after in zip(answers, leaves):
        if after is None:
            assert answer.count(b"data: {") <= 8 and answer.count(b'"finish_reason":"length"') == 1, answer
            assert b"data: [DONE]" in answer
    got = wait_until_idle(server.url)
    assert_adds_up(got)
    assert got["request_success_total/length"] >= NUM_STREAMS - NUM_CANCELLED
    assert got["request_success_total/abort"] > 0, "somebody left in the middle"
    assert got["request_prompt_tokens_count"] <= NUM_STREAMS
    assert httpx.get(server.url + "/health").status_code == 200
    assert "Traceback" not in server.stderr, server.stderr[-3000:]


# The soak ---------------------------------------------------------------------------------------------------------------------


def rss_mib(pid: int) -> float:
    """Memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("no /proc on this system to read a process's memory from")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024


async def visitor(url: str, numbers: random.Random, until: float, seen: dict[str, int]) -> None:
    """One of many who ask for all kinds of things until it is late: whole, streamed, cut off, several, wrong."""
    async with RawClient(url) as client:
        while time.monotonic() < until:
            kind = numbers.choice(("whole", "stream", "n", "wrong", "leaves", "chat"))
            body = {"prompt": "A block " * numbers.randrange(1, 20), "max_tokens": numbers.randrange(1, 24), "logprobs": None}
            if kind in ("stream", "leaves"):
                asked = body | {"stream": True, "ignore_eos": True}
                async with RawClient(url) as other:
                    other.post("/v1/completions", asked)
                    await other.events(numbers.randrange(1, 5) if kind == "leaves" else None)
            else:
                changes = {"n": {"n": 3, "temperature": 1, "logprobs": 2}, "wrong": {"temperature": -1}}.get(kind, {})
                chat = {"messages": [{"role": "user", "content": body["prompt"]}], "max_tokens": 9}
                client.post(*(("/v1/chat/completions", chat) if kind == "chat" else ("/v1/completions", body | changes)))
                status, answer = await client.answer()
                assert status == (400 if kind == "wrong" else 200), answer
            seen[kind] = seen.get(kind, 0) + 1


@pytest.fixture(scope="module")
def small_server():
    """At most 32 tokens a step: oneDNN keeps some kilobytes for every new size of a step, and here all sizes soon have been.

    A visitor's connection is idle while it reads a stream on another: on a busy machine longer than the five seconds it may be.
    """
    flags = ["--num-blocks", 200, "--max-num-seqs", 8, "--max-num-batched-tokens", 32, "--timeout-keep-alive", 120]
    with ServeProcess("--uvicorn-log-level", "error", *flags) as one:
        yield one


@pytest.mark.timeout(SOAK_SECONDS + 200)
def test_mixed_use_for_a_long_time_costs_no_memory_and_every_counter_adds_up(small_server):
    """Ten seconds, and five minutes in the deep profile: after a warm-up memory is flat, and at the end all blocks are free."""
    server, seen = small_server, {}

    async def story(seconds: float, seed: int) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(visitor(server.url, random.Random(f"{seed}/{each}"), until, seen) for each in range(SOAK_CLIENTS)))

    asyncio.run(story(max(6, SOAK_SECONDS / 6), 0))
    before = rss_mib(server.process.pid)
    asyncio.run(story(SOAK_SECONDS, 1))
    grown = rss_mib(server.process.pid) - before
    assert_adds_up(wait_until_idle(server.url))
    assert len(seen) == 6 and min(seen.values()) > 5, f"too little happened to show anything: {seen}"
    # 16 MiB: what allocators move by themselves. A leak of a kilobyte a request shows in the deep profile.
    assert grown < 16, f"{grown:.1f} MiB more after {seen}"


# Readers that do not read -----------------------------------------------------------------------------------------------------


def test_readers_that_do_not_read_block_nobody_and_cost_no_memory(server):
    """Fifty streams of a thousand tokens that nobody reads: a client that does is answered meanwhile, and memory stays flat."""
    long = SHORT | {"prompt": "Once", "max_tokens": 1000, "temperature": 0}

    async def story():
        clients = [RawClient(server.url) for _ in range(50)]
        for client in clients:
            await client.__aenter__()
            client.reader._transport.pause_reading()
            client.post("/v1/completions", long)
        await asyncio.sleep(1)
        before, began = rss_mib(server.process.pid), time.monotonic()
        async with RawClient(server.url) as reader:
            reader.post("/v1/completions", SHORT | {"prompt": "Twice"})
            assert b"[DONE]" in await reader.events()
        waited, grown = time.monotonic() - began, rss_mib(server.process.pid) - before
        assert scrape(server.url)["num_requests_running"] > 10, "the answers that nobody reads should still be running"
        for client in clients:
            await client.__aexit__()
        return waited, grown

    waited, grown = asyncio.run(story())
    assert waited < 10, f"a reader waited {waited:.1f} s behind those that do not read"
    assert grown < 16, f"{grown:.1f} MiB for 50 readers that do not read"
    assert_adds_up(wait_until_idle(server.url))
