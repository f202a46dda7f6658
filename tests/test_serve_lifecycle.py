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
from serve_process import FAULTY, LONG, InFlight, ServeProcess, make_model_folder

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
