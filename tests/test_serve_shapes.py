"""The JSON of every answer, key by key, against an engine that says what it is told."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from serve_doubles import ScriptedEngine, ask, events

from minivllm.serve.answers import Delta
from minivllm.serve.chat import ChatAnswer
from minivllm.serve.completions import CompletionAnswer
from minivllm.serve.errors import ENCODER, to_json
from minivllm.serve.prompts import Prompt
from minivllm.serve.protocol import ChatBody, CompletionBody

HELLO = {"prompt": "Once", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
LENGTH = {"finish_reason": "length", "stop_reason": None}


def tokens_of(engine, count=None):
    return engine.tokenizer.encode(engine.script, add_special_tokens=False)[:count]


def chunks_of(path, body, **options):
    """The chunks of a stream, which ends with [DONE]."""
    response = ask(path, {**body, "stream": True}, **options)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *data, last = events(response)
    assert last == "[DONE]", "a stream ends with [DONE]"
    return [json.loads(chunk) for chunk in data]


def test_t46_a_completion_has_exactly_these_keys():
    """Without `stream` the answer is one JSON object, nulls included, in vLLM's shape."""
    engine = ScriptedEngine()
    answer = ask("/v1/completions", HELLO, engine=engine).json()
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer.pop("system_fingerprint").startswith("minivllm-")
    num_prompt = len(engine.tokenizer.encode("Once"))
    assert answer == {
        "object": "text_completion", "model": "tiny",
        "choices": [{"index": 0, "text": engine.tokenizer.decode(tokens_of(engine, 3)), "logprobs": None, **LENGTH,
                     "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None}],
        "service_tier": None,
        "usage": {"prompt_tokens": num_prompt, "total_tokens": num_prompt + 3, "completion_tokens": 3,
                  "prompt_tokens_details": {"cached_tokens": 1}},
    }


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", HELLO), ("/v1/chat/completions", CHAT)])
def test_the_engine_is_told_who_sees_an_answer_before_its_end(path, body):
    """A stream gets an output for every step, a whole answer the last one alone: nothing is made of its tokens before."""
    for stream, expected in ((None, True), (False, True), (True, False)):
        engine = ScriptedEngine()
        ask(path, body | {"stream": stream}, engine=engine)
        assert engine.waits_for_the_end is expected, f"stream={stream} asked for final_only={engine.waits_for_the_end}"


def test_a_completion_stream_is_one_chunk_per_token():
    """Chunks keep id, created and model; the last one carries the finish_reason; usage is absent unless asked for."""
    chunks = chunks_of("/v1/completions", HELLO)
    whole = ask("/v1/completions", HELLO).json()["choices"][0]["text"]
    assert len(chunks) == 3, "a chunk for every token"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole, "the pieces joined are the whole answer"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    assert all(set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"} for chunk in chunks)


@pytest.mark.parametrize("text", ["a", "", '"\\\n\t', "é🙂\u2028", "\x00\x7f", "\ud83d"])
def test_the_short_way_to_a_chunk_writes_the_same_bytes_as_the_long_one(text):
    """Most chunks are text alone and are written from a template: whatever the text, as the JSON writer would."""
    delta = Delta(text, [1], None, None, None, False)
    for kind, body in ((CompletionAnswer, CompletionBody(prompt="x")), (ChatAnswer, ChatBody(**CHAT))):
        service = SimpleNamespace(model_name="tiny", names=None)
        answer = kind(service, body, "id", [Prompt([1])], [])
        (choice,) = answer.chunk_choices(3, None, delta)
        assert delta.is_plain
        assert answer.plain_choice(3, ENCODER.encode(text)).encode("utf-8", "replace") == to_json(choice)


def test_a_token_without_text_has_its_chunk():
    """Half a character has no text yet; its chunk comes all the same, so that a client can time every token."""
    engine = ScriptedEngine("a🙂")
    chunks = chunks_of("/v1/completions", {"prompt": "x"}, engine=engine)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts == ["a", "", "", "", "🙂"], "four bytes of an emoji, four tokens, one character"


def test_usage_comes_last_and_only_when_asked_for():
    """include_usage adds one chunk without choices; continuous_usage_stats counts along on every chunk."""
    *chunks, last = chunks_of("/v1/completions", HELLO | {"stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert not any("usage" in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of("/v1/completions", HELLO | {"stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 2, 3, 3], "every chunk tells the tokens so far"


def test_prompts_times_n_make_one_flat_list():
    """choice index = prompt * n + i; prompts count once each, answers all."""
    engine = ScriptedEngine()
    body = {"prompt": ["Once", "upon", "a"], "n": 2, "temperature": 1, "max_tokens": 2}
    answer = ask("/v1/completions", body, engine=engine).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert answer["usage"]["prompt_tokens"] == sum(len(engine.tokenizer.encode(text)) for text in body["prompt"])
    assert answer["usage"]["completion_tokens"] == 12
    chunks = chunks_of("/v1/completions", body)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == set(range(6)), "a stream interleaves all choices"
    ends = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(6)), "exactly one chunk per choice carries a finish_reason"


@pytest.mark.parametrize("prompt", ["Once", ["Once"], [70, 71], [[70, 71]]])
def test_all_four_forms_of_a_prompt_are_read(prompt):
    """A string, a list of strings, token ids, a list of lists of token ids."""
    engine = ScriptedEngine()
    assert ask("/v1/completions", {"prompt": prompt}, engine=engine).status_code == 200
    assert engine.streams[0].prompt == (engine.tokenizer.encode("Once") if "Once" in str(prompt) else [70, 71])


def test_completion_logprobs_are_parallel_lists_with_true_offsets():
    """Four lists of equal length; text[offset] is where the token starts; -inf becomes -9999; k asked for may give k + 1."""
    engine = ScriptedEngine("Once 🙂 upon")
    answer = ask("/v1/completions", {"prompt": "x", "logprobs": 2}, engine=engine).json()["choices"][0]
    logprobs = answer["logprobs"]
    assert logprobs["token_logprobs"] == [-1.5] * len(tokens_of(engine))
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert "\ufffd" in token or answer["text"].startswith(token, offset), f"{token!r} starts at {offset}"
    assert logprobs["top_logprobs"][0] == {engine.tokenizer.decode([65]): -0.5, logprobs["tokens"][0]: -1.5,
                                           engine.tokenizer.decode([66]): -9999.0}
    assert list(logprobs["top_logprobs"][0].values()) == [-0.5, -1.5, -9999.0], "the likeliest comes first"


def test_offsets_go_on_across_chunks():
    """The logprobs of a stream, joined, are those of the whole answer."""
    body = {"prompt": "Once", "logprobs": 1, "echo": True, "max_tokens": 4}
    whole = ask("/v1/completions", body).json()["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks_of("/v1/completions", body)]
    assert {key: [value for part in parts for value in part[key]] for key in whole} == whole


def test_echo_puts_the_prompt_in_front():
    """The prompt's text comes first, and with logprobs its tokens too; the first one is predicted by nothing."""
    engine = ScriptedEngine()
    choice = ask("/v1/completions", HELLO | {"echo": True, "logprobs": 1}, engine=engine).json()["choices"][0]
    assert choice["text"] == "Once" + engine.tokenizer.decode(tokens_of(engine, 3))
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][0] == 0


def test_echo_with_zero_tokens_scores_the_prompt():
    """max_tokens=0 with echo gives the prompt, its logprobs, and no generated token; without echo it is refused."""
    engine = ScriptedEngine()
    answer = ask("/v1/completions", {"prompt": "Once upon", "max_tokens": 0, "echo": True, "logprobs": 1}, engine=engine).json()
    assert answer["choices"][0]["text"] == "Once upon"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert ask("/v1/completions", {"prompt": "Once", "max_tokens": 0}).json()["error"]["param"] == "max_tokens"


def test_token_ids_are_returned_when_asked_for():
    """return_token_ids and return_tokens_as_token_ids show ids, whole and streamed; a stream tells the prompt's once."""
    engine = ScriptedEngine()
    body = HELLO | {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0}
    choice = ask("/v1/completions", body, engine=engine).json()["choices"][0]
    assert choice["token_ids"] == tokens_of(engine, 3)
    assert choice["prompt_token_ids"] == engine.tokenizer.encode("Once")
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in tokens_of(engine, 3)]
    chunks = chunks_of("/v1/completions", body)
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == tokens_of(engine, 3)
    assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks] == [True, False, False]


def test_prompt_logprobs_are_keyed_by_token_id():
    """vLLM's extra: null for the first token, then {id: {logprob, rank, decoded_token}}."""
    engine = ScriptedEngine()
    first, second, *_ = ask("/v1/completions", HELLO | {"prompt": [70, 71], "prompt_logprobs": 1}, engine=engine).json()[
        "choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["71"] == {"logprob": -1.5, "rank": 2, "decoded_token": engine.tokenizer.decode([71])}


def test_a_chat_answer_has_exactly_these_keys():
    """The message in vLLM's shape, with the prompt rendered by the template."""
    engine = ScriptedEngine()
    answer = ask("/v1/chat/completions", CHAT, engine=engine).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert set(answer) == {"object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage",
                           "prompt_logprobs", "prompt_token_ids"}
    text = engine.tokenizer.decode(tokens_of(engine, 3))
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None,
                                "function_call": None, "reasoning": None}, "logprobs": None, **LENGTH, "token_ids": None}]
    rendered = engine.tokenizer.decode(engine.streams[0].prompt)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_stream_names_the_role_first():
    """One role chunk per choice, with the first output; then content chunks; the last has the finish_reason."""
    chunks = chunks_of("/v1/chat/completions", CHAT)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert choices[0] == {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert [set(choice["delta"]) for choice in choices[1:]] == [{"content"}] * 3
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    two = chunks_of("/v1/chat/completions", CHAT | {"n": 2, "temperature": 1})
    roles = [chunk["choices"][0]["index"] for chunk in two if "role" in chunk["choices"][0]["delta"]]
    assert roles == [0, 1], "each choice has its own role chunk"


def test_chat_logprobs_give_the_bytes_of_every_token():
    """The bytes of all tokens joined are the answer's UTF-8, even where a character is split; top_logprobs are by rank."""
    engine = ScriptedEngine("a 🙂")
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": None}
    content = ask("/v1/chat/completions", body, engine=engine).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a 🙂"
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    bare = ask("/v1/chat/completions", CHAT | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in bare] == [[], [], []], "without top_logprobs only the tokens themselves"


def test_content_may_come_in_text_parts():
    """A list of text parts is joined with newlines, as vLLM does."""
    engine = ScriptedEngine()
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    ask("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}, engine=engine)
    assert "user\nHi\nthere<|im_end|>" in engine.tokenizer.decode(engine.streams[0].prompt)


def test_the_last_message_can_be_continued():
    """continue_final_message leaves the last message open; with echo the answer begins with it."""
    engine = ScriptedEngine(" upon")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    answer = ask("/v1/chat/completions", body, engine=engine).json()
    assert engine.tokenizer.decode(engine.streams[0].prompt).endswith("assistant\nOnce")
    assert answer["choices"][0]["message"]["content"] == "Once upon"


def test_tools_are_rendered_when_nothing_must_be_parsed():
    """tool_choice "none" hands the tools to the template and returns plain text."""
    engine = ScriptedEngine()
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    assert ask("/v1/chat/completions", CHAT | {"tools": [tool], "tool_choice": "none"}, engine=engine).status_code == 200
    assert "[1 tools]" in engine.tokenizer.decode(engine.streams[0].prompt)


def test_template_variables_reach_the_template():
    """chat_template_kwargs are variables of the template, in chat and in /tokenize; a tool's or message's own fields stay."""
    engine = ScriptedEngine(chat_template="{% if enable_thinking %}[{{ style.name }}]{% endif %}{{ messages[0].content }}")
    variables = {"chat_template_kwargs": {"enable_thinking": True, "style": {"name": "calm"}}}
    assert ask("/v1/chat/completions", CHAT | variables, engine=engine).status_code == 200
    assert engine.tokenizer.decode(engine.streams[0].prompt) == "[calm]Hi"
    counted = ask("/tokenize", {"messages": CHAT["messages"]} | variables, engine=engine).json()["tokens"]
    assert counted == engine.streams[0].prompt


def test_special_tokens_are_added_to_a_template_only_when_asked_for():
    """add_special_tokens is false for conversations, whose template writes them, and true for texts; both can be turned round."""
    engine = ScriptedEngine()
    encode = engine.tokenizer.encode
    engine.tokenizer.encode = lambda text, add_special_tokens=True, **more: (
        [2] * add_special_tokens + encode(text, add_special_tokens=False))
    for asked, chat, text in (({}, False, True), ({"add_special_tokens": True}, True, True),
                              ({"add_special_tokens": False}, False, False)):
        ask("/v1/chat/completions", CHAT | asked, engine=engine)
        ask("/v1/completions", HELLO | asked, engine=engine)
        assert [stream.prompt[0] == 2 for stream in engine.streams[-2:]] == [chat, text], asked
        tokens = ask("/tokenize", {"messages": CHAT["messages"]} | asked, engine=engine).json()["tokens"]
        assert (tokens[0] == 2) == chat, "and /tokenize agrees"


def test_fields_left_out_come_from_the_checkpoint():
    """generation_config's defaults fill what is missing or null, and nothing that was given."""
    engine = ScriptedEngine(defaults={"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1})
    ask("/v1/completions", {"prompt": "x", "temperature": 0, "top_k": None}, engine=engine)
    params = engine.streams[0].params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0, 20, 1.1)
    assert params.max_tokens == 16, "a completion without max_tokens has 16"
    ask("/v1/chat/completions", {"messages": CHAT["messages"]}, engine=engine)
    assert engine.streams[1].params.max_tokens is None, "a chat without max_tokens has the rest of the context"
    ask("/v1/chat/completions", CHAT | {"max_completion_tokens": 5}, engine=engine)
    assert engine.streams[2].params.max_tokens == 5, "max_completion_tokens wins over max_tokens"


def test_logit_bias_keys_become_ids():
    """JSON has string keys only; the engine gets integers."""
    engine = ScriptedEngine()
    ask("/v1/completions", {"prompt": "x", "logit_bias": {"70": 5, "71": -1.5}}, engine=engine)
    assert engine.streams[0].params.logit_bias == {70: 5, 71: -1.5}


def test_long_prompts_can_be_cut():
    """truncate_prompt_tokens keeps the last k tokens, or the first with truncation_side right; -1 leaves room to answer."""
    engine = ScriptedEngine(max_model_len=8)
    ids = list(range(70, 82))
    for body in ({"truncate_prompt_tokens": 3}, {"truncate_prompt_tokens": 3, "truncation_side": "right"},
                 {"truncate_prompt_tokens": -1, "max_tokens": 2}):
        assert ask("/v1/completions", {"prompt": ids, **body}, engine=engine).status_code == 200
    assert [stream.prompt for stream in engine.streams] == [ids[-3:], ids[:3], ids[-6:]]


def test_long_texts_are_tokenised_beside_the_event_loop():
    """A text of thousands of characters would hold up everybody's stream; a short one is not worth a thread."""
    engine, threads = ScriptedEngine(max_model_len=8192), []
    encode = engine.tokenizer.encode
    engine.tokenizer.encode = lambda text, **given: threads.append(threading.current_thread().name) or encode(text, **given)
    for prompt in ("Once", "Once " * 1000):
        assert ask("/v1/completions", {"prompt": prompt, "max_tokens": 0, "echo": True}, engine=engine).status_code == 200
    on_worker = [name.startswith("minivllm-serve-tokenizer") for name in threads]
    assert (on_worker[0], True in on_worker) == (False, True)


def test_the_client_may_choose_the_id():
    """X-Request-Id, else the body's request_id; two prompts of one request have different ids in the engine."""
    engine = ScriptedEngine()
    by_header = ask("/v1/completions", HELLO | {"request_id": "b"}, headers={"x-request-id": "h"}, engine=engine)
    assert by_header.json()["id"] == "cmpl-h"
    assert ask("/v1/completions", HELLO | {"request_id": "b", "prompt": ["x", "y"]}, engine=engine).json()["id"] == "cmpl-b"
    assert len({stream.request_id for stream in engine.streams}) == 3


def test_models_are_listed_under_every_name():
    """One card per served name, with max_model_len."""
    answer = ask("/v1/models", method="GET").json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["tiny", "alias"]
    assert answer["data"][0] | {"created": 0} == {"id": "tiny", "object": "model", "created": 0, "owned_by": "minivllm",
                                                   "root": "/models/tiny", "parent": None, "max_model_len": 64}


@pytest.mark.parametrize("name", ["alias", "tiny", "", None])
def test_every_served_name_and_none_at_all_reach_the_model(name):
    """A null, empty or missing model is the served one; the answer tells the first name."""
    assert ask("/v1/completions", HELLO | {"model": name}).json()["model"] == "tiny"


def test_health_ping_and_version_answer():
    """200 with an empty body while the engine lives, 503 once it has failed."""
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        response = ask(path, method=method)
        assert (response.status_code, response.content) == (200, b""), path
        broken = ScriptedEngine()
        broken.errored = True
        assert ask(path, method=method, engine=broken).status_code == 503, path
    assert set(ask("/version", method="GET").json()) == {"version"}


def test_texts_and_conversations_can_be_tokenised_and_back():
    """/tokenize counts what would be sent, /detokenize undoes it."""
    tokenizer = ScriptedEngine().tokenizer
    answer = ask("/tokenize", {"prompt": "Once upon", "return_token_strs": True}).json()
    assert answer == {"count": len(answer["tokens"]), "max_model_len": 64, "tokens": tokenizer.encode("Once upon"),
                      "token_strs": tokenizer.tokenize("Once upon")}
    assert ask("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Once upon"}
    chat = ask("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")


def test_the_openapi_document_lists_every_field_that_is_read():
    """/openapi.json is made from the models that read the bodies, with the four forms of a prompt spelled out."""
    schemas = ask("/openapi.json", method="GET").json()["components"]["schemas"]
    for body in (CompletionBody, ChatBody):
        assert schemas[body.__name__]["properties"].keys() == body.model_fields.keys()
    assert len(schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]) == 4


def test_the_openapi_document_tells_the_errors_that_are_sent():
    """Every POST names 400 with the envelope and the bare 401; nothing speaks of FastAPI's 422, which is never sent."""
    document = ask("/openapi.json", method="GET").json()
    assert "422" not in json.dumps(document) and "HTTPValidationError" not in document["components"]["schemas"]
    for path, methods in document["paths"].items():
        responses = methods.get("post", methods.get("get"))["responses"]
        assert {"200", "400", "401", "default"} <= responses.keys(), path
        assert responses["400"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    assert set(document["components"]["schemas"]["ErrorFields"]["properties"]) == {"message", "type", "param", "code"}
