"""An engine that says what it is told, and a tokenizer made in a moment: for what a real engine does not do on demand.

`ScriptedEngine` has `AsyncEngine`'s face. Every request answers `script`, one token per step; it can be held, broken or
killed between two tokens.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minivllm.exceptions import EngineDeadError
from minivllm.request import CompletionOutput, Logprob, RequestOutput
from minivllm.serve.app import create_app
from minivllm.serve.service import ServerOptions, Service

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
          "{% if not loop.last or not continue_final_message %}<|im_end|>\n{% endif %}{% endfor %}"
          "{% if tools %}[{{ tools | length }} tools]{% endif %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = "Once upon a time there was a block. The block held sixteen tokens, and the tokens were happy. " * 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with Qwen's special tokens and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHATML)


class ScriptedStream:
    """The outputs of one request: its n answers grow by a token at a time."""

    def __init__(self, engine, prompt, params, request_id):
        self.engine, self.prompt, self.params, self.request_id = engine, prompt, params, request_id
        self.script = engine.tokenizer.encode(engine.script, add_special_tokens=False)
        self.num_tokens, self.is_closed, self.is_finished = 0, False, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.is_finished:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        if self.num_tokens == self.engine.hold_after:
            await asyncio.Event().wait()
        if self.num_tokens == self.engine.fail_after:
            self.engine.errored = True
            raise EngineDeadError("the engine has ended by a failure: CUDA error")
        self.num_tokens += 1
        return self.output()

    def output(self):
        ended = self.num_tokens >= len(self.script)
        capped = self.params.max_tokens is not None and self.num_tokens >= self.params.max_tokens
        self.is_finished = ended or capped
        finish_reason = "stop" if ended else "length" if capped else None
        outputs = [self.answer(index, finish_reason) for index in range(self.params.n)]
        prompt_logprobs = None if self.params.prompt_logprobs is None else [None, *map(self.entry, self.prompt[1:])]
        return RequestOutput(self.request_id, None, self.prompt, outputs, self.is_finished, prompt_logprobs,
                             num_cached_tokens=1)

    def answer(self, index, finish_reason):
        ids = self.script[:self.num_tokens]
        text = self.engine.tokenizer.decode(ids).rstrip("\ufffd")
        logprobs = None if self.params.logprobs is None else [self.entry(token) for token in ids]
        return CompletionOutput(index, text, ids, None, logprobs, finish_reason, None)

    @staticmethod
    def entry(token):
        """The token itself is second; token 65 leads, and the third can't happen."""
        return {token: Logprob(-1.5, 2), 65: Logprob(-0.5, 1), 66: Logprob(float("-inf"), 3)}

    def close(self):
        self.is_closed = True


class ScriptedEngine:
    def __init__(self, script="Once upon a time", *, max_model_len=64, defaults=None, chat_template=CHATML):
        self.script, self.tokenizer = script, make_tokenizer()
        self.hold_after = self.fail_after = None
        self.errored = False
        self.waits_for_the_end = None  # what was asked for last
        self.streams: list[ScriptedStream] = []
        self.engine = SimpleNamespace(
            tokenizer=self.tokenizer, config=SimpleNamespace(max_model_len=max_model_len, max_logprobs=20, speculative_config=None),
            model_config=SimpleNamespace(vocab_size=len(self.tokenizer)), default_sampling_params=defaults or {},
            chat_template=chat_template)

    async def add_request(self, prompt, params, request_id, *, cache_salt=None, final_only=False):
        if self.errored:
            raise EngineDeadError("the engine has ended")
        self.waits_for_the_end = final_only
        self.streams.append(ScriptedStream(self, prompt, params, request_id))
        return self.streams[-1]


def client_of(engine, **options) -> httpx.AsyncClient:
    """A client of the application itself, without a socket."""
    options = {"served_model_names": ("tiny", "alias"), "model_root": "/models/tiny"} | options
    app = create_app(Service(engine, ServerOptions(**options)))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def ask(path, body=None, *, engine=None, method="POST", headers=None, content=None, **options) -> httpx.Response:
    """One request to a fresh application."""
    async def story():
        async with client_of(engine or ScriptedEngine(), **options) as client:
            given = {"content": content} if content is not None else {} if body is None else {"json": body}
            return await client.request(method, path, headers=headers, **given)

    return asyncio.run(asyncio.wait_for(story(), 30))


def events(response: httpx.Response) -> list[str]:
    """The data of every server-sent event. Split on newlines only: U+2028 is legal inside JSON."""
    parts = response.text.split("\n\n")
    assert parts[-1] == "", "the last event ends like every other one"
    assert all(part.startswith("data: ") for part in parts[:-1]), "nothing but data events"
    return [part.removeprefix("data: ") for part in parts[:-1]]
