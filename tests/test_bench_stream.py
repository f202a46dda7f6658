"""TTFT, ITL, TPOT, E2EL and goodput from streams that are written down here, event by event, with known answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.bench.arrivals import arrival_times, send_all
from minivllm.bench.serve_metrics import ServeOptions, calculate, result_lines
from minivllm.bench.sse import EventReader
from minivllm.bench.stream import MalformedChunk, RequestRecord, StreamTimer


class FakeClock:
    """Time that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def text(piece: str) -> dict:
    return {"choices": [{"text": piece}]}


def delta(**fields) -> dict:
    return {"choices": [{"delta": fields}]}


def play(events: list[tuple[float, dict | str]], start: float = 10.0, prompt_len: int = 5, is_chat: bool = False) -> RequestRecord:
    """The record of a request sent at `start` whose events came at these times."""
    timer = StreamTimer(RequestRecord(prompt_len, start), is_chat)
    for now, event in events:
        timer.on_event(event if isinstance(event, str) else json.dumps(event), now)
    return timer.finish()


COMPLETION = [(10.5, text("a")), (10.75, text("")), (11.25, text("b")), (11.5, {"choices": [], "usage": {"completion_tokens": 3}}),
              (12.0, "[DONE]")]


# ---- Server-sent events ----


@given(st.lists(st.text()), st.randoms(use_true_random=False))
def test_any_cut_of_the_bytes_gives_the_same_events(texts, rng):
    """However the network cuts them, JSON payloads come out whole: U+2028, U+0085 and split characters included."""
    payloads = [json.dumps({"text": one}, ensure_ascii=False) for one in [*texts, "\u2028", "\x85", "\u4f60"]]
    stream = "".join(f": ping\n\ndata: {payload}\r\n\r\n" for payload in payloads).encode("utf-8", "surrogatepass")
    reader, found = EventReader(), []
    while stream:
        cut = rng.randint(1, 9)
        found += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert found == payloads, f"{len(payloads)} payloads went in, {len(found)} came out"


# ---- One request ----


def test_the_times_of_a_completion():
    """Sent at 10, tokens at 10.5, 10.75 (empty text counts) and 11.25: TTFT 0.5, ITL 0.25 and 0.5, E2EL 1.25; usage is no token."""
    record = play(COMPLETION)
    assert (record.ttft, record.itl, record.latency) == (0.5, [0.25, 0.5], 1.25), f"{record}"
    assert (record.output_tokens, record.generated_text, record.success) == (3, "ab", True), f"{record}"


def test_a_role_is_no_token():
    """In a chat the role chunk and the finish chunk count for nothing; content, reasoning, tools and later empty content do."""
    events = [(11.0, delta(role="assistant", content="")), (12.0, delta(content="a")), (13.0, delta(content="")),
              (14.0, delta(reasoning="hm")), (15.0, delta(tool_calls=[{}])), (16.0, delta()),
              (17.0, {"choices": [], "usage": {"completion_tokens": 4}})]
    record = play(events, is_chat=True)
    assert (record.ttft, record.itl, record.latency) == (2.0, [1.0, 1.0, 1.0], 5.0), f"{record}"
    assert (record.generated_text, record.output_tokens) == ("a", 4), f"{record}"


@pytest.mark.parametrize("events", [
    [],
    [(11.0, {"choices": [], "usage": {"completion_tokens": 0}}), (11.0, "[DONE]")],
    [(11.0, text("a")), (12.0, {"error": {"message": "out of luck"}})],
])
def test_an_answer_without_tokens_or_with_an_error_has_failed(events):
    """No token chunk at all, or an error in mid-stream: the request is a failure and says why."""
    record = play(events)
    assert not record.success and record.error, f"counted as a success: {record}"


def test_an_error_of_null_is_no_error():
    """Servers that send every field of a chunk send `error: null` too: such an answer has succeeded."""
    events = [(now, event if isinstance(event, str) else event | {"error": None}) for now, event in COMPLETION]
    assert play(events) == play(COMPLETION), f"an error of null made it {play(events)}"


def test_the_servers_count_of_the_prompt_is_the_one_that_holds():
    """usage.prompt_tokens takes the place of the bench's own count; without it that one stays."""
    told = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    lengths = [play([(11.0, text("a")), (12.0, one)], prompt_len=5).prompt_len for one in (told, COMPLETION[3][1], {"usage": None})]
    assert lengths == [9, 5, 5], f"prompts of {lengths} tokens"


@pytest.mark.parametrize("payload", ["null", "5", "[1]", "{", '{"choices": "abc"}', '{"choices": [1]}', '{"choices": {"a": 1}}',
                                     '{"choices": [{"text": 5}]}', '{"usage": "x"}', '{"usage": {"completion_tokens": "7"}}'])
def test_what_is_no_chunk_is_told_apart(payload):
    """Each of these is refused by name: none is counted, and none is an accident in the middle of the arithmetic."""
    with pytest.raises(MalformedChunk, match=r"(in|of) the stream is"):
        play([(11.0, payload)])


# ---- All requests ----


def two_records() -> list[RequestRecord]:
    """One of 3 tokens (TPOT 0.375), one of a single token, and one that failed."""
    single = play([(12.0, text("x")), (12.0, {"choices": [], "usage": {"completion_tokens": 1}})], start=11.0, prompt_len=7)
    return [play(COMPLETION), single, play([])]


def test_sums_over_requests():
    """Failed requests count as failed and in nothing else; a request of one token has no TPOT; ITL is one list over all."""
    result = calculate(two_records(), 2.0, ServeOptions(percentile_metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50, 99.9)))
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (12, 4)
    assert (result["request_throughput"], result["output_throughput"], result["total_token_throughput"]) == (1.0, 2.0, 8.0)
    assert (result["mean_ttft_ms"], result["p50_ttft_ms"], result["std_ttft_ms"]) == (750, 750, 250)
    assert (result["mean_tpot_ms"], result["median_itl_ms"], result["mean_e2el_ms"]) == (375, 375, 1125)
    assert result["p99.9_itl_ms"] == pytest.approx(499.75), "percentiles are interpolated, as by numpy"
    assert result["request_goodput"] is None, "nobody asked for goodput"


def test_peaks_are_by_the_second():
    """From the first start at 10: two tokens in second 0, two in second 1 and 2; both requests touch second 1."""
    result = calculate(two_records(), 2.0, ServeOptions())
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (2.0, 2), f"{result}"


@pytest.mark.parametrize(("goodput", "good"), [
    ({"ttft": 500}, 1), ({"ttft": 499}, 0), ({"tpot": 375}, 2), ({"tpot": 374}, 1), ({"e2el": 1250}, 2),
    ({"e2el": 1000, "ttft": 1000}, 1),
])
def test_a_good_request_keeps_every_limit(goodput, good):
    """Limits are inclusive; a request of one token has a TPOT of 0 here, so that any limit allows it."""
    result = calculate(two_records(), 2.0, ServeOptions(goodput=goodput))
    assert result["request_goodput"] == good / 2.0, f"{goodput}: {result['request_goodput'] * 2:g} good requests, not {good}"


PAGE = """\
============ Serving Benchmark Result ============
Successful requests:                     2         
Failed requests:                         1         
Maximum request concurrency:             8         
Request rate configured (RPS):           4.00      
Benchmark duration (s):                  2.00      
Total input tokens:                      12        
Total generated tokens:                  4         
Request throughput (req/s):              1.00      
Request goodput (req/s):                 1.00      
Output token throughput (tok/s):         2.00      
Peak output token throughput (tok/s):    2.00      
Peak concurrent requests:                2.00      
Total token throughput (tok/s):          8.00      
---------------Time to First Token----------------
Mean TTFT (ms):                          750.00    
Median TTFT (ms):                        750.00    
P99 TTFT (ms):                           995.00    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          375.00    
Median TPOT (ms):                        375.00    
P99 TPOT (ms):                           375.00    
---------------Inter-token Latency----------------
Mean ITL (ms):                           375.00    
Median ITL (ms):                         375.00    
P99 ITL (ms):                            497.50    
----------------End-to-end Latency----------------
Mean E2EL (ms):                          1125.00   
Median E2EL (ms):                        1125.00   
P99 E2EL (ms):                           1247.50   
=================================================="""  # noqa: W291 (vLLM pads with spaces)


def test_the_page_is_vllms():
    """Every line, every blank, as vLLM prints it."""
    options = ServeOptions(4.0, 8, {"tpot": 375}, ("ttft", "tpot", "itl", "e2el"))
    page = "\n".join(result_lines(calculate(two_records(), 2.0, options), options))
    assert page == PAGE, f"the page reads\n{page}"


# ---- Arrivals ----


@given(st.integers(0, 99), st.integers(1, 50), st.floats(0.1, 1000), st.floats(0.1, 10))
def test_arrivals_end_when_the_rate_says(seed, num_requests, rate, burstiness):
    """The last of n requests is sent after n / rate seconds, none before the one in front of it, and the seed decides."""
    times = arrival_times(random.Random(seed), num_requests, rate, burstiness)
    assert times == sorted(times) == arrival_times(random.Random(seed), num_requests, rate, burstiness)
    assert times[-1] == pytest.approx(num_requests / rate), f"the last of {num_requests} at {rate}/s came at {times[-1]}"


def test_burstiness_is_the_shape_of_the_gaps():
    """Gaps of a Poisson process vary as much as their mean, those of shape 100 a tenth of it; an infinite rate has none."""
    for burstiness, wanted in ((1.0, 1.0), (100.0, 0.1), (0.25, 2.0)):
        times = [0.0, *arrival_times(random.Random(0), 4000, 10.0, burstiness)]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        spread = math.sqrt(sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)) / 0.1
        assert spread == pytest.approx(wanted, rel=0.1), f"shape {burstiness}: gaps vary by {spread:.2f} of their mean"
    assert arrival_times(random.Random(0), 3, math.inf) == [0.0] * 3


def test_requests_are_sent_at_their_times():
    """Each request is sent at its own second, whatever the ones before are doing; results keep the order of the requests."""
    clock, sent = FakeClock(), []

    async def send(name: str) -> str:
        sent.append((name, clock()))
        await asyncio.sleep(0)
        return name.upper()

    results = asyncio.run(send_all(["a", "b", "c"], [0.0, 2.0, 2.5], send, clock=clock, sleep=clock.sleep))
    assert results == ["A", "B", "C"], f"{results}"
    assert [name for name, _ in sent] == ["a", "b", "c"] and clock() == 2.5, f"sent: {sent}, the clock stands at {clock()}"


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_are_under_way_than_allowed(limit):
    """--max-concurrency holds requests back before they are sent."""
    under_way, most = 0, 0

    async def send(_: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    asyncio.run(send_all(range(10), [0.0] * 10, send, clock=FakeClock(), max_concurrency=limit))
    assert most == limit, f"{most} requests were under way at once, allowed were {limit}"
