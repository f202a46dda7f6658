"""When each request is sent. Owns the draw of arrival times and the wait for them; knows no HTTP.

Gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less comes in bursts, more comes evenly. The times
are stretched to end at exactly num_requests / request_rate, as vLLM does, so that two seeds offer the same load.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


def arrival_times(rng: random.Random, num_requests: int, request_rate: float, burstiness: float = 1.0) -> list[float]:
    """Seconds after the start at which each request is sent; all 0 for an infinite rate."""
    if math.isinf(request_rate):
        return [0.0] * num_requests
    mean_gap = 1.0 / (request_rate * burstiness)
    times = list(itertools.accumulate(rng.gammavariate(burstiness, mean_gap) for _ in range(num_requests)))
    stretch = num_requests / request_rate / times[-1] if times[-1] > 0 else 1.0
    return [time * stretch for time in times]


async def send_all(requests: Sequence[Request], times: Sequence[float], send: Callable[[Request], Awaitable[Result]], *,
                   clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
                   max_concurrency: int | None = None) -> list[Result]:
    """Send each request at its time, wait for all, and return the results in the order of the requests.

    Beyond `max_concurrency` a request waits here: its own clock starts when it is really sent, as in vLLM.
    """
    gate = asyncio.Semaphore(len(requests) if max_concurrency is None else max_concurrency)

    async def send_one(request: Request) -> Result:
        async with gate:
            return await send(request)

    start, tasks = clock(), []
    for request, time in zip(requests, times, strict=True):
        if (wait := start + time - clock()) > 0:
            await sleep(wait)
        tasks.append(asyncio.create_task(send_one(request)))
    return list(await asyncio.gather(*tasks))
