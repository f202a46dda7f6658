"""`minivllm bench serve` against a real server process of the embedded checkpoint, and what it sends."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("aiohttp", reason="the client of the bench is aiohttp")
pytest.importorskip("httpx", reason="the tests of the server ask it by httpx")

from serve_doubles import make_tokenizer
from serve_process import ServeProcess

from minivllm.bench.client import Prompt, Target, hit_rate, parse_cache_counters, payload_of
from minivllm.bench.prompts import EMBEDDED_NAME, allowed_ids, as_prompts, load_tokenizer
from minivllm.bench.workload import Source, random_requests
from minivllm.cli import main as minivllm


@pytest.fixture(scope="module")
def server():
    with ServeProcess("--num-blocks", 200, "--uvicorn-log-level", "error") as one:
        yield one


def bench(server, tmp_path, *flags: object) -> dict:
    """The JSON of a run of 4 requests."""
    common = ["--num-prompts", 4, "--input-len", 12, "--output-len", 6, "--save-detailed"]
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
    assert result["tokenizer_id"] == EMBEDDED_NAME, f"the tokenizer was the embedded one, not {result['tokenizer_id']}"


class AnotherServer(BaseHTTPRequestHandler):
    """OpenAI's API and nothing more: no /metrics, no max_model_len, a usage chunk with an answer's last token, comments.

    Counts 17 tokens in every prompt, keeps what it was sent, and answers with the payloads in `script` while there are any.
    """

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        card = {"id": "other", "object": "model", **self.server.card}
        self.answer(200 if self.path == "/v1/models" else 404, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.sent.append(asked | {"x-request-id": self.headers["x-request-id"]})
        unknown = asked.keys() - {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options",
                                  "temperature", "logprobs", "ignore_eos", "repetition_penalty"}
        if unknown or self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self.answer(400, {"error": {"message": f"unknown: {unknown}"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if self.server.script:
            return self.wfile.write(f"data: {self.server.script.pop()}\n\ndata: [DONE]\n\n".encode())
        is_chat = "messages" in asked
        num_tokens = asked["max_completion_tokens" if is_chat else "max_tokens"]
        if is_chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self.wfile.write(b": ping\n\n")
        for number in range(num_tokens):
            text = {"delta": {"content": "a\u2028"}} if is_chat else {"text": "a\u2028"}
            self.event({"choices": [{"index": 0, **text, "finish_reason": "length" if number == num_tokens - 1 else None}]})
        usage = {"prompt_tokens": 17, "completion_tokens": num_tokens, "total_tokens": 17 + num_tokens}
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


@contextlib.contextmanager
def another_server(*script: str, **card: str):
    """One that runs on a thread; the card is what /v1/models says beside the id."""
    other = ThreadingHTTPServer(("127.0.0.1", 0), AnotherServer)
    other.url, other.card, other.script, other.sent = f"http://127.0.0.1:{other.server_port}", card, list(script), []
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield other
    finally:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize("flags", [[], ["--backend", "openai-chat"]], ids=["completions", "chat"])
def test_another_openai_server_can_be_measured_too(tmp_path, capsys, flags):
    """What the bench sends and reads is OpenAI's and vLLM's common part, and nothing of ours."""
    with another_server() as other:
        result = bench(other, tmp_path, *flags)
    assert (result["completed"], result["total_output_tokens"]) == (4, 24), f"{result['errors']}"
    assert result["model_id"] == "other" and [len(itl) for itl in result["itls"]] == [5] * 4


# ---- Whose tokens ----


def test_input_tokens_are_the_servers_count(tmp_path, capsys):
    """Where the usage tells prompt_tokens, page and JSON have that number and not the bench's own 12."""
    with another_server() as other:
        result = bench(other, tmp_path)
    assert result["input_lens"] == [17] * 4, f"the server counted 17 in each, the JSON says {result['input_lens']}"
    page = capsys.readouterr().out
    assert result["total_input_tokens"] == 68 and f"{'Total input tokens:':<40} 68 " in page, f"not 4 times 17:\n{page}"


def test_a_tokenizer_in_place_of_the_models_is_told(tmp_path, capsys):
    """No tokenizer of the model here: the embedded one makes the prompts, one line says so, and the JSON names it."""
    with another_server() as other:
        result = bench(other, tmp_path)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("No tokenizer")]
        bench(other, tmp_path, "--model", EMBEDDED_NAME)
        quiet = capsys.readouterr().err
    assert len(told) == 1 and "'other'" in told[0] and "--tokenizer" in told[0], f"told: {told}"
    assert result["tokenizer_id"] == EMBEDDED_NAME, f"the JSON names {result['tokenizer_id']}, which was not used"
    assert "No tokenizer" not in quiet, f"nothing was replaced for {EMBEDDED_NAME}: {quiet}"


@pytest.mark.parametrize("how", ["--tokenizer", "--model", "root", "id"])
def test_prompts_are_made_of_the_models_tokens(tmp_path, capsys, how):
    """Named by --tokenizer, by --model, or by what the server says of its model: prompts have about 12 tokens of that tokenizer,
    whose bytes do not all survive as text; made of another's they would have 30.
    """
    folder, tokenizer = tmp_path / "model", make_tokenizer()
    tokenizer.save_pretrained(folder)
    with another_server(**({how: str(folder)} if how in ("root", "id") else {})) as other:
        result = bench(other, tmp_path, "--run-id", "a", *([how, folder] if how.startswith("--") else []))
        lengths = [len(tokenizer.encode(one["prompt"], add_special_tokens=False)) for one in other.sent]
    assert result["tokenizer_id"] == str(folder), f"the JSON names {result['tokenizer_id']}"
    assert all(abs(length - 12) <= 3 for length in lengths), f"asked for 12 tokens of the model's, sent {lengths}"


def test_a_tokenizer_that_is_no_tokenizer_is_refused(tmp_path, capsys, monkeypatch):
    """What --tokenizer names is used or refused, in one line that names the flag; a config.json without a vocabulary is none."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for name in ("/does/not/exist", str(tmp_path)):
        status = minivllm(["bench", "serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1", "--tokenizer", name])
        err = capsys.readouterr().err
        assert status == 2 and "error: --tokenizer: " in err and err.count("\n") == 1, f"{name}: status {status}, {err!r}"


# ---- Warm-ups ----


@pytest.mark.parametrize(("flags", "num_measured"), [
    ([], 4), (["--token-ids"], 4),
    (["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "3", "--prefix-repetition-prefix-len", "8",
      "--prefix-repetition-suffix-len", "4"], 3),
])
def test_warm_ups_are_of_the_measured_kind(tmp_path, capsys, flags, num_measured):
    """As many as asked for, also beyond --num-prompts; of the length asked for; and of a beginning that no measured one has."""
    length = ["--input-len", "12"] if "--dataset-name" not in flags else []
    with another_server() as other:
        common = ["--num-prompts", "4", *length, "--output-len", "2", "--num-warmups", "5", "--run-id", "a"]
        status = minivllm(["bench", "serve", "--base-url", other.url, *common, *flags])
        prompts = [one["prompt"] for one in other.sent]
    assert status == 0 and len(prompts) == 5 + num_measured, f"{len(prompts)} requests were sent, not 5 and {num_measured}"
    tokenizer = load_tokenizer(EMBEDDED_NAME)
    ids = [one if isinstance(one, list) else tokenizer.encode(one, add_special_tokens=False) for one in prompts]
    assert all(12 <= len(one) <= 13 for one in ids), f"asked for 12 tokens, sent {[len(one) for one in ids]}"
    shared = {tuple(one[:4]) for one in ids[:5]} & {tuple(one[:4]) for one in ids[5:]}
    assert not shared, f"a prefix cache would find {shared} of the warm-ups in the measured requests"


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


ODD_STREAMS = ["null", "5", "[1]", "{", '{"choices": "abc"}', '{"choices": [1]}', '{"choices": {"a": 1}}',
               '{"choices": [{"text": 5}]}', '{"choices": [{"text": "a"}], "usage": "many"}', '{"usage": [1]}', '{"usage": "x"}',
               '{"usage": {"completion_tokens": "7"}}', '{"usage": {"completion_tokens": true}}',
               '{"usage": {"prompt_tokens": -1}}', "[" * 100_000]
ODD_CHATS = ['{"choices": [{"delta": "a"}]}', '{"choices": [{"delta": {"content": 5}}]}', '{"choices": [{"delta": [1]}]}']


@pytest.mark.parametrize(("backend", "streams"), [("openai", ODD_STREAMS), ("openai-chat", ODD_CHATS)])
def test_a_malformed_stream_is_a_failed_request(capsys, backend, streams):
    """Whatever a server sends, the run ends with its page: each such request has failed, and says why."""
    num_prompts = len(streams) + 1  # the last one is answered well
    with another_server(*streams) as other:
        flags = ["--backend", backend, "--num-prompts", str(num_prompts), "--input-len", "4", "--output-len", "2"]
        status = minivllm(["bench", "serve", "--base-url", other.url, *flags])
    page = capsys.readouterr()
    assert status == 0 and f"{'Failed requests:':<40} {len(streams)} " in page.out, f"status {status}\n{page.out}"
    reasons = [line for line in page.err.splitlines() if line.startswith("Failed (")]
    assert all("in the stream is" in line or "of the stream is" in line or "recursion" in line for line in reasons), f"{reasons}"


# ---- What cannot be ----


@pytest.mark.parametrize(("flags", "told"), [
    (["--burstiness", "inf"], "--burstiness: must be more than 0 and finite, got inf"),
    (["--temperature", "inf"], "--temperature: must be a finite number, got inf"),
    (["--top-p", "nan"], "--top-p: must be a finite number, got nan"),
    (["--goodput", "ttft:true"], "--goodput: must be METRIC:MILLISECONDS"),
    (["--goodput", 'ttft:"5"'], "--goodput: must be METRIC:MILLISECONDS"),
    (["--goodput", "ttft:null"], "--goodput: must be METRIC:MILLISECONDS"),
    (["--goodput", "ttft:inf"], "--goodput: must be METRIC:MILLISECONDS"),
    (["--num-prompts", "0"], "--num-prompts: must be 1 or more, got 0"),
    (["--request-id-prefix", "a\nb"], "--request-id-prefix: must be printable ASCII"),
])
def test_a_flag_that_cannot_be_is_told_before_a_server_is_asked(capsys, flags, told):
    """One line that is true and names the flag, exit status 2, though nobody listens."""
    status = minivllm(["bench", "serve", "--base-url", "http://127.0.0.1:9", *flags])
    err = capsys.readouterr().err
    assert status == 2 and told in err and err.count("\n") == 1, f"status {status}: {err!r}"


@pytest.mark.parametrize(("flags", "told"), [
    (["--result-dir", "file"], "--result-dir"), (["--result-dir", "file/folder"], "--result-dir"),
    (["--result-filename", "folder"], "--result-filename"), (["--result-filename", "file/x.json"], "--result-filename"),
    (["--label", "file/x"], "--label"),
])
def test_a_result_that_cannot_be_written_is_told_before_the_run(tmp_path, monkeypatch, capsys, flags, told):
    """A file where a folder must be, or the other way round: nothing is sent, and one line names the flag."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with another_server() as other:
        status = minivllm(["bench", "serve", "--base-url", other.url, "--num-prompts", "1", "--save-result", *flags])
    err = capsys.readouterr().err
    assert status == 2 and f"error: {told}: " in err and err.count("\n") == 1, f"{flags}: status {status}, {err!r}"
    assert not other.sent, f"{len(other.sent)} requests were sent for a result that has no place"


# ---- What is sent ----


@pytest.mark.parametrize("dataset", ["random", "prefix_repetition"])
def test_answers_are_as_long_as_asked_unless_told_otherwise(capsys, dataset):
    """ignore_eos is sent by default, as by vLLM's tool for random prompts, and --no-ignore-eos leaves it out."""
    for flags, wanted in (([], True), (["--ignore-eos"], True), (["--no-ignore-eos"], None)):
        with another_server() as other:
            common = ["--dataset-name", dataset, "--num-prompts", "10", "--output-len", "1", "--token-ids"]
            assert minivllm(["bench", "serve", "--base-url", other.url, *common, *flags]) == 0
        values = {one.get("ignore_eos") for one in other.sent}
        assert values == {wanted}, f"{flags}: ignore_eos was {values}, not {wanted}"


def test_every_request_has_an_id(capsys):
    """x-request-id is bench-, eight digits of the run's own, and the request's number; --request-id-prefix replaces the front."""
    with another_server() as other:
        common = ["bench", "serve", "--base-url", other.url, "--num-prompts", "2", "--input-len", "4", "--output-len", "1"]
        minivllm([*common, "--max-concurrency", "1"])
        minivllm([*common, "--max-concurrency", "1", "--num-warmups", "1", "--request-id-prefix", "mine-"])
        ids = [one["x-request-id"] for one in other.sent]
    assert ids[2:] == ["mine-warm-up-0", "mine-0", "mine-1"], f"the ids are {ids[2:]}"
    assert all(re.fullmatch(rf"bench-[0-9a-f]{{8}}-{number}", one) for number, one in enumerate(ids[:2])), f"{ids[:2]}"


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
    tokenizer = load_tokenizer(EMBEDDED_NAME)
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
