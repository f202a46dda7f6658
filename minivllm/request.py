"""A request from its arrival to its last token: what was asked, how far it is, and what is handed back.

Owns `Request` (the engine's record of it) and `RequestOutput` (what the user gets). Never touches a tensor or a block. Progress
is one inequality, and chunked prefill, decode, prefix hits and preemption are all movements of its left side:

    num_computed_tokens < num_tokens        positions with KV written  <  prompt + output tokens

(One step ahead, the tokens that are being sampled count on the right side: `num_output_placeholders`.)

    WAITING --schedule--> RUNNING --stop, length, abort--> FINISHED_*
       ^                     |
       +---- PREEMPTED <-----+    blocks given back, num_computed_tokens = 0
"""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minivllm.kv_cache import BlockHash


class RequestStatus(enum.IntEnum):
    """An integer, and the ends last, because the question "has it ended?" is asked a few times per token."""

    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> str | None:
        """As OpenAI's API names it; None while the request has not ended."""
        return FINISH_REASONS.get(self)


FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop", RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort", RequestStatus.FINISHED_ERROR: "error",
}


@dataclass
class RequestTimes:
    """When things happened to a request, in seconds of the engine's clock; None until they have.

    arrival <= queued <= first_scheduled <= first_token <= last_token. Time to first token is first_token - arrival; the
    server's histograms are made of these differences. A preemption changes none of them.
    """

    arrival: float = 0.0
    queued: float | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Request:
    """One sequence in the engine. `n > 1` becomes n of these, which share their prompt's blocks through the prefix cache.

    The scheduler alone changes `status` and `num_computed_tokens`; tokens come by `append_sampled_tokens`.
    While it is RUNNING, with the tokens that steps in flight will bring counted in:

        num_computed_tokens <= num_tokens + num_output_placeholders
    """

    def __init__(self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams, *,
                 max_tokens: int | None = None, eos_token_ids: Sequence[int] = (), seed: int = 0,
                 arrival_time: float = 0.0, cache_salt: str | None = None) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.sampling_params = sampling_params
        # The end of the context already counted in, so that the scheduler has one number to compare with.
        self.max_tokens = max_tokens if max_tokens is not None else sampling_params.max_tokens
        self.max_num_tokens = self.num_prompt_tokens + (self.max_tokens or math.inf)  # prompt included; capped when queued
        # The first is *the* EOS (stop_reason None); ending on another one reports its id, as in vLLM.
        self.eos_token_ids = tuple(eos_token_ids)
        # All that may end it, in one place: the question comes with every token of every request.
        ends = () if sampling_params.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset((*ends, *(sampling_params.stop_token_ids or ())))
        self.seed = seed  # always a number: unseeded requests get one from the engine's seed
        self.cache_salt = cache_salt
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        # 8 bytes each, in one piece: hashing, copying and uploading a long prompt need not touch its numbers one by one
        self.all_token_ids = array("q", prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_output_placeholders = 0  # tokens that steps in flight will sample for it: counted, and not known yet
        self.spec_token_ids: list[int] = []  # guesses at its next tokens, while the step that verifies them is planned (lesson 12)
        self.max_num_computed_tokens = 0  # the most that it ever was: what lies below is computed again after a preemption
        self.num_cached_tokens = -1  # prefix-cache hits at the first admission; -1 until then
        self.num_preemptions = 0
        self.block_hashes: list[BlockHash] = []  # one per full block, extended by the KV cache manager
        self.times = RequestTimes(arrival=arrival_time)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the sampled tokens."""
        return self.all_token_ids[self.num_prompt_tokens:].tolist()

    @property
    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    def __repr__(self) -> str:
        return (f"Request({self.request_id!r}, {self.status.name}, {self.num_computed_tokens}/{self.num_tokens} computed, "
                f"{self.num_output_tokens} sampled)")


def append_sampled_tokens(request: Request, token_ids: Sequence[int], now: float) -> int:
    """Append what a step sampled, up to the token that ends the request, and say how many tokens that is.

    They come one by one: what follows the last one was never said.
    """
    request.num_output_placeholders -= 1  # one a step, however many tokens it brings
    times, num_known = request.times, len(request.all_token_ids)
    if times.first_token is None:
        times.first_token = now
    times.last_token = now
    for token_id in token_ids:
        request.all_token_ids.append(token_id)
        if check_stop(request):
            break
    return len(request.all_token_ids) - num_known


def check_stop(request: Request) -> bool:
    """Set `status` and `stop_reason` if the newest token ends the request, and say whether it does.

    Called once for every appended token. EOS first, then `stop_token_ids`, then length (vllm/v1/core/sched/utils.py);
    below `min_tokens` only the length can end it. Stop strings are the detokenizer's business: they need text.
    """
    last = request.all_token_ids[-1]
    if last in request.end_token_ids and request.num_output_tokens >= request.sampling_params.min_tokens:
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = None if not request.sampling_params.ignore_eos and last in request.eos_token_ids[:1] else last
        return True
    if len(request.all_token_ids) >= request.max_num_tokens:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return True
    return False


@dataclass(slots=True)  # not frozen: a frozen one takes three times as long to make, and twenty may come with every token
class Logprob:
    """One token's log-probability under the raw logits, and its rank among the vocabulary (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's n answers, as far as it has got. `token_ids` keeps the EOS or stop token, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What a request has produced up to now, cumulative: the last one of a request holds everything.

    `prompt_logprobs[0]` is None: nothing predicts the first token. `metrics` has one entry per answer.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: list[RequestTimes] = field(default_factory=list)
