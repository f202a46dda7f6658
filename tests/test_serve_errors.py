"""Everything a client can get wrong: status, envelope, the field at fault, and a message that says what would be right."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("openai", reason="these tests need OpenAI's client")

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from serve_doubles import CHATML, ScriptedEngine, ask, client_of, events

from minivllm.serve.errors import to_json
from minivllm.serve.fields import ACCEPTED, REFUSED
from minivllm.serve.protocol import ChatBody, CompletionBody

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"prompt": "Once", "max_tokens": 3}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
KEYED = {"api_keys": ("secret", "second")}


def error_of(response, status=400):
    """The error's four keys; the envelope has nothing else."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status, "code is the HTTP status, as an integer"
    return body["error"]


BAD_COMPLETIONS = {
    "no prompt": ({"prompt": None}, "prompt", "must be provided and non-empty"),
    "empty prompt": ({"prompt": ""}, "prompt", "must be provided and non-empty"),
    "no prompts": ({"prompt": []}, "prompt", "must be provided and non-empty"),
    "one empty prompt": ({"prompt": ["a", ""]}, "prompt", "one prompt of the list is empty"),
    "prompt of a wrong type": ({"prompt": 5}, "prompt", "must be a string, a list of strings"),
    "mixed prompts": ({"prompt": [1, "a"]}, "prompt", "must be a string, a list of strings"),
    "truth values as ids": ({"prompt": [True]}, "prompt", "must be a string, a list of strings"),
    "id too large": ({"prompt": [1, 10**6]}, "prompt", "Token id 1000000 is out of vocabulary"),
    "id below zero": ({"prompt": [-1]}, "prompt", "Token id -1 is out of vocabulary"),
    "lone surrogate": ({"prompt": "\ud83d"}, "prompt", "cannot be tokenised"),
    "too many prompts": ({"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts"),
    "long prompt": ({"prompt": [70] * 65}, "prompt",
                    "maximum context length is 64 tokens. However, your prompt contains 65 input"),
    "absurd prompt": ({"prompt": "a" * 10**6}, "prompt", "your prompt contains at least 7813 input tokens"),
    "max_tokens in words": ({"max_tokens": "ten"}, "body.max_tokens",
                            "body.max_tokens: Input should be a valid integer, got 'ten'"),
    "max_tokens too large": ({"max_tokens": 65}, "max_tokens", "max_tokens=65 cannot be greater than max_model_len=64."),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens", "max_tokens must be an integer >= 1"),
    "half a token": ({"max_tokens": 1.5}, "body.max_tokens", "valid integer"),
    "temperature": ({"temperature": 3.0}, "temperature", "temperature must be a finite number in [0, 2], got 3.0."),
    "top_p": ({"top_p": 0}, "top_p", "in (0, 1]"),
    "min_tokens": ({"min_tokens": 9}, "min_tokens", "at most max_tokens=3"),
    "stream in words": ({"stream": "yes"}, "body.stream", "valid boolean"),
    "stop list": ({"stop": list("abcde")}, "stop", "at most 4 strings"),
    "empty stop": ({"stop": [""]}, "stop", "without empty strings"),
    "stop of a wrong type": ({"stop": 5}, "stop", "a string or a list of strings"),
    "bias key": ({"logit_bias": {"five": 1}}, "logit_bias", "keys must be token ids, got 'five'"),
    "bias value": ({"logit_bias": {"5": 101}}, "logit_bias", "in [-100, 100]"),
    "greedy n": ({"n": 2, "temperature": 0}, "n", "n must be 1 when using greedy sampling"),
    "too many answers": ({"n": 9000, "prompt": ["a", "b"], "temperature": 1}, "n", "more than 16384 answers"),
    "logprobs": ({"logprobs": -1}, "logprobs", "must be 0 or more"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options",
                       "Stream options can only be defined when `stream=True`."),
    "unknown stream option": ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "unknown field"),
    "usage on every chunk of none": ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options",
                                     "needs `include_usage`"),
    "prompt_logprobs in a stream": ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs",
                                    "not available when `stream=True`"),
    "cache_salt": ({"cache_salt": "x" * 129}, "cache_salt", "1 to 128 characters"),
    "truncation": ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "in [1, 64]"),
    "near miss": ({"max_token": 5}, "max_token", "unknown field `max_token`: did you mean `max_tokens`?"),
    "nonsense": ({"zzz": 5}, "zzz", "unknown field `zzz`"),
    "chat's field": ({"messages": []}, "messages", "unknown field `messages`"),
}


@pytest.mark.parametrize(("change", "param", "message"), BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS.keys())
def test_a_bad_completion_is_a_400_that_names_the_field(change, param, message):
    """Whole and streamed alike: the error is found before the answer begins, and nothing reaches the engine."""
    for stream in ([False, True] if "stream" not in change and "stream_options" not in change else [None]):
        engine = ScriptedEngine()
        body = json.dumps(HELLO | ({} if stream is None else {"stream": stream}) | change)
        error = error_of(ask(COMPLETIONS, content=body, headers={"content-type": "application/json"}, engine=engine))
        assert error["param"] == param
        assert message in error["message"]
        assert error["type"] == ("Bad Request" if param.startswith("body.") else "BadRequestError")
        assert not engine.streams, "nothing was queued"


BAD_CHATS = {
    "no messages": ({"messages": []}, "body.messages", "at least 1 item"),
    "messages of a wrong type": ({"messages": "Hi"}, "body.messages", "valid list"),
    "no role": ({"messages": [{"content": "Hi"}]}, "body.messages", "body.messages.0.role: Field required"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", 'messages[0] needs a "content" string'),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages",
                 "part of type 'image_url'"),
    "tool arguments": ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "messages",
                       "no JSON"),
    "both ends": ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "Cannot set both"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "`logprobs` must be set to true"),
    "top_logprobs below -1": ({"logprobs": True, "top_logprobs": -2}, "top_logprobs", "top_logprobs must be an integer >= 0"),
    "max_completion_tokens": ({"max_completion_tokens": 0}, "max_completion_tokens",
                              "max_completion_tokens must be an integer >= 1"),
    "empty tools": ({"tools": []}, "tools", "must not be an empty list"),
    "tools to call": ({"tools": [{"type": "function"}]}, "tool_choice",
                      '"auto" tool choice requires --enable-auto-tool-choice'),
    "required tools": ({"tools": [{}], "tool_choice": "required"}, "tool_choice", '"required" tool choice requires'),
    "choice of nothing": ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
                          "`tools` must be set"),
    "json mode": ({"response_format": {"type": "json_object"}}, "response_format", "`response_format` is not implemented"),
    "another call of the template": ({"chat_template_kwargs": {"x": 1, "tokenize": True, "messages": []}}, "chat_template_kwargs",
                                     "must not hold messages, tokenize"),
    "arguments of a wrong type": ({"chat_template_kwargs": []}, "body.chat_template_kwargs", "valid dictionary"),
    "a template": ({"chat_template": "{{ x }}"}, "chat_template", "start the server with --chat-template"),
}


@pytest.mark.parametrize(("change", "param", "message"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_bad_chat_is_a_400_that_names_the_field(change, param, message):
    """By the names that chat has for them."""
    error = error_of(ask(CHAT, MESSAGES | change))
    assert error["param"] == param
    assert message in error["message"]


def test_a_checkpoint_without_a_template_says_what_to_do():
    """No chat template: 400 with advice, and completions go on working."""
    engine = ScriptedEngine(chat_template=None)
    engine.tokenizer.chat_template = None
    assert "--chat-template" in error_of(ask(CHAT, MESSAGES, engine=engine))["message"]
    assert ask(COMPLETIONS, HELLO, engine=engine).status_code == 200


def test_a_template_that_fails_is_the_requests_fault():
    """Whatever a template raises is a 400 with its message."""
    engine = ScriptedEngine(chat_template=CHATML + "{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in error_of(ask(CHAT, MESSAGES, engine=engine))["message"]


RAW_BODIES = {
    "no JSON": (b"{", "body at character 1: Expecting property name"),
    "no UTF-8": (b'{"prompt": "\xff"}', "error parsing the body"),
    "too deep": (b"[" * 100_000, ""),
    "a list": (b"[]", "valid dictionary"),
    "null": (b"null", "valid dictionary"),
    "nothing": (b"", "required"),
}


@pytest.mark.parametrize(("body", "message"), RAW_BODIES.values(), ids=RAW_BODIES.keys())
def test_a_body_that_is_no_json_object_is_a_400(body, message):
    """Never a 422, never a 500."""
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        error = error_of(ask(path, content=body, headers={"content-type": "application/json"}))
        assert message in error["message"], error
        assert error["type"] == "Bad Request"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_no_numbers_are_refused(value):
    """Python's JSON reader takes NaN and Infinity; no parameter does."""
    for name in ("temperature", "top_p", "repetition_penalty", "max_tokens", "seed"):
        body = json.dumps(HELLO)[:-1] + f', "{name}": {value}}}'
        error = error_of(ask(COMPLETIONS, content=body, headers={"content-type": "application/json"}))
        assert name in error["param"]


def test_an_unknown_model_is_a_404_with_the_names_that_exist():
    """The message lists the aliases; a name that is no text at all does not break the answer."""
    error = error_of(ask(COMPLETIONS, HELLO | {"model": "gpt-4"}), 404)
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert error["message"] == "The model `gpt-4` does not exist. Valid aliases: tiny, alias."
    body = json.dumps(HELLO | {"model": "\ud83d"})
    assert "`?`" in error_of(ask(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 404)["message"]


def test_the_content_type_must_be_json():
    """A form, or nothing, is a 400; a charset is fine."""
    for given in ("text/plain", "application/x-www-form-urlencoded", ""):
        error = error_of(ask(COMPLETIONS, content=json.dumps(HELLO), headers={"content-type": given}))
        assert "application/json" in error["message"]
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert ask(COMPLETIONS, content=json.dumps(HELLO), headers=headers).status_code == 200


def test_the_order_of_checks_decides_which_error_wins():
    """Key, content type, body, model, prompt, sampling: each fault alone uncovers the next."""
    wrong = {"model": "gpt-4", "prompt": [10**6], "temperature": 3, "max_tokens": "ten"}
    key = {"authorization": "Bearer secret"}
    assert ask(COMPLETIONS, wrong, **KEYED).status_code == 401
    plain = ask(COMPLETIONS, content=json.dumps(wrong), headers=key | {"content-type": "text/plain"}, **KEYED)
    assert "application/json" in error_of(plain)["message"]
    for fix, status, param in (({}, 400, "body.max_tokens"), ({"max_tokens": 2, "zz": 1}, 400, "zz"),
                               ({"max_tokens": 2}, 404, "model"),
                               ({"max_tokens": 2, "model": ""}, 400, "prompt"),
                               ({"max_tokens": 2, "model": "", "prompt": "a"}, 400, "temperature")):
        assert error_of(ask(COMPLETIONS, wrong | fix, headers=key, **KEYED), status)["param"] == param


def test_a_missing_key_is_the_401_that_clients_know():
    """The body is literally {"error": "Unauthorized"}; every one of several keys is good; the scheme's case does not matter."""
    for headers in ({}, {"authorization": "secret"}, {"authorization": "Basic secret"}, {"authorization": "Bearer wrong"},
                    {"authorization": "Bearer "}, {"authorization": "Bearer s\u00e9cret".encode("latin-1")}):
        response = ask(COMPLETIONS, HELLO, headers=headers, **KEYED)
        assert (response.status_code, response.content) == (401, b'{"error":"Unauthorized"}')
    for header in ("Bearer secret", "bearer second"):
        assert ask(COMPLETIONS, HELLO, headers={"authorization": header}, **KEYED).status_code == 200


def test_monitors_need_no_key():
    """/health, /ping and /version are open, and so is a browser's OPTIONS; tokenising is not."""
    for path in ("/health", "/ping", "/version"):
        assert ask(path, method="GET", **KEYED).status_code == 200
    assert ask(COMPLETIONS, method="OPTIONS", **KEYED).status_code == 405
    for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/nowhere")):
        assert ask(path, method=method, **KEYED).status_code == 401, path


def test_unknown_paths_and_methods_keep_fastapis_body():
    """404 and 405 with {"detail": ...}, as vLLM answers."""
    assert (ask("/nowhere", method="GET").status_code, ask("/nowhere", method="GET").json()) == (404, {"detail": "Not Found"})
    assert ask(COMPLETIONS, method="GET").json() == {"detail": "Method Not Allowed"}


@pytest.mark.parametrize("body", [CompletionBody, ChatBody])
def test_t47_every_field_of_openais_schema_is_known(body):
    """Each is read, accepted as changing nothing, or refused by name: none is an unknown field."""
    params = completion_create_params if body is CompletionBody else chat_create_params
    fields = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert len(fields) > 15, "the client's types were read"
    unknown = fields - body.model_fields.keys() - ACCEPTED.keys() - REFUSED.keys()
    assert not unknown, f"unknown to this server: {unknown}"


def test_fields_that_change_nothing_are_accepted():
    """Whatever they hold."""
    assert ask(COMPLETIONS, HELLO | dict.fromkeys(ACCEPTED, "x")).status_code == 200


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_change_the_answer_are_refused_by_name(name):
    """Null and the values that ask for nothing pass; any other is a 400, also with --ignore-unknown-fields."""
    for neutral in (None, *REFUSED[name]):
        assert ask(COMPLETIONS, HELLO | {name: neutral}).status_code == 200, neutral
    error = error_of(ask(COMPLETIONS, HELLO | {name: "something"}, ignore_unknown_fields=True))
    assert error["param"] == name
    assert f"`{name}` is not implemented" in error["message"]


def test_best_of_equal_to_n_asks_for_nothing():
    """best_of = n returns all there is."""
    assert ask(COMPLETIONS, HELLO | {"n": 2, "best_of": 2, "temperature": 1}).status_code == 200
    assert error_of(ask(COMPLETIONS, HELLO | {"n": 2, "best_of": 3, "temperature": 1}))["param"] == "best_of"


def test_unknown_fields_can_be_ignored(caplog):
    """--ignore-unknown-fields logs their names instead."""
    assert ask(COMPLETIONS, HELLO | {"max_token": 1}, ignore_unknown_fields=True).status_code == 200
    assert "max_token" in caplog.text


def test_what_is_nested_too_deeply_is_a_400():
    """Wherever it is nested, and whoever gives up first: the parser, or who measures what a template would render."""
    for depth in (100, 900, 950, 980, 100_000):
        for field in ("messages", "tools", "chat_template_kwargs", "zz"):
            body = json.dumps(MESSAGES)[:-1] + f', "{field}": ' + '{"a":[' * (depth // 2) + "]}" * (depth // 2) + "}"
            response = ask(CHAT, content=body, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), f"{field} at depth {depth}: {response.status_code}"


def test_a_failed_engine_is_told_before_anything_is_tokenised():
    """Once the engine has failed, a new request is a 500 whatever its prompt and parameters are; a wrong field comes first."""
    engine = ScriptedEngine()
    engine.errored = True
    assert "has stopped" in error_of(ask(COMPLETIONS, {"prompt": "", "temperature": 9}, engine=engine), 500)["message"]
    assert error_of(ask(COMPLETIONS, {"prompt": "", "zz": 1}, engine=engine))["param"] == "zz"


def test_a_dead_engine_is_a_500_that_says_so():
    """Whole or streamed, before the first chunk: an HTTP error."""
    for stream in (False, True):
        engine = ScriptedEngine()
        engine.fail_after = 0
        error = error_of(ask(COMPLETIONS, HELLO | {"stream": stream}, engine=engine), 500)
        assert error["type"] == "InternalServerError"
        assert "The engine has stopped" in error["message"]
        assert error_of(ask(COMPLETIONS, HELLO | {"stream": stream}, engine=engine), 500), "later requests get it too"


def test_an_error_after_the_first_chunk_is_an_event():
    """The stream tells the error and ends with [DONE]; no traceback reaches the client."""
    engine = ScriptedEngine()
    engine.fail_after = 2
    *chunks, error, done = events(ask(COMPLETIONS, HELLO | {"stream": True}, engine=engine))
    assert len(chunks) == 2
    assert json.loads(error)["error"]["code"] == 500
    assert "CUDA" not in error, "only messages written for the user are shown"
    assert done == "[DONE]"


def test_an_answer_of_our_own_mistakes_is_a_500_without_details(caplog):
    """An exception that nobody expected: 500, and the reason is in the log only."""
    engine = ScriptedEngine()
    engine.script = None
    error = error_of(ask(COMPLETIONS, HELLO, engine=engine), 500)
    assert error["message"] == "Internal server error"


def test_a_refused_prompt_takes_the_others_with_it():
    """If one prompt of a body is refused by the engine, those already queued are given back."""
    class Picky(ScriptedEngine):
        async def add_request(self, prompt, params, request_id, *, cache_salt=None, final_only=False):
            if len(self.streams) == 2:
                from minivllm.exceptions import ValidationError
                raise ValidationError("needs more blocks than there are", parameter="prompt")
            return await super().add_request(prompt, params, request_id, cache_salt=cache_salt, final_only=final_only)

    engine = Picky()
    assert "more blocks" in error_of(ask(COMPLETIONS, HELLO | {"prompt": ["a", "b", "c"]}, engine=engine))["message"]
    assert [stream.is_closed for stream in engine.streams] == [True, True]


@pytest.mark.parametrize("stream", [False, True])
def test_t48_a_client_that_hangs_up_aborts_its_request(stream):
    """Whole and streamed: every request in the engine is closed as soon as the client has gone."""
    async def story():
        engine = ScriptedEngine()
        engine.hold_after = 2
        async with client_of(engine) as client:
            app = client._transport.app
            received = asyncio.Queue()
            sent = []
            body = to_json(HELLO | {"stream": stream, "prompt": ["a", "b"]})
            received.put_nowait({"type": "http.request", "body": body, "more_body": False})
            scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "scheme": "http",
                     "http_version": "1.1", "headers": [(b"content-type", b"application/json")]}

            async def send(message):
                sent.append(message)

            task = asyncio.create_task(app(scope, received.get, send))
            while len(engine.streams) < 2 or min(each.num_tokens for each in engine.streams) < 2:
                await asyncio.sleep(0)
            assert not any(each.is_closed for each in engine.streams), "the client is still there"
            received.put_nowait({"type": "http.disconnect"})
            await task
            return engine, sent

    engine, sent = asyncio.run(asyncio.wait_for(story(), 30))
    assert [each.is_closed for each in engine.streams] == [True, True]
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_server_on_its_way_out_admits_nobody_and_ends_streams():
    """503 for new requests; a stream in flight gets an error event and its [DONE]."""
    async def story():
        engine = ScriptedEngine()
        engine.hold_after = 2
        async with client_of(engine) as client:
            service = client._transport.app.state.service
            running = [asyncio.create_task(client.post(COMPLETIONS, json=HELLO | {"stream": stream}))
                       for stream in (True, False)]
            while len(engine.streams) < 2 or min(each.num_tokens for each in engine.streams) < 2:
                await asyncio.sleep(0)
            service.is_draining = True
            late = await client.post(COMPLETIONS, json=HELLO)
            service.stopping.set()
            return late, *await asyncio.gather(*running)

    late, streamed, whole = asyncio.run(asyncio.wait_for(story(), 30))
    assert error_of(late, 503)["type"] == "ServiceUnavailableError"
    *_, error, done = events(streamed)
    assert json.loads(error)["error"]["code"] == 503
    assert done == "[DONE]"
    assert error_of(whole, 503)
