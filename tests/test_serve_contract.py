"""What OpenAI's own client makes of the server: every kind of answer as its types, every error as its classes.

Against a scripted engine behind a real socket; test_serve_process.py asks a real engine.
"""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("openai", reason="these tests need OpenAI's client")

import openai
from serve_thread import ServeThread

from minivllm.serve.limits import BusyError

HI = [{"role": "user", "content": "Hi"}]
TEXT = "Once upon a time"


def client_of(server: ServeThread, kind: type = openai.OpenAI, key: str = "k1", **options):
    return kind(base_url=server.url + "/v1", api_key=key, timeout=20, **{"max_retries": 0} | options)


@pytest.fixture(scope="module")
def server():
    with ServeThread("--served-model-name", "tiny", "--api-key", "k1", "k2") as one:
        yield one


@pytest.fixture(autouse=True)
def healthy(server):
    """Every test finds an engine that works."""
    yield
    server.engine.fail_after, server.engine.errored = None, False


@pytest.fixture
def client(server):
    return client_of(server)


def test_whole_and_streamed_chats_agree_in_every_part(client):
    """Text, finish_reason, logprobs and usage of a stream, joined, are those of the whole answer."""
    asked = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert usage.choices == [] and usage.usage == whole.usage
    choices = [chunk.choices[0] for chunk in parts]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason] == ["length"]
    assert {(chunk.id, chunk.model, chunk.created) for chunk in chunks} == {(parts[0].id, "tiny", parts[0].created)}


def test_several_chat_answers_come_apart_by_their_index(client):
    """n = 3, whole and streamed."""
    asked = {"model": "tiny", "messages": HI, "n": 3, "temperature": 1}
    whole = client.chat.completions.create(**asked)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(index, TEXT) for index in range(3)]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT] * 3


def test_the_client_s_own_helper_gathers_a_stream(client):
    """`chat.completions.stream`, which checks every chunk against its types as it goes."""
    with client.chat.completions.stream(model="tiny", messages=HI) as stream:
        assert [event.type for event in stream].count("content.done") == 1
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_the_async_client_asks_for_many_at_once(server):
    """Whole and streamed, completions and chat, at the same time on one client."""
    async def story():
        async with client_of(server, openai.AsyncOpenAI) as client:
            async def streamed():
                stream = await client.completions.create(model="tiny", prompt="x", stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole():
                return (await client.chat.completions.create(model="tiny", messages=HI)).choices[0].message.content

            return await asyncio.gather(*(kind() for kind in (streamed, whole) * 8))

    assert set(asyncio.run(story())) == {TEXT}


def test_content_parts_and_batches_of_prompts(client, server):
    """Messages in parts; two prompts in one call come back in order."""
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    assert "Hi\nthere" in server.engine.tokenizer.decode(server.engine.streams[-1].prompt)
    answer = client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, TEXT), (1, TEXT)]
    assert answer.choices[1].logprobs.text_offset[0] == 0


def test_parameters_arrive_as_they_were_given(client, server):
    """stop, seed, penalties, logit_bias and vLLM's extras reach the engine from the client's arguments."""
    client.chat.completions.create(model="tiny", messages=HI, stop=["x", "y"], seed=5, presence_penalty=0.5, logit_bias={"70": 5},
                                   max_completion_tokens=7, extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True})
    params = server.engine.streams[-1].params
    assert (params.stop, params.seed, params.presence_penalty, params.logit_bias) == (["x", "y"], 5, 0.5, {70: 5})
    assert (params.max_tokens, params.top_k, params.min_p, params.ignore_eos) == (7, 3, 0.1, True)


def test_models_are_listed_with_their_length(client):
    """The list, and vLLM's max_model_len as an extra attribute."""
    (card,) = client.models.list()
    assert (card.id, card.object, card.max_model_len) == ("tiny", "model", 64)


def refused(call, kind: type, status: int):
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.status_code == status
    return caught.value


def test_every_error_is_the_class_that_the_client_has_for_it(client, server):
    """400, 401, 404 and 500 by class, status and param; the second key is as good as the first."""
    def ask(client=client, **change):
        return client.chat.completions.create(**{"model": "tiny", "messages": HI} | change)

    bad = refused(lambda: ask(top_p=2), openai.BadRequestError, 400)
    assert (bad.param, bad.body["code"], bad.type) == ("top_p", 400, "BadRequestError")
    assert refused(lambda: ask(extra_body={"max_token": 1}), openai.BadRequestError, 400).message.count("max_tokens") == 1
    assert refused(lambda: ask(model="gpt-4"), openai.NotFoundError, 404).param == "model"
    for key in ("", "k", "k1k2"):
        refused(lambda key=key: ask(client_of(server, key=key or "none")), openai.AuthenticationError, 401)
    assert ask(client_of(server, key="k2")).choices[0].message.content == TEXT
    server.engine.errored = True
    refused(ask, openai.InternalServerError, 500)


def test_an_error_in_the_middle_of_a_stream_is_an_api_error(client, server):
    """The chunks before it arrive; then the client raises, and does not take the answer for complete."""
    server.engine.fail_after = 2
    texts = []
    with pytest.raises(openai.APIError, match="engine has stopped") as caught:  # noqa: PT012 (the loop is what raises)
        for chunk in client.completions.create(model="tiny", prompt="x", stream=True):
            texts.append(chunk.choices[0].text)
    assert len(texts) == 2
    assert caught.value.body["code"] == 500


def test_a_busy_server_is_asked_again_by_itself(server, monkeypatch):
    """503 with Retry-After: a client with retries comes back and is served; one without gets the error."""
    left = [2]

    def busy():
        if left[0]:
            left[0] -= 1
            raise BusyError("busy", "max_num_queued_reqs")

    monkeypatch.setattr(server.service, "check_queue", busy)
    asked = {"model": "tiny", "prompt": "x"}
    refused(lambda: client_of(server).completions.create(**asked), openai.InternalServerError, 503)
    assert client_of(server, max_retries=2).completions.create(**asked).choices[0].text == TEXT
    assert left == [0]
