"""How a server process begins and ends: banner, refusals, Ctrl-C with requests in flight, an engine that fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from serve_load import scrape, wait_until_idle
from serve_process import FAULTY, LONG, POISONED, InFlight, ServeProcess, make_model_folder

import minivllm

EMBEDDED = minivllm.__path__[-1] + "/tiny/model/config.json"
SMALL = ["--num-blocks", "400"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def end(server, number):
    """Stop a server that has streams and a whole request in flight, and check what each of them is told."""
    streams = [InFlight(server, stream=True) for _ in range(3)]
    whole = InFlight(server)
    assert all(stream.has_begun.wait(30) for stream in streams)
    time.sleep(0.2)  # for the whole one, which gives no sign
    status, seconds = server.stop(number)
    assert (status, seconds < 2) == (0, True), f"exit status {status} after {seconds:.1f} s"
    for stream in streams:
        *_, last, done = stream.result().lines
        assert json.loads(last)["choices"][0]["finish_reason"] == "abort"
        assert done == "[DONE]"
    assert whole.result().body["choices"][0]["finish_reason"] == "abort"
    assert "Traceback" not in server.stderr


def test_t49_two_servers_live_side_by_side_and_each_ends_within_two_seconds_of_its_signal(folder):
    """Ctrl-C and SIGTERM alike: requests in flight are aborted and told so, streams end with [DONE], the status is 0."""
    with ServeProcess(folder, *SMALL) as one, ServeProcess(folder, *SMALL) as other:
        end(one, signal.SIGINT)
        end(other, signal.SIGTERM)


def test_a_step_that_hangs_does_not_hold_up_the_end(folder):
    """Two seconds, status 0, and an error event, even when the engine is in the middle of a minute's work."""
    with ServeProcess(folder, *SMALL, program=FAULTY) as server:
        stream = InFlight(server, stream=True)
        assert stream.has_begun.wait(30)
        (folder / "hang").touch()
        time.sleep(0.3)
        try:
            status, seconds = server.stop()
        finally:
            (folder / "hang").unlink()
        assert (status, seconds < 2) == (0, True), f"exit status {status} after {seconds:.1f} s"
        *_, error, done = stream.result().lines
        assert (json.loads(error)["error"]["message"], done) == ("The server is shutting down.", "[DONE]")


def test_requests_in_flight_may_finish_when_told_so(folder):
    """With --shutdown-timeout they run to their end; new ones are refused with 503; then the process ends at once."""
    with ServeProcess(folder, *SMALL, "--shutdown-timeout", 30, program=FAULTY) as server:
        stream = InFlight(server, stream=True, max_tokens=200)
        assert stream.has_begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        late = httpx.post(server.url + "/v1/completions", json=LONG)
        assert (late.status_code, httpx.get(server.url + "/health").status_code) == (503, 503)
        *_, last, done = stream.result().lines
        assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert server.wait(5) == 0


def test_an_engine_that_fails_ends_the_process(folder):
    """In-flight streams get an error event, /health says 503, and the exit status is 1 so that a supervisor restarts it."""
    with ServeProcess(folder, *SMALL, program=FAULTY) as server:
        stream = InFlight(server, stream=True)
        assert stream.has_begun.wait(30)
        (folder / "fail").touch()
        try:
            *_, error, done = stream.result().lines
            assert (json.loads(error)["error"]["code"], done) == (500, "[DONE]")
            assert httpx.get(server.url + "/health").status_code == 503
            assert server.wait(10) == 1
        finally:
            (folder / "fail").unlink()
        assert "out of luck" in server.stderr, "the log says why"


@pytest.mark.parametrize("flags", [[], ["--async-scheduling"]], ids=["in turn", "one ahead"])
def test_a_request_that_makes_steps_fail_ends_and_the_others_do_not_notice(folder, flags):
    """Whole: a 500. Streamed: the same before the first token. Those beside it get every token, and the process lives."""
    with ServeProcess(folder, *SMALL, *flags, program=POISONED) as server:
        streams = [InFlight(server, stream=True, prompt=[5, 6, 7 + each], max_tokens=300) for each in range(4)]
        assert all(stream.has_begun.wait(30) for stream in streams)
        for stream in (False, True):
            bad = httpx.post(server.url + "/v1/completions", json=LONG | {"prompt": [5, 13], "stream": stream}, timeout=60)
            assert bad.status_code == 500, bad.text
            assert bad.json()["error"]["message"] == "Internal server error"
        for stream in streams:
            *_, last, done = stream.result().lines
            assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        got = wait_until_idle(server.url)
        assert (got["request_success_total/error"], got["request_success_total/length"]) == (2, 4)
        assert got["generation_tokens_total"] == 4 * 300, "no token was lost or came twice"
        assert got["kv_cache_usage_perc"] == 0
        assert httpx.get(server.url + "/health").status_code == 200
        status, _ = server.stop(signal.SIGTERM)
        assert status == 0


def test_an_unlucky_choice_of_several_ends_the_whole_answer(folder):
    """One of n answers fails after its first tokens: the stream tells an error and its [DONE], and the siblings are aborted."""
    program = POISONED.replace("if 13 in new.token_ids[:new.num_prompt_tokens]", "if new.request_id.startswith('1_')").replace(
        "if poisoned & output.num_scheduled_tokens.keys():", "if self.__dict__.setdefault('count', []).append(1) or "
        "len(self.count) > 9 and poisoned & output.num_scheduled_tokens.keys():")
    with ServeProcess(folder, *SMALL, program=program) as server:
        stream = InFlight(server, stream=True, n=3, temperature=1, max_tokens=500)
        *chunks, error, done = stream.result().lines
        assert (json.loads(error)["error"]["code"], done) == (500, "[DONE]")
        assert {json.loads(chunk)["choices"][0]["index"] for chunk in chunks} == {0, 1, 2}
        got = wait_until_idle(server.url)
        assert (got["request_success_total/error"], got["request_success_total/abort"]) == (1, 2)
        assert scrape(server.url)["kv_cache_usage_perc"] == 0


def test_prompts_and_answers_are_not_logged(folder):
    """Not with every log level at its most talkative, nor when a request is refused or a step fails."""
    with ServeProcess(folder, *SMALL, "--uvicorn-log-level", "debug", program=POISONED, MINIVLLM_LOGGING_LEVEL="DEBUG") as server:
        for body in ({"prompt": "my hunter2"}, {"prompt": "my hunter2", "temperature": 9}, {"prompt": ["hunter2", 5]},
                     {"prompt": "hunter2", "stop": "hunter2", "stream": True}):
            httpx.post(server.url + "/v1/completions", json=body | {"max_tokens": 4}, timeout=60)
        assert httpx.post(server.url + "/v1/completions", json={"prompt": [5, 13]}, timeout=60).status_code == 500
        chat = {"messages": [{"role": "user", "content": "hunter2"}], "max_tokens": 4}
        answer = httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=60).json()["choices"][0]["message"]["content"]
        server.stop()
        for log in (server.stdout, server.stderr):
            assert "hunter2" not in log and (len(answer) < 4 or answer not in log)
        assert "POST /v1/completions" in server.stdout + server.stderr, "the access log is there"
        assert "a step has failed" in server.stderr


def test_a_port_in_use_is_refused_before_the_model_is_loaded():
    """One line, status 1; the model, which does not even exist, was not looked for."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with ServeProcess("/no/such/model", "--port", port, wait=False) as server:
            assert server.wait() == 1
            assert server.stderr.count("\n") == 1
            assert f"127.0.0.1:{port} is in use" in server.stderr


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    """Status 2 and the flag's name, without a traceback."""
    with ServeProcess(tmp_path / "nothing", wait=False) as server:
        assert server.wait() == 2
        *_, last = server.stderr.splitlines()
        assert "error: --model: " in last
        assert "Traceback" not in server.stderr


def test_without_any_argument_the_toy_model_answers():
    """`python -m minivllm.serve` on a fresh machine: the banner's question gets an answer under the name minivllm-tiny."""
    if not os.path.exists(EMBEDDED):
        pytest.skip("the embedded checkpoint has not been made yet")
    with ServeProcess() as server:
        assert [card["id"] for card in httpx.get(server.url + "/v1/models").json()["data"]] == ["minivllm-tiny"]
        body = {"messages": [{"role": "user", "content": "What is a block?"}], "temperature": 0, "max_tokens": 60}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert "block" in answer["message"]["content"]
