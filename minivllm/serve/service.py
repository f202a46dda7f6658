"""One engine, the names it is served under, and the way in for requests.

Owns what every route needs: the tokenizer's faces, the answer to "which model?", and admission, which is all or nothing. Once
`admit` has returned, the requests of a body are queued and nothing that the user wrote can fail any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minivllm.exceptions import EngineDeadError
from minivllm.request import RequestOutput
from minivllm.sampling_params import MAX_N, SamplingParams
from minivllm.serve.errors import ApiError
from minivllm.serve.http_metrics import HttpMetrics
from minivllm.serve.limits import DEFAULT_BODY_BYTES, BusyError, Entry, QueueLimit
from minivllm.serve.live import Live
from minivllm.serve.logprobs import TokenNames
from minivllm.serve.metrics import EngineMetrics
from minivllm.serve.prompts import Prompt, PromptReader
from minivllm.version import __version__


class Stream(Protocol):
    """The outputs of one request of the engine; `close` aborts it unless it has ended. (async_engine.py tells of `takes`.)"""

    takes: Callable[[RequestOutput], bool]

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What the server needs of `AsyncEngine`; the tests bring another one."""

    @property
    def engine(self) -> Any: ...

    @property
    def errored(self) -> bool: ...

    async def add_request(self, prompt: Any, params: SamplingParams, request_id: str, *, cache_salt: str | None = None,
                          final_only: bool = False, before: Callable[[Any], None] | None = None) -> Stream: ...

    async def call(self, function: Callable[[Any], Any]) -> Any: ...

    async def pause(self) -> None: ...

    async def step_once(self) -> None: ...

    async def resume(self) -> None: ...


@dataclass(frozen=True)
class ServerOptions:
    """What the server is told, beside what the engine is told."""

    served_model_names: tuple[str, ...] = ("minivllm-tiny",)
    model_root: str = "minivllm-tiny"
    api_keys: tuple[str, ...] = ()
    ignore_unknown_fields: bool = False
    metrics_prefix: str = "minivllm"
    log_stats: bool = True
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    max_request_body_bytes: int = DEFAULT_BODY_BYTES
    step_control: bool = False
    sse_keep_alive_interval: float = 0.0  # seconds, 0 for never


class Service:
    """The engine as the routes see it."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.options = options
        self.started = int(time.time())
        core = engine.engine
        self.max_model_len: int = core.config.max_model_len
        self.defaults: dict[str, Any] = core.default_sampling_params
        self.tokenizer = core.tokenizer
        self.names = TokenNames(core.tokenizer)
        self.reader = PromptReader(core.tokenizer, core.chat_template, self.max_model_len, core.model_config.vocab_size)
        # Equal fingerprints mean equal settings: a seeded request repeats only under the same one.
        self.fingerprint = f"minivllm-{__version__}-{hashlib.sha256(repr(core.config).encode()).hexdigest()[:8]}"
        self.metrics = EngineMetrics(core, self.model_name, options.metrics_prefix)
        self.http_metrics = HttpMetrics()
        self.metrics.registry.register(self.http_metrics)
        self.live = Live(engine, options.step_control)
        self._numbers = itertools.count()
        limits = options.max_num_queued_reqs, options.max_num_queued_tokens
        self.queue = None if limits == (None, None) else QueueLimit(*limits)
        self.is_draining = False
        self.stopping = asyncio.Event()

    @property
    def model_name(self) -> str:
        """The name in every answer: the first one, whichever was asked for (as in vLLM)."""
        return self.options.served_model_names[0]

    def check_model(self, name: str | None) -> None:
        """A model left out, null or "" is the served one. Raises `ApiError` (404) for a name that is not served."""
        if name and name not in self.options.served_model_names:
            names = ", ".join(self.options.served_model_names)
            raise ApiError(f"The model `{name[:200]}` does not exist. Valid aliases: {names}.", status=404, param="model")

    def check_admission(self) -> None:
        if self.is_draining:
            raise ApiError("The server is shutting down.", status=503)
        if self.engine.errored:
            raise EngineDeadError("the engine has ended by a failure")

    def check_queue(self) -> None:
        """Refuse before anything is tokenised what will surely be refused. A look from outside; the engine's thread decides."""
        if self.queue is not None:
            with self._counting_rejections():
                self.queue.check(self.engine.engine)

    @contextlib.contextmanager
    def _counting_rejections(self) -> Iterator[None]:
        try:
            yield
        except BusyError as error:
            self.metrics.num_rejected[error.reason] += 1
            raise

    async def admit(self, prompts: Sequence[Prompt], params: SamplingParams, response_id: str,
                    cache_salt: str | None, *, final_only: bool = False) -> list[Stream]:
        """Queue one request per prompt, all or none. Raises `ApiError`, `ValidationError` or `EngineDeadError`.

        `final_only`: nobody sees an answer before its end, so nothing is made of its tokens until then.
        """
        if len(prompts) * params.n > MAX_N:
            raise ApiError(f"{len(prompts)} prompts x n={params.n} is more than {MAX_N} answers: split the request", param="n")
        # Numbered, because two clients may send the same X-Request-Id and the engine's ids must differ.
        entry = None if self.queue is None else Entry(self.queue, len(prompts), params.n)
        limited: dict[str, Any] = {} if entry is None else {"before": entry.enter}
        entering = [
            asyncio.ensure_future(self.engine.add_request(prompt.token_ids, params, f"{response_id}-{next(self._numbers)}",
                                                          cache_salt=cache_salt, final_only=final_only, **limited))
            for prompt in prompts
        ]
        try:
            with self._counting_rejections():
                return list(await asyncio.gather(*entering))
        except BaseException:
            for task in entering:
                task.cancel()
            for admitted in await asyncio.gather(*entering, return_exceptions=True):
                if not isinstance(admitted, BaseException):
                    admitted.close()
            if entry is not None:
                with contextlib.suppress(EngineDeadError):
                    await self.engine.call(entry.leave)
            raise

    def close(self) -> None:
        self.reader.close()
