"""What /metrics tells of requests as HTTP sees them."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from serve_doubles import ScriptedEngine
from serve_process import ServeProcess

from minivllm.serve.app import create_app
from minivllm.serve.http_metrics import HttpMetrics
from minivllm.serve.service import ServerOptions, Service

KEY = {"authorization": "Bearer k"}
ASKED = {"prompt": "Once"}


def count(*requests: tuple, root_path: str = "", **options) -> HttpMetrics:
    """Make the requests, one after the other, of a fresh application."""
    service = Service(ScriptedEngine(), ServerOptions(**options))

    async def story():
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for method, path, *given in requests:
                await client.request(method, path, **(given[0] if given else {}))

    asyncio.run(story())
    return service.http_metrics


def test_requests_count_by_route_method_and_status():
    """Whole and streamed answers, refused bodies, wrong methods: each once, under the route that it was meant for."""
    metrics = count(("POST", "/v1/completions", {"json": ASKED}), ("POST", "/v1/completions", {"json": ASKED | {"stream": True}}),
                    ("POST", "/v1/completions", {"json": ASKED | {"n": -1}}), ("GET", "/v1/models"), ("DELETE", "/v1/models"),
                    ("GET", "/"), ("GET", "/static/main.js"))
    assert metrics.counts == {
        ("/v1/completions", "POST", "2xx"): 2, ("/v1/completions", "POST", "4xx"): 1, ("/v1/models", "GET", "2xx"): 1,
        ("/v1/models", "DELETE", "4xx"): 1, ("/", "GET", "2xx"): 1, ("/static/{name}", "GET", "2xx"): 1}
    assert sum(metrics.seconds[("/v1/completions", "POST")].counts) == 3


def test_strangers_make_no_labels():
    """Unknown paths are one label and so are unknown methods: else a scan of the server would fill its memory."""
    metrics = count(*[("GET", f"/scan/{index}") for index in range(5)], *[(f"M{index}", "/v1/models") for index in range(5)])
    assert metrics.counts == {("none", "GET", "4xx"): 5, ("/v1/models", "other", "4xx"): 5}


def test_what_only_a_monitor_asks_for_is_left_out():
    """As with vLLM: a probe every second would drown the rest."""
    assert count(*[("GET", path) for path in ("/health", "/ping", "/version")], ("POST", "/ping")).counts == {}


def test_refused_keys_and_proxies_change_no_route():
    """401 is answered before there is a route, and a proxy's path is no part of it."""
    metrics = count(("GET", "/v1/models"), ("GET", "/v1/models", {"headers": KEY}), api_keys=("k",), root_path="/llm")
    assert metrics.counts == {("/v1/models", "GET", "4xx"): 1, ("/v1/models", "GET", "2xx"): 1}


def test_a_failure_of_ours_is_a_5xx():
    """An exception that no handler knows counts as what the client sees."""
    service = ScriptedEngine.add_request
    try:
        ScriptedEngine.add_request = None  # not callable: the route's code raises TypeError
        assert count(("POST", "/v1/completions", {"json": ASKED})).counts == {("/v1/completions", "POST", "5xx"): 1}
    finally:
        ScriptedEngine.add_request = service


def test_the_text_is_what_prometheus_reads():
    """The instrumentator's names and labels, cumulative buckets, and no prefix."""
    metrics, registry = HttpMetrics(), CollectorRegistry()
    registry.register(metrics)
    for seconds in (0.05, 0.3, 7):
        metrics.observe("/v1/completions", "POST", 200, seconds)
    text = generate_latest(registry).decode()
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 3.0' in text
    for edge, number in (("0.1", 1), ("0.5", 2), ("1.0", 2), ("+Inf", 3)):
        line = f'http_request_duration_seconds_bucket{{handler="/v1/completions",le="{edge}",method="POST"}} {number}.0'
        assert line in text, text
    assert 'http_request_duration_seconds_sum{handler="/v1/completions",method="POST"} 7.35' in text


def test_a_server_shows_them_beside_the_engines_own():
    """At /metrics of a real process, after a request, whatever prefix the engine's metrics have."""
    with ServeProcess("--num-blocks", 64, "--metrics-prefix", "vllm") as server:
        assert httpx.post(server.url + "/v1/completions", json=ASKED | {"max_tokens": 2}, timeout=60).status_code == 200
        text = httpx.get(server.url + "/metrics").text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text, text
    assert "vllm:generation_tokens" in text
