"""`minivllm bench serve` against a real server process of the embedded checkpoint, and what it sends."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("aiohttp", reason="the client of the bench is aiohttp")
pytest.importorskip("httpx", reason="the tests of the server ask it by httpx")

from serve_process import ServeProcess

from minivllm.bench.client import Prompt, Target, hit_rate, parse_cache_counters, payload_of
from minivllm.bench.prompts import allowed_ids, as_prompts, load_tokenizer
from minivllm.bench.workload import Source, random_requests
from minivllm.cli import main as minivllm


@pytest.fixture(scope="module")
def server():
    with ServeProcess("--num-blocks", 200, "--uvicorn-log-level", "error") as one:
        yield one


def bench(server, tmp_path, *flags: object) -> dict:
    """The JSON of a run of 4 requests."""
    common = ["--num-prompts", 4, "--input-len", 12, "--output-len", 6, "--ignore-eos", "--save-detailed"]
    result = ["--result-dir", tmp_path, "--result-filename", "result.json"]
    status = minivllm(list(map(str, ["bench", "serve", "--base-url", server.url, *common, *result, *flags])))
    assert status == 0, f"the bench ended with {status}"
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.parametrize("flags", [[], ["--token-ids", "--request-rate", "50", "--max-concurrency", "2"],
                                   ["--backend", "openai-chat", "--num-warmups", "1"]])
def test_every_request_is_answered_and_counted(server, tmp_path, capsys, flags):
    """Text, token ids and chat: 4 answers of 6 tokens, their times, and vLLM's page. (A busy server may pack tokens together.)"""
    result = bench(server, tmp_path, *flags)
    page = capsys.readouterr().out
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 24), f"{result['errors']}"
    assert result["output_lens"] == [6] * 4 and all(1 <= len(itl) <= 5 for itl in result["itls"]), f"{result['itls']}"
    for ttft, itl, latency in zip(result["ttfts"], result["itls"], result["latencies"]):
        assert ttft > 0 and latency == pytest.approx(ttft + sum(itl)), "TTFT and ITLs add up to the latency"
    assert page.startswith(f"{' Serving Benchmark Result ':=^50}\n") and page.rstrip().endswith("=" * 50)
    assert result["model_id"] == "minivllm-tiny", "the model is the one that the server names"


class AnotherServer(BaseHTTPRequestHandler):
    """OpenAI's API and nothing more: no /metrics, no max_model_len, a usage chunk with an answer's last token, comments."""

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/v1/models" else 404, {"object": "list", "data": [{"id": "other", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        unknown = asked.keys() - {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options",
                                  "temperature", "logprobs", "ignore_eos", "repetition_penalty"}
        if unknown or self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self.answer(400, {"error": {"message": f"unknown: {unknown}"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        is_chat = "messages" in asked
        num_tokens = asked["max_completion_tokens" if is_chat else "max_tokens"]
        if is_chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self.wfile.write(b": ping\n\n")
        for number in range(num_tokens):
            text = {"delta": {"content": "a\u2028"}} if is_chat else {"text": "a\u2028"}
            self.event({"choices": [{"index": 0, **text, "finish_reason": "length" if number == num_tokens - 1 else None}]})
        usage = {"prompt_tokens": 12, "completion_tokens": num_tokens, "total_tokens": 12 + num_tokens}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def event(self, chunk: dict) -> None:
        self.wfile.write(b"data: " + json.dumps({"id": "x", "model": "other", **chunk}, ensure_ascii=False).encode() + b"\n\n")

    def answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize("flags", [[], ["--backend", "openai-chat"]], ids=["completions", "chat"])
def test_another_openai_server_can_be_measured_too(tmp_path, capsys, flags):
    """What the bench sends and reads is OpenAI's and vLLM's common part, and nothing of ours."""
    other = ThreadingHTTPServer(("127.0.0.1", 0), AnotherServer)
    other.url = f"http://127.0.0.1:{other.server_port}"
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        result = bench(other, tmp_path, *flags)
    finally:
        other.shutdown()
        other.server_close()
    assert (result["completed"], result["total_output_tokens"]) == (4, 24), f"{result['errors']}"
    assert result["model_id"] == "other" and [len(itl) for itl in result["itls"]] == [5] * 4


def test_the_same_run_id_repeats_the_prompts(server, tmp_path):
    """Greedy answers of one run id are equal, those of another differ: a second run asks something new."""
    flags = ["--temperature", 0, "--token-ids"]
    one, again, other = (bench(server, tmp_path, *flags, "--run-id", run_id)["generated_texts"] for run_id in ("a", "a", "b"))
    assert one == again, "run id a gave two different runs"
    assert one != other, "runs a and b asked the same"


def test_refused_requests_are_failures(server, capsys):
    """A server that refuses every request: all failed, exit status 1, and the reason once on stderr."""
    flags = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--temperature", "-1"]
    status = minivllm(["bench", "serve", "--base-url", server.url, *flags])
    page = capsys.readouterr()
    assert status == 1 and f"{'Failed requests:':<40} 3 " in page.out, page.out
    assert "Failed (3 of 3): HTTP 400" in page.err and "temperature" in page.err, page.err


def test_a_silent_server_is_told_in_one_line(capsys):
    """Nobody listens: one line that names --base-url, exit status 1; with --ready-check after that many seconds."""
    for flags, told in (([], "--base-url"), (["--ready-check", "0.01"], "--ready-check")):
        status = minivllm(["bench", "serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1", "--input-len", "4", *flags])
        err = capsys.readouterr().err
        assert status == 1 and told in err and err.count("\n") == 1, f"{flags}: status {status}, {err!r}"


# ---- What is sent ----


def test_payloads_are_vllms():
    """Completions and chat, field for field."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    target = Target("http://x", "/v1/completions", "m")
    assert payload_of(target, Prompt("hi", 1, 5)) == {
        "model": "m", "prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None} | stream
    chat = Target("http://x", "/v1/chat/completions", "m", is_chat=True, ignore_eos=True, extra_body={"top_k": 3})
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    assert payload_of(chat, Prompt("hi", 1, 5)) == {
        "model": "m", "messages": [message], "max_completion_tokens": 5, "ignore_eos": True, "top_k": 3} | stream


def test_text_has_as_many_tokens_as_ids():
    """Prompts as text have the lengths that they claim, and at least 9 of 10 the length that was asked for."""
    tokenizer = load_tokenizer(None, None)
    source = Source.of(0, allowed_ids(tokenizer))
    requests = random_requests(source, 30, 24, 4, 0.5)
    prompts = as_prompts(requests, tokenizer, source, send_token_ids=False)
    counted = [len(tokenizer.encode(one.content, add_special_tokens=False)) for one in prompts]
    assert counted == [one.num_tokens for one in prompts], "a prompt has another length than it claims"
    exact = sum(number == len(one.prompt_token_ids) for number, one in zip(counted, requests))
    assert exact >= 27, f"{exact} of 30 prompts have the length that was asked for"
    assert not set(tokenizer.all_special_ids) & set(source.allowed_ids), "special ids are not drawn"


METRICS = """\
# HELP vllm:prefix_cache_hits_total Prefix cache hits
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 30.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 20.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 10.0
vllm:prefix_cache_hits_created{engine="1",model_name="m"} 1.7e+09
"""


def test_the_hit_rate_is_the_difference_of_two_readings():
    """Counters of all engines are added up; a rate needs both readings; nothing asked is a rate of 0."""
    before, after = {"queries": 60.0, "hits": 25.0}, parse_cache_counters(METRICS)
    assert after == {"queries": 120.0, "hits": 40.0}, f"{after}"
    assert hit_rate(before, after) == 15 / 60 and hit_rate(None, after) is None and hit_rate(after, after) == 0.0
    assert parse_cache_counters("vllm:num_requests_running 3\n") is None
