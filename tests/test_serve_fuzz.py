"""Bodies that nobody would write: drawn from the OpenAPI document, damaged byte by byte, and heads that are no HTTP.

Against a real process. Whatever comes, the answer is below 500 and in the envelope, the next request is served, and no block is
lost. (schemathesis reads the same document; but as unknown fields are refused here, all that it draws ends in one kind of 400.)
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
from collections import Counter

import pytest
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from serve_load import assert_adds_up, wait_until_idle
from serve_process import ServeProcess, make_model_folder

NUM_MALFORMED = 10_000
GOOD = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "Once"},
    "/detokenize": {"tokens": [70, 71]},
}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    flags = ["--max-model-len", 64, "--num-blocks", 300, "--served-model-name", "tiny", "--uvicorn-log-level", "error"]
    with ServeProcess(folder, *flags) as one:
        yield one
        assert_adds_up(wait_until_idle(one.url))
        assert "Traceback" not in one.stderr, one.stderr[-3000:]


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(server.url + "/openapi.json").json()


def check(status: int, content: bytes) -> dict | None:
    """An answer that a client can read: JSON or events; an error has the envelope and its own status in it."""
    assert status < 500, content
    if status == 200 and content.startswith(b"data: "):
        assert content.endswith(b"data: [DONE]\n\n")
        return None
    answer = json.loads(content)
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert (answer["error"]["code"], bool(answer["error"]["message"])) == (status, True)
    return answer


# From the document ------------------------------------------------------------------------------------------------------------

ODD = ["", "tiny", "a", "\u2028", "🙂", "\x00", "user", "left", "none", "auto", "Once upon", "9" * 30]
WORDS = st.sampled_from(ODD) | st.text(max_size=8)
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 5, 20, 64, 320, 2**63 - 1, 2**64, 10**400]) | st.integers(-3, 30)
ANYTHING = st.recursive(st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6)


def values(schema: dict, document: dict) -> st.SearchStrategy:
    """Values that a JSON schema of the document allows."""
    if "$ref" in schema:
        return values(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if "anyOf" in schema:
        return st.one_of(*(values(one, document) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return st.lists(values(schema.get("items", {}), document), min_size=schema.get("minItems", 0), max_size=4)
    if schema.get("type") == "object" and "properties" in schema:
        required = {name: values(schema["properties"][name], document) for name in schema.get("required", ())}
        optional = {name: values(one, document) for name, one in schema["properties"].items() if name not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return st.dictionaries(WORDS | NUMBERS.map(str), values(inner if isinstance(inner, dict) else {}, document), max_size=3)
    return {"string": WORDS, "integer": NUMBERS, "number": st.floats(-3, 3) | NUMBERS, "boolean": st.booleans(),
            "null": st.none()}.get(schema.get("type", ""), ANYTHING)


@st.composite
def bodies(draw, path: str, document: dict) -> dict:
    """A good body with one to three fields of the document as it allows them, and now and then as it does not."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    body = dict(GOOD[path])
    for name in draw(st.lists(st.sampled_from(sorted(properties)), max_size=3, unique=True)):
        body[name] = draw(ANYTHING) if draw(st.integers(0, 9)) == 0 else draw(values(properties[name], document))
    return body


@pytest.mark.parametrize("path", GOOD)
def test_no_body_of_the_document_is_answered_with_a_5xx(server, document, path):
    """Every field in every type, alone and with others: an answer or a 4xx that names the fault; and both do occur."""
    seen = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        @settings(max_examples=examples(120))
        @given(bodies(path, document))
        def ask(body):
            response = client.post(path, content=json.dumps(body), headers=JSON)
            check(response.status_code, response.content)
            seen[response.status_code] += 1

        ask()
    assert min(seen[200], seen[400]) >= seen.total() / 20, f"{seen}: a fuzzer that meets one answer only shows nothing"


# Damaged bytes ----------------------------------------------------------------------------------------------------------------

PIECES = [*(bytes([char]) for char in b'{}[]",:-'), b"null", b"true", b"1e999", b"\\ud800", b"\xff", b"\x00", b"NaN", b"9" * 40]


def damage(body: bytes, numbers: random.Random) -> bytes:
    """One to four bytes lost, changed, doubled or added."""
    for _ in range(numbers.randrange(1, 5)):
        at = numbers.randrange(len(body) + 1)
        kind = numbers.randrange(5)
        if kind == 0:
            body = body[:at]
        elif kind == 1:
            body = body[:at] + body[at + numbers.randrange(1, 5):]
        elif kind == 2:
            body = body[:at] + bytes([numbers.randrange(256)]) + body[at + 1:]
        elif kind == 3:
            body = body[:at] + numbers.choice(PIECES) + body[at:]
        else:
            body = body[:at] + body[max(0, at - 9):]
    return body


def test_ten_thousand_malformed_bodies_are_answered_and_forgotten(server):
    """Ten thousand, and none is a 5xx, and the connections are still good for the next request."""
    numbers, seen = random.Random(7), Counter()
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    for _ in range(NUM_MALFORMED):
        path = numbers.choice(list(GOOD))
        extra = numbers.choice([{}, {"stream": True}, {"stop": ["a", "b"]}, {"logit_bias": {"5": 1.5}}, {"seed": 1, "n": 2}])
        body = damage(json.dumps(GOOD[path] | (extra if "tokenize" not in path else {})).encode(), numbers)
        connection.request("POST", path, body, JSON)
        response = connection.getresponse()
        check(response.status, response.read())
        seen[response.status] += 1
    assert seen[400] > NUM_MALFORMED / 2, f"{seen}: most should have been malformed"
    assert httpx.post(server.url + "/v1/completions", json=GOOD["/v1/completions"]).status_code == 200


HEADS = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "half a line": b"GET\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "an unknown version": b"GET /health HTTP/9.9\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a length in words": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n",
    "a negative length": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a bad chunk": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an unknown encoding": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a header of a megabyte": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 2**20 + b"\r\n\r\n",
    "a line of a megabyte": b"GET /" + b"y" * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL bytes": b"GET /\x00 HTTP/1.1\r\nHost: x\x00\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: x\r\n X: y\r\n\r\n",
    "another method": b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that climbs": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "a broken escape": b"GET /%zz%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade": b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a body that was not announced": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\r\n{}",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_what_is_no_request_is_a_4xx_or_a_closed_connection(server, head):
    """Nothing of it reaches the engine or the log as a failure, and the server goes on."""
    async def send() -> bytes:
        host, _, port = server.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(head)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(4096), 20)
        except OSError:  # closed while we were still talking
            return b""
        finally:
            writer.transport.abort()

    answer = asyncio.run(send())
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")), answer
    assert httpx.get(server.url + "/health").status_code == 200
