"""docs/grafana.json and docs/prometheus.yml speak of what a server really exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from prometheus_client.parser import text_string_to_metric_families
from serve_doubles import ask
from test_serve_metrics import folder, serving  # noqa: F401 (folder is a fixture)

from minivllm.serve.metrics import COUNTERS, HISTOGRAMS

DOCS = Path(__file__).parent.parent / "docs"
NAME = re.compile(r"minivllm:[a-z0-9_]+")
WANTED = """num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc cache_config_info
    prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total prompt_tokens_total prompt_tokens_cached_total
    generation_tokens_total request_success_total admission_rejections_total""".split()
WANTED_HISTOGRAMS = """time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
    e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
    request_inference_time_seconds iteration_tokens_total request_prompt_tokens request_generation_tokens
    request_params_max_tokens request_max_num_generation_tokens request_params_n request_num_preemptions""".split()


@pytest.fixture(scope="module")
def samples(folder):  # noqa: F811
    """Every sample that a fresh server exports: (name, label names, values of `reason` labels)."""
    async def story(client, engine):
        return (await client.get("/metrics")).text

    text = serving(folder, story)
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def queries() -> list[str]:
    """Every expression of the dashboard: of panels and of variables."""
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def test_every_query_of_the_dashboard_names_an_exported_metric(samples):
    """And every label that it groups by or shows is one that the metric has."""
    labels = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(queries()) > 10
    for query in queries():
        names = NAME.findall(query)
        assert names, f"{query} asks for nothing of ours"
        for name in names:
            assert name in labels, f"{query} asks for {name}, which /metrics does not export"
            for group in re.findall(r"by \(([a-z_]+)\)", query):
                assert group in labels[name], f"{name} has no label {group}"


def test_every_metric_of_the_contract_is_exported(samples):
    """All of vLLM's names that apply here, as `_total` counters, gauges, and histograms with buckets, sum and count."""
    names = {sample.name.removeprefix("minivllm:") for sample in samples}
    missing = set(WANTED) - names
    missing |= {name + end for name in WANTED_HISTOGRAMS for end in ("_bucket", "_sum", "_count")} - names
    assert not missing, f"not exported: {sorted(missing)}"
    reasons = {(sample.name.removeprefix("minivllm:"), sample.labels[label]) for sample in samples
               for label in ("reason", "finished_reason") if label in sample.labels}
    assert reasons >= {("num_requests_waiting_by_reason", "capacity"), ("num_requests_waiting_by_reason", "deferred"),
                       ("admission_rejections_total", "max_num_queued_reqs"), ("request_success_total", "error"),
                       ("admission_rejections_total", "max_num_queued_tokens"), ("request_success_total", "abort")}


def test_the_page_about_operating_explains_every_metric():
    """docs/operations.md has a row for each name."""
    page = (DOCS / "operations.md").read_text()
    names = {*HISTOGRAMS, *COUNTERS, *(name.removesuffix("_total") for name in WANTED)} - {"iteration_tokens"}
    missing = [name for name in sorted(names) if f"`{name}" not in page]
    assert not missing, f"not explained: {missing}"


def test_prometheus_is_told_the_path_and_the_port():
    """The scrape example asks where a server with default flags listens."""
    text = (DOCS / "prometheus.yml").read_text()
    assert 'targets: ["127.0.0.1:8000"]' in text
    path = re.search(r"metrics_path: (\S+)", text)[1]
    assert ask(path, method="GET").status_code in (200, 500), "the route exists (a scripted engine has nothing to count)"
    assert ask(path + "x", method="GET").status_code == 404
