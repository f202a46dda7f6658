"""What happens to a connection: clients that dawdle, TLS, and a proxy in front."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from serve_doubles import ask
from serve_thread import ServeThread

from minivllm.serve.args import parse_args
from minivllm.serve.server import banner

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
BODY = b'{"prompt":"Once"}'
PATIENCE = 0.5
IMPATIENT = ("--timeout-receive", PATIENCE, "--timeout-keep-alive", 2 * PATIENCE)


def seconds_until_closed(connection: socket.socket) -> float:
    """How long the server keeps a connection on which it has nothing to say."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b"", "an answer that nobody asked for"
    return time.monotonic() - began


@pytest.fixture(scope="module")
def server():
    with ServeThread(*IMPATIENT) as one:
        yield one


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", HEAD[:-2], HEAD + BODY[:-1]], ids=["0", "a word", "a head", "a body"])
def test_half_a_request_is_cut_off(server, sent):
    """Whoever sends a part and then nothing loses the connection after --timeout-receive, and the others notice nothing."""
    with server.connect() as connection:
        if sent:
            connection.sendall(sent)
        assert PATIENCE * 0.8 < seconds_until_closed(connection) < PATIENCE + 3
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_head_that_drips_is_cut_off_as_a_whole(server):
    """A byte now and then does not prolong a head: that is what makes thousands of connections cheap for an attacker."""
    began = time.monotonic()
    with server.connect() as connection, contextlib.suppress(ConnectionError):  # reset or broken pipe, as it happens
        while time.monotonic() - began < 20:
            connection.sendall(b"X")
            time.sleep(PATIENCE / 5)
    assert time.monotonic() - began < PATIENCE + 5


def test_a_body_may_take_its_time_as_long_as_it_goes_on(server):
    """A slow upload is no attack: every piece buys the patience again."""
    with server.connect() as connection:
        connection.sendall(HEAD)
        for index in range(len(BODY)):
            connection.sendall(BODY[index:index + 1])
            time.sleep(PATIENCE / 5)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_an_idle_connection_is_kept_for_the_next_request_and_then_closed(server):
    """Between two requests --timeout-keep-alive holds, which is longer here."""
    with server.connect() as connection:
        for pause in (0, 1.5 * PATIENCE):
            time.sleep(pause)
            connection.sendall(HEAD + BODY)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert answer.read(), "the answer is read to its end"
        assert 1.5 * PATIENCE < seconds_until_closed(connection) < 2 * PATIENCE + 3


def test_a_slow_answer_is_no_slow_request():
    """An answer that comes long after the request's last byte is waited for."""
    with ServeThread(*IMPATIENT) as server:
        server.engine.hold_after = 1
        with server.connect() as connection:
            connection.sendall(HEAD.replace(b"17", b"31") + b'{"prompt":"Once","stream":true}')
            time.sleep(PATIENCE / 2)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.settimeout(3 * PATIENCE)
            with pytest.raises(TimeoutError):
                connection.recv(1)


def test_two_hundred_dawdlers_do_not_keep_anybody_out(server):
    """A request among them is answered at once; afterwards none of them holds a connection."""
    dawdlers = [server.connect() for _ in range(200)]
    for connection in dawdlers:
        connection.sendall(HEAD[:20])
    began = time.monotonic()
    assert httpx.post(server.url + "/v1/completions", json={"prompt": "Once"}).status_code == 200
    assert time.monotonic() - began < 3
    deadline = time.monotonic() + PATIENCE + 5
    while len(server.server.server_state.connections) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(server.server.server_state.connections) <= 1, "at most the one of the request that was answered"
    for connection in dawdlers:
        connection.close()


def test_streams_are_the_same_bytes_over_a_socket_and_without_one():
    """On a socket, chunks are written past ASGI's layers; HTTP/1.0 knows no chunks and goes the long way. One text for all."""
    asked = {"prompt": "Once", "stream": True, "request_id": "r"}

    def data_of(raw: bytes) -> list[dict]:
        events = raw.decode().split("data: ")[1:]
        assert events[-1].strip() == "[DONE]", "a stream ends with [DONE]"
        return [json.loads(event) | {"created": 0, "model": ""} for event in events[:-1]]

    with ServeThread() as server:
        chunked = httpx.post(server.url + "/v1/completions", json=asked)
        body = json.dumps(asked).encode()
        with server.connect() as old:
            old.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                        % (len(body), body))
            answer = http.client.HTTPResponse(old)
            answer.begin()
            unchunked = answer.read()
    assert chunked.headers["transfer-encoding"] == "chunked" and answer.headers["transfer-encoding"] is None
    assert data_of(chunked.content) == data_of(unchunked) == data_of(ask("/v1/completions", asked).content)


def test_a_proxy_may_show_the_server_under_a_path():
    """--root-path: routes and open paths are found, with or without a key, and the document names the path."""
    with ServeThread("--root-path", "/llm", "--api-key", "k") as server:
        assert httpx.get(server.url + "/health").status_code == 200, "the proxy takes the path off"
        assert httpx.get(server.url + "/v1/models").status_code == 401
        key = {"authorization": "Bearer k"}
        assert httpx.get(server.url + "/v1/models", headers=key).status_code == 200
        assert httpx.get(server.url + "/openapi.json", headers=key).json()["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize("path", ["/health", "/llm/health", "/", "/llm", "/llm/", "/llm/static/main.js"])
def test_a_proxy_may_leave_its_path_on(path):
    """Taken off or not, a path means the same, and what is open without a key stays open."""
    with ServeThread("--root-path", "/llm", "--api-key", "k") as server:
        assert httpx.get(server.url + path).status_code == 200
        assert httpx.get(server.url + "/llm/v1/models").status_code == 401
        assert httpx.get(server.url + "/llmv1/models", headers={"authorization": "Bearer k"}).status_code == 404


def test_the_page_knows_where_a_proxy_shows_it():
    """Its addresses are relative to the public path, whether the browser's own ends in a slash or not."""
    with ServeThread("--root-path", '/a"b') as server:
        first = httpx.get(server.url + "/")
        assert '<base href="/a&quot;b/">' in first.text, first.text[:300]
        again = httpx.get(server.url + "/", headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304, "the page as it is sent has its own tag"
    with ServeThread() as server:
        assert "<base" not in httpx.get(server.url + "/").text


def test_no_other_page_may_use_the_server():
    """No CORS by default: an answer to another origin carries no header that lets a browser show it."""
    with ServeThread() as server:
        for method in ("OPTIONS", "POST"):
            response = httpx.request(method, server.url + "/v1/completions", json={"prompt": "Once"},
                                     headers={"origin": "https://example.org", "access-control-request-method": "POST"})
            assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) for 127.0.0.1, made now."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", made[0], "-keyout", made[1]],
                   check=True, capture_output=True, timeout=60)
    return made


def test_tls_files_make_it_https(certificate):
    """The certificate is shown and its key used; plain HTTP gets no answer; the banner says https."""
    flags = ["--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1]]
    with ServeThread(*flags) as server:
        trusting = ssl.create_default_context(cafile=certificate[0])
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "Once"}, verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http") + "/health")
    assert "curl -s https://127.0.0.1:1/v1" in banner(parse_args(list(map(str, flags))), 1)


def test_clients_may_be_asked_for_a_certificate(certificate):
    """--ssl-cert-reqs 2: none, no connection; one that --ssl-ca-certs signs is let in."""
    flags = ["--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1], "--ssl-ca-certs", certificate[0]]
    with ServeThread(*flags, "--ssl-cert-reqs", 2) as server:
        context = ssl.create_default_context(cafile=certificate[0])
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/health", verify=context)
        context.load_cert_chain(*certificate)
        assert httpx.get(server.url + "/health", verify=context).status_code == 200


MISTAKES = {
    "no file": (["--ssl-certfile", "/no/such/file"], "--ssl-certfile: there is no file '/no/such/file'"),
    "no certificate": (["--ssl-certfile", __file__], "--ssl-certfile: no certificate with its key"),
    "a key alone": (["--ssl-keyfile", __file__], "--ssl-keyfile: needs --ssl-certfile"),
    "no patience": (["--timeout-receive", "0"], "--timeout-receive: must be a number of seconds above 0"),
    "no number": (["--timeout-keep-alive", "nan"], "--timeout-keep-alive: must be a number of seconds above 0"),
    "a relative path": (["--root-path", "llm"], "--root-path: must begin with a slash"),
    "a slash behind": (["--root-path", "/llm/"], "--root-path: must begin with a slash"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_connection_flag_is_one_line(argv, message, capsys):
    """Found before a model is loaded."""
    with pytest.raises(SystemExit) as exit_:
        parse_args(argv)
    err = capsys.readouterr().err
    assert (exit_.value.code, err.count("\n")) == (2, 1)
    assert message in err
