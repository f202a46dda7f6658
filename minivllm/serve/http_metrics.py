"""Requests as HTTP sees them: how many, how they ended, how long they took. At `/metrics` beside the engine's own numbers.

    http_requests_total{handler="/v1/completions", method="POST", status="2xx"} 41

Names, labels and edges are those of prometheus-fastapi-instrumentator, which vLLM uses, so they carry no prefix. A handler is a
route and never the path that a client sent: strangers must not be able to make labels. What only a monitor asks for is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.serve.metrics import Histogram

SKIPPED = frozenset({"/metrics", "/health", "/load", "/ping", "/version"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.1, 0.5, 1)


class HttpMetrics(Collector):
    """Counts of one server. The event loop writes, and reads when it is asked."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}  # by handler, method, status
        self.seconds: dict[tuple[str, str], Histogram] = {}  # by handler, method

    def observe(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Take in a request that has ended; `status` counts by its hundreds."""
        method = method if method in METHODS else "other"
        key = (handler, method, f"{status // 100}xx")
        self.counts[key] = self.counts.get(key, 0) + 1
        if key[:2] not in self.seconds:
            self.seconds[key[:2]] = Histogram(SECONDS)
        self.seconds[key[:2]].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at every scrape."""
        counter = CounterMetricFamily("http_requests", "Requests by route, method and status.",
                                      labels=("handler", "method", "status"))
        for key, count in self.counts.items():
            counter.add_metric(key, count)
        yield counter
        family = HistogramMetricFamily("http_request_duration_seconds", "From a request's head to the end of its answer.",
                                       labels=("handler", "method"))
        for labels, histogram in self.seconds.items():
            family.add_metric(labels, histogram.buckets, histogram.sum)
        yield family


class HttpMetricsMiddleware:
    """Shows every request to `HttpMetrics` when its answer has ended. `paths` are the routes; tokens do not pass here."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, paths: Iterable[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500  # of an exception that nobody has caught below

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            handler = self._handler(scope)
            if handler not in SKIPPED:
                self.metrics.observe(handler, scope["method"], status, time.perf_counter() - began)

    def _handler(self, scope: Scope) -> str:
        """The route, also of a request that was refused before it got there; "none" where there is no route."""
        route: Any = scope.get("route")
        path = route.path if route is not None else scope["path"].removeprefix(scope.get("root_path", ""))
        return path if path in self.paths else "none"
