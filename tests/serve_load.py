"""A client that is cheap enough to be a thousand, and what a server's metrics must say when all of them have gone."""

from __future__ import annotations

import asyncio
import json
import re
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

SILENCE_SECONDS = 120


class RawClient:
    """One connection to a server, without a library between it and the bytes."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)

    async def __aenter__(self) -> RawClient:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.writer.transport.abort()  # no goodbye: the other side finds out

    def post(self, path: str, body: bytes | dict, content_type: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
        self.writer.write(head.encode() + content)

    async def answer(self) -> tuple[int, bytes]:
        """(status, body) of an answer that is not a stream; the connection can be used again."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SILENCE_SECONDS)
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, f"no stream was asked for: {head!r}"
        return int(head.split()[1]), await self.reader.readexactly(int(length[1]))

    async def events(self, most: int | None = None) -> bytes:
        """The bytes of a stream up to its [DONE], or of its first `most` events."""
        read = b""
        while b"data: [DONE]" not in read and (most is None or read.count(b"data: ") < most):
            piece = await asyncio.wait_for(self.reader.read(65536), SILENCE_SECONDS)
            if not piece:
                break
            read += piece
        return read


def scrape(url: str) -> dict[str, float]:
    """Every sample of /metrics by its name, and its reason if it has one, without the prefix."""
    samples = {}
    for family in text_string_to_metric_families(httpx.get(url + "/metrics", timeout=60).text):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason") or sample.labels.get("reason")
            if "le" not in sample.labels:
                samples[sample.name.partition(":")[2] + (f"/{reason}" if reason else "")] = sample.value
    return samples


def wait_until_idle(url: str, seconds: float = 30) -> dict[str, float]:
    """The samples once nothing runs or waits any more."""
    deadline = time.monotonic() + seconds
    while (samples := scrape(url))["num_requests_running"] + samples["num_requests_waiting"]:
        assert time.monotonic() < deadline, f"requests of clients that have left are still there: {samples}"
        time.sleep(0.1)
    return samples


def assert_adds_up(got: dict[str, float]) -> None:
    """What holds of an idle server whatever has happened to it before."""
    assert (got["num_requests_running"], got["num_requests_waiting"], got["kv_cache_usage_perc"]) == (0, 0, 0)
    ended = sum(value for name, value in got.items() if name.startswith("request_success_total/"))
    with_token, tokens = got["time_to_first_token_seconds_count"], got["generation_tokens_total"]
    assert got["request_prompt_tokens_count"] == got["request_generation_tokens_count"] == ended
    assert got["request_generation_tokens_sum"] == tokens, "each token belongs to a request that has ended"
    assert got["inter_token_latency_seconds_count"] == tokens - with_token, "a gap between every two tokens of a request"
    assert got["request_decode_time_seconds_count"] == got["e2e_request_latency_seconds_count"] == with_token
    assert got["request_num_preemptions_sum"] == got["num_preemptions_total"]
    assert got["prompt_tokens_cached_total"] == got["prefix_cache_hits_total"] <= got["prefix_cache_queries_total"]
    assert with_token <= got["request_queue_time_seconds_count"] <= ended
    assert got["request_max_num_generation_tokens_count"] == got["request_params_n_count"] <= ended
    assert got["request_max_num_generation_tokens_sum"] <= tokens
    assert got["request_success_total/error"] == 0
