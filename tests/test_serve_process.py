"""A real server process, asked by the real `openai` client and the real curl."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("openai", reason="these tests need OpenAI's client")

import httpx
import openai
from serve_process import InFlight, ServeProcess, make_model_folder

from minivllm.serve.logprobs import LOWEST

GREEDY = {"temperature": 0, "max_tokens": 12}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    flags = ["--max-model-len", 2048, "--num-blocks", 600, "--max-num-seqs", 8, "--host", "0.0.0.0"]
    with ServeProcess(folder, *flags, "--uvicorn-log-level", "error", "--served-model-name", "tiny", "other") as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_the_openai_client_lists_models_and_completes(client):
    """Whole answers: names, text, usage, finish_reason."""
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    answer = client.completions.create(model="tiny", prompt="Once upon", **GREEDY)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 12)
    again = client.completions.create(model="other", prompt="Once upon", **GREEDY)
    assert again.choices[0].text == answer.choices[0].text, "greedy answers repeat"
    assert answer.model == again.model == "tiny", "the answer tells the first name"


def test_a_stream_is_the_whole_answer_in_pieces(client):
    """Completions and chat: the pieces joined equal the whole, and the usage is the same."""
    whole = client.completions.create(model="tiny", prompt="Once upon", **GREEDY)
    options = {"include_usage": True}
    chunks = list(client.completions.create(model="tiny", prompt="Once upon", stream=True, stream_options=options, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    chat = client.chat.completions.create(model="tiny", messages=HI, **GREEDY)
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True, **GREEDY)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == chat.choices[0].message.content


def test_t48_many_clients_at_once_get_what_each_gets_alone(server, client):
    """Thirty-two concurrent streams with equal prompts give one greedy text."""
    alone = client.completions.create(model="tiny", prompt="The block", **GREEDY).choices[0].text

    async def story():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as other:
            async def one():
                stream = await other.completions.create(model="tiny", prompt="The block", stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(32)))

    assert set(asyncio.run(story())) == {alone}


def test_n_answers_and_seeds(client):
    """n answers share the prompt and differ; a seed brings them back."""
    def ask():
        return [choice.text for choice in client.completions.create(model="tiny", prompt="Once", n=3, seed=7, temperature=1,
                                                                    max_tokens=12).choices]
    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_logprobs_in_both_forms(client):
    """Completions: parallel lists; chat: objects whose bytes are the text. The greedy token is the likeliest."""
    logprobs = client.completions.create(model="tiny", prompt="Once", logprobs=2, **GREEDY).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == 12
    assert all(LOWEST < value <= 0 for value in logprobs.token_logprobs)
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
        assert value == max(top.values()), "greedy takes the likeliest token"
    chat = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    spoken = bytes(byte for token in chat.logprobs.content for byte in token.bytes)
    assert spoken.decode("utf-8", "replace") == chat.message.content
    assert all(len(token.top_logprobs) == 2 for token in chat.logprobs.content)


def test_a_scored_prompt_agrees_with_the_generated_one(client):
    """echo with max_tokens=0 gives a text the logprobs that it had when it was generated."""
    begin, extra = [70, 71, 72], {"return_token_ids": True}
    made = client.completions.create(model="tiny", prompt=begin, logprobs=0, extra_body=extra, **GREEDY).choices[0]
    both = begin + made.token_ids
    scored = client.completions.create(model="tiny", prompt=both, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    assert scored.token_logprobs[3:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)
    assert len(scored.tokens) == len(both)


def test_cached_tokens_show_the_prefix_cache(client):
    """A prompt that was seen is read from the cache, and the usage says so; another salt does not see it."""
    ids = [9] * 100
    usages = [client.completions.create(model="tiny", prompt=ids, max_tokens=1, extra_body=salt).usage
              for salt in ({}, {}, {"cache_salt": "mine"}, {"cache_salt": "mine"})]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [0, 96, 0, 96], "100 tokens are 6 full blocks of 16 and a rest"


def test_stop_strings_and_tokens_end_an_answer(client):
    """finish_reason stop with the string or the id that ended it; the string is not in the text."""
    text = client.completions.create(model="tiny", prompt="Once", temperature=0, max_tokens=40).choices[0].text
    stop = text[5:7]
    choice = client.completions.create(model="tiny", prompt="Once", temperature=0, max_tokens=40, stop=[stop]).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert text.startswith(choice.text) and stop not in choice.text
    pieces = client.completions.create(model="tiny", prompt="Once", temperature=0, max_tokens=40, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text, "what might be a stop string is held back"
    extra = {"return_token_ids": True}
    ids = client.completions.create(model="tiny", prompt="Once", extra_body=extra, **GREEDY).choices[0].token_ids
    extra = {"stop_token_ids": [ids[4]], "min_tokens": 2}
    by_id = client.completions.create(model="tiny", prompt="Once", extra_body=extra, **GREEDY).choices[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", ids[4])


def test_defaults_of_the_checkpoint_are_in_force(client):
    """generation_config.json says temperature 0.9: two answers without parameters differ, two greedy ones don't."""
    def ask(**given):
        return {client.completions.create(model="tiny", prompt="Once", max_tokens=20, **given).choices[0].text for _ in "123"}

    assert (len(ask()), len(ask(temperature=0))) == (3, 1)


def test_errors_reach_the_client_as_its_own_exceptions(client):
    """404, 400 and their fields arrive typed; afterwards the server answers as before."""
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HI, temperature=3)
    assert (bad.value.param, bad.value.body["type"], bad.value.body["code"]) == ("temperature", "BadRequestError", 400)
    with pytest.raises(openai.BadRequestError, match="context length is 2048"):
        client.completions.create(model="tiny", prompt=[5] * 3000, stream=True)
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices[0].finish_reason


ENGINE_MISTAKES = {
    "stop id": ({"stop_token_ids": [10**6]}, "out of vocabulary"),
    "allowed id": ({"allowed_token_ids": [10**6]}, "out of vocabulary"),
    "bias id": ({"logit_bias": {"1000000": 1}}, "out of vocabulary"),
    "logprobs": ({"logprobs": 21}, "20 logprobs"),
    "full context": ({"prompt": [5] * 2048}, "2048 input tokens"),
    "half a bad word": ({"bad_words": ["\ud83d"]}, "lone surrogate"),
    "half a stop": ({"stop": "\ud83d"}, "lone surrogate"),
    "half a salt": ({"cache_salt": "\ud83d"}, "lone surrogate"),
    "n": ({"n": 20000, "temperature": 1}, "n must be an integer in [1, 16384]"),
    "seed": ({"seed": 2**63}, "64-bit"),
}


@pytest.mark.parametrize(("change", "message"), ENGINE_MISTAKES.values(), ids=ENGINE_MISTAKES.keys())
def test_what_only_the_engine_can_refuse_is_a_400_too(server, change, message):
    """Limits of the vocabulary and the context; never a 500, whole or streamed, and the next request is served."""
    for stream in (False, True):
        body = json.dumps({"prompt": "Once", "max_tokens": 2, "stream": stream} | change)
        headers = {"content-type": "application/json"}
        response = httpx.post(server.url + "/v1/completions", content=body, headers=headers, timeout=60)
        assert response.status_code == 400, response.text
        assert message in response.text
    assert httpx.get(server.url + "/health").status_code == 200


def test_t48_cancelled_streams_give_their_places_back(server, client):
    """Eight places: one stream stays and seven are left. The next request runs at once, not when the one has ended."""
    stays = InFlight(server, stream=True, max_tokens=1500, stream_options={"include_usage": True})
    assert stays.has_begun.wait(30)
    for _ in range(7):
        extra = {"ignore_eos": True}
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=2000, stream=True, extra_body=extra)
        next(iter(stream))
        stream.close()
    assert client.completions.create(model="tiny", prompt="Once", max_tokens=2).usage.completion_tokens == 2
    assert stays.thread.is_alive(), "the places of those that left were free before the one that stayed had ended"
    usage = json.loads(stays.result().lines[-2])["usage"]
    assert usage["completion_tokens"] == 1500, "leaving does not disturb the others"


def test_an_open_address_without_a_key_is_warned_about(server):
    """Serving the world is allowed, and said; --uvicorn-log-level error keeps the access log out."""
    assert "listening on 0.0.0.0 without --api-key" in server.stderr
    assert "GET /health" not in server.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_tutorials_curl_commands_work(server):
    """Both commands as a reader would paste them, with the port changed."""
    completions = f"""curl -s {server.url}/v1/completions -H "Content-Type: application/json" -d '{{
        "model": "tiny", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}}'"""
    chat = f"""curl -s {server.url}/v1/chat/completions -H "Content-Type: application/json" -d '{{
        "model": "tiny", "max_tokens": 7, "messages": [{{"role": "system", "content": "You are a helpful assistant."}},
        {{"role": "user", "content": "Who won the world series in 2020?"}}]}}'"""
    answers = [json.loads(subprocess.run(shlex.split(command), capture_output=True, check=True, timeout=60).stdout)
               for command in (completions, chat)]
    assert answers[0]["choices"][0]["text"]
    assert answers[1]["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_banner_s_command_works(server):
    """What the server prints after its start can be pasted."""
    out = server.stdout
    command = out[out.index("curl"):out.index("}]}'") + 4].replace("\\\n", " ")
    answer = json.loads(subprocess.run(shlex.split(command), capture_output=True, check=True, timeout=60).stdout)
    assert answer["object"] == "chat.completion"
