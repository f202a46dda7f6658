"""/metrics and the line in the log: they add up, over a real engine behind the application itself."""

from __future__ import annotations

import asyncio
import logging

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from prometheus_client.parser import text_string_to_metric_families
from serve_doubles import ScriptedEngine, client_of
from serve_process import make_model_folder

from minivllm.async_engine import AsyncEngine
from minivllm.bench.client import parse_cache_counters
from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.serve.app import create_app
from minivllm.serve.args import parse_args
from minivllm.serve.metrics import HISTOGRAMS, EngineMetrics, length_edges
from minivllm.serve.service import ServerOptions, Service

P, M, K = 5, 4, 3
BODY = {"prompt": list(range(10, 10 + P)), "max_tokens": M, "ignore_eos": True, "temperature": 0}
REQUEST_HISTOGRAMS = [name for name in HISTOGRAMS if name.startswith(("request_", "e2e_"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_model_folder(tmp_path_factory.mktemp("model")))


def serving(folder, story, knobs=None, **options):
    """Run `story(client, engine)` against an application over a fresh engine."""
    async def main():
        engine = AsyncEngine(make_engine(folder, **(knobs or {})))
        try:
            async with client_of(engine, **options) as client:
                return await asyncio.wait_for(story(client, engine), 60)
        finally:
            engine.shutdown()

    return asyncio.run(main())


def make_engine(folder, **knobs):
    return LLMEngine(EngineConfig(model=folder, device="cpu", dtype="float32", num_blocks=300, block_size=16, **knobs))


async def scrape(client, prefix="minivllm"):
    """Every sample by its name without the prefix, or by name and reason."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples if not family.name.startswith("http_") else ():
            assert {"model_name": "tiny", "engine": "0"}.items() <= sample.labels.items()
            reason = sample.labels.get("finished_reason") or sample.labels.get("reason") or sample.labels.get("le")
            name = sample.name.removeprefix(prefix + ":") + (f"/{reason}" if reason else "")
            assert name != sample.name and name not in samples, f"{sample.name} has the prefix, and comes once"
            samples[name] = sample.value
    return samples


async def until(client, name, value):
    while (samples := await scrape(client))[name] != value:
        await asyncio.sleep(0.01)
    return samples


async def complete(client, **changes):
    response = await client.post("/v1/completions", json=BODY | changes)
    assert response.status_code == 200, response.text
    return response.json()


def test_k_equal_requests_one_after_another_add_up(folder):
    """Tokens, steps, gaps and ends are k times those of one request, and nothing is left running."""
    async def story(client, engine):
        for _ in range(K):
            await complete(client)
        return await scrape(client)

    got = serving(folder, story)
    assert (got["prompt_tokens_total"], got["generation_tokens_total"]) == (K * P, K * M)
    assert got["time_to_first_token_seconds_count"] == K
    assert got["inter_token_latency_seconds_count"] == K * (M - 1)
    assert (got["iteration_tokens_total_sum"], got["iteration_tokens_total_count"]) == (K * (P + M), K * M)
    assert (got["request_success_total/length"], got["request_success_total/stop"]) == (K, 0)
    assert (got["num_requests_running"], got["num_requests_waiting"], got["kv_cache_usage_perc"]) == (0, 0, 0)
    assert {name: got[name + "_count"] for name in REQUEST_HISTOGRAMS} == dict.fromkeys(REQUEST_HISTOGRAMS, K)
    assert (got["request_prompt_tokens_sum"], got["request_generation_tokens_sum"]) == (K * P, K * M)
    assert (got["request_params_max_tokens_sum"], got["request_params_n_sum"]) == (K * M, K)


def test_the_times_of_requests_add_up(folder):
    """prefill + decode is inference, the gaps between tokens are decode, and e2e holds the queue and inference."""
    async def story(client, engine):
        await asyncio.gather(*(complete(client, max_tokens=9 + i) for i in range(6)))
        return await scrape(client)

    got = serving(folder, story, {"max_num_seqs": 2})
    seconds = {name: got[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode", "inference")}
    assert seconds["prefill"] + seconds["decode"] == pytest.approx(seconds["inference"])
    assert got["inter_token_latency_seconds_sum"] == pytest.approx(seconds["decode"])
    assert 0 < seconds["queue"] + seconds["inference"] <= got["e2e_request_latency_seconds_sum"]
    assert seconds["queue"] + seconds["prefill"] <= got["time_to_first_token_seconds_sum"]


def test_cached_tokens_are_counted_and_not_computed(folder):
    """What the prefix cache had is in prompt_tokens and missing from the steps; the bench reads the same counters."""
    async def story(client, engine):
        for _ in range(2):
            await complete(client, prompt=list(range(10, 50)))
        return await scrape(client), parse_cache_counters((await client.get("/metrics")).text)

    got, read = serving(folder, story)
    assert (got["prompt_tokens_total"], got["prompt_tokens_cached_total"]) == (80, 32), "two blocks of 16 of the second prompt"
    assert got["iteration_tokens_total_sum"] == 80 - 32 + 2 * M
    assert read == {"queries": 80, "hits": 32}


def test_chunks_of_a_prompt_are_steps(folder):
    """A prompt of 20 tokens under a budget of 8 takes three steps, and every token is in one of them."""
    async def story(client, engine):
        await complete(client, prompt=list(range(20)), max_tokens=1)
        return await scrape(client)

    got = serving(folder, story, {"max_num_batched_tokens": 8})
    assert (got["iteration_tokens_total_count"], got["iteration_tokens_total_sum"]) == (3, 21)
    assert got["iteration_tokens_total_bucket/8.0"] == 3, "8, 8, and 4 with the first token"


def test_steps_planned_ahead_change_no_count(folder):
    """With async scheduling the same requests give the same counts."""
    async def story(client, engine):
        await asyncio.gather(*(complete(client, max_tokens=M + i) for i in range(K)))
        return await scrape(client)

    got = serving(folder, story, {"async_scheduling": True})
    num_tokens = sum(M + i for i in range(K))
    assert (got["generation_tokens_total"], got["inter_token_latency_seconds_count"]) == (num_tokens, num_tokens - K)
    assert got["request_success_total/length"] == K


def test_each_of_n_answers_counts_and_their_request_once(folder):
    """n answers are n ends and n first tokens; request_params_n has one event of n."""
    async def story(client, engine):
        await complete(client, n=3, temperature=1)
        return await scrape(client)

    got = serving(folder, story)
    assert (got["request_success_total/length"], got["time_to_first_token_seconds_count"]) == (3, 3)
    assert (got["request_params_n_count"], got["request_params_n_sum"]) == (1, 3)
    assert (got["request_max_num_generation_tokens_count"], got["request_max_num_generation_tokens_sum"]) == (1, M)


def test_the_longest_of_n_answers_is_told_once(folder):
    """Answers of one request that end at different lengths, and one that is aborted: one event, of the longest, and no rest."""
    async def story(client, engine):
        answer = await complete(client, n=4, temperature=1, seed=3, max_tokens=60, ignore_eos=False, stop=["e", "a"],
                                return_token_ids=True)
        metrics = engine.engine.observer.__self__
        task = asyncio.create_task(complete(client, n=2, temperature=1, max_tokens=3000))
        await until(client, "num_requests_running", 2)
        task.cancel()
        got = await until(client, "request_success_total/abort", 2)
        return [len(choice["token_ids"]) for choice in answer["choices"]], got, metrics.families

    lengths, got, left = serving(folder, story)
    assert len(set(lengths)) > 1, "the answers should differ in length, or this shows nothing"
    assert got["request_max_num_generation_tokens_count"] == 2
    aborted = got["request_generation_tokens_sum"] - sum(lengths)
    assert max(lengths) + aborted / 2 <= got["request_max_num_generation_tokens_sum"] <= max(lengths) + aborted
    assert left == {}, "nothing is kept of a request that has ended"


def test_a_client_that_leaves_is_counted_as_abort(folder):
    """One runs and one waits; both leave; then nothing runs, waits or holds a block, and both were aborts."""
    async def story(client, engine):
        tasks = [asyncio.create_task(complete(client, max_tokens=4000)) for _ in range(2)]
        await until(client, "num_requests_running", 1)
        before = await until(client, "num_requests_waiting", 1)
        for task in tasks:
            task.cancel()
        return before, await until(client, "request_success_total/abort", 2), len(engine.engine.observer.__self__.last_tokens)

    before, after, num_remembered = serving(folder, story, {"max_num_seqs": 1})
    assert 0 < before["kv_cache_usage_perc"] < 1, "a share, whatever the name says"
    assert (before["num_requests_waiting_by_reason/capacity"], before["num_requests_waiting_by_reason/deferred"]) == (1, 0)
    assert (after["num_requests_running"], after["num_requests_waiting"], after["kv_cache_usage_perc"]) == (0, 0, 0)
    assert after["request_prompt_tokens_count"] == 2
    assert after["request_decode_time_seconds_count"] == 1, "the one that waited has no times"
    assert num_remembered == 0, "nothing is kept of a request that has ended"


def test_preemptions_are_counted(folder):
    """In the counter and in the histogram alike."""
    async def story(client, engine):
        engine.engine.kv_cache_manager.pool.get_new_blocks(287)  # leaves 12 of 16 slots
        await asyncio.gather(*(complete(client, max_tokens=100) for _ in range(4)))
        return await scrape(client)

    got = serving(folder, story)
    assert got["num_preemptions_total"] > 0
    assert got["request_num_preemptions_sum"] == got["num_preemptions_total"]
    assert got["inter_token_latency_seconds_count"] == 4 * 99, "a token comes once"


def test_the_prefix_is_the_user_s_choice(folder):
    """`--metrics-prefix vllm` gives vLLM's names; what Prometheus could not read is refused in one line."""
    assert parse_args([]).server.metrics_prefix == "minivllm"
    assert parse_args(["--metrics-prefix", "vllm"]).server.metrics_prefix == "vllm"
    with pytest.raises(SystemExit):
        parse_args(["--metrics-prefix", "a b"])

    async def story(client, engine):
        return await scrape(client, "vllm"), (await client.get("/metrics")).text

    got, text = serving(folder, story, metrics_prefix="vllm")
    assert "num_requests_running" in got
    assert 'vllm:cache_config_info{block_size="16",' in text
    assert 'num_gpu_blocks="300"' in text and 'kv_cache_size_tokens="4784"' in text


def test_two_servers_count_for_themselves(folder):
    """Each has its own registry, though they share a process."""
    async def story(client, engine):
        await complete(client)
        async with client_of(idle) as other:
            return await scrape(other), await scrape(client)

    idle = AsyncEngine(make_engine(folder))
    try:
        other, got = serving(folder, story)
    finally:
        idle.shutdown()
    assert (other["prompt_tokens_total"], got["prompt_tokens_total"]) == (0, P)


def test_metrics_need_no_key(folder):
    """A monitor has none."""
    async def story(client, engine):
        return (await client.get("/metrics")).status_code, (await client.get("/v1/models")).status_code

    assert serving(folder, story, api_keys=("secret",)) == (200, 401)


def test_length_edges_end_at_the_context():
    """1-2-5 up to max_model_len."""
    assert length_edges(100) == (1, 2, 5, 10, 20, 50, 100)
    assert length_edges(49) == (1, 2, 5, 10, 20)


def test_the_log_line_is_vllms(folder, caplog):
    """Rates since the line before; INFO when something happened, DEBUG when nothing did; preemptions when there were some."""
    caplog.set_level(logging.DEBUG, "minivllm")
    engine, time = make_engine(folder), [0.0]
    metrics = EngineMetrics(engine, "tiny", clock=lambda: time[0])
    engine.stats.num_prompt_tokens, engine.stats.prefix_cache_queries, engine.stats.prefix_cache_hits = 5600, 5600, 480
    engine.stats.num_generated_tokens = 881
    for num_preemptions in (2, 2):
        engine.stats.num_preemptions = num_preemptions
        time[0] += 10
        metrics.log()
    engine.close()
    first, second = (record for record in caplog.records if "Engine 000" in record.message)
    assert (first.name, first.levelname, second.levelname) == ("minivllm", "INFO", "DEBUG")
    assert first.message == (
        "Engine 000: Avg prompt throughput: 512.0 tokens/s, Avg generation throughput: 88.1 tokens/s, Running: 0 reqs, "
        "Waiting: 0 reqs, Preemptions: 2, GPU KV cache usage: 0.0%, Prefix cache hit rate: 8.6%")
    assert second.message == (
        "Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s, Running: 0 reqs, "
        "Waiting: 0 reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: 8.6%")


def test_the_log_line_comes_by_itself_while_the_application_lives(monkeypatch):
    """The lifespan starts it and ends it; `--disable-log-stats` keeps it away."""
    written = []
    monkeypatch.setattr("minivllm.serve.metrics.LOG_SECONDS", 0.01)
    monkeypatch.setattr(EngineMetrics, "log", lambda self: written.append(self))
    assert [parse_args(argv).server.log_stats for argv in ([], ["--disable-log-stats"])] == [True, False]

    async def live(**options):
        app = create_app(Service(ScriptedEngine(), ServerOptions(**options)))
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.1)

    asyncio.run(live(log_stats=False))
    assert not written
    asyncio.run(live())
    assert written
