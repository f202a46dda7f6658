"""Lesson 9. What scheduler, model runner and engine say to each other: plain records and counters, no torch.

    SchedulerOutput = schedule()                   who computes how many tokens, as differences from the step before
    LaunchedStep    = execute_model(...)           the device is at work, or done
    ModelOutput     = launched.result()            what was sampled
    [Request, ...]  = update_from_output(...)      who got tokens or ended

The runner never sees a `Request`. It keeps one row per resident request, and a step tells it what changed: drop the rows of
`finished_request_ids` and `preempted_request_ids`, then add those of `new_requests`, then lengthen tables by `new_block_ids`.
After a failed step the same ids come again, so dropping a row that is not there must be harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from minivllm.request import Logprob, Request
from minivllm.sampling_params import SamplingParams


@dataclass
class NewRequestData:
    """Everything the runner needs to start a row, for a first admission and for a return after preemption alike."""

    request_id: str
    token_ids: Sequence[int]  # all that is known: the prompt, and what was sampled before a preemption
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int
    block_ids: list[int]  # the whole table, prefix hits first
    num_computed_tokens: int  # = tokens in the prefix hits: the row starts computing here
    eos_token_ids: tuple[int, ...] = ()  # banned below min_tokens

    @classmethod
    def from_request(cls, request: Request, block_ids: list[int]) -> NewRequestData:
        return cls(request.request_id, request.all_token_ids[:], request.num_prompt_tokens, request.sampling_params,
                   request.seed, block_ids, request.num_computed_tokens, request.eos_token_ids)


class Decision(NamedTuple):
    """One thing the scheduler decided about one request, for a reader. `reason` is written only when it is read."""

    request_id: str
    action: str  # schedule, admit, resume, wait, preempt, finish
    why: str  # a template, e.g. "waits: needs {blocks}, {free} free"
    need: int = 0  # blocks taken, wanted or given back
    free: int = 0  # blocks free at that moment
    num_tokens: int = 0
    cause: object = None  # whatever else the sentence names: another request, a limit

    @property
    def reason(self) -> str:
        """One sentence for a learner: "request 5 waits: needs 3 blocks, 1 free"."""
        facts = {"blocks": _count(self.need, "block"), "tokens": _count(self.num_tokens, "token")}
        return f"request {self.request_id} " + self.why.format(**facts, free=self.free, cause=self.cause)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Rewind(NamedTuple):
    """Guesses in a row were wrong: so many of its positions count as computed, and these are its known tokens from there on.

    It keeps the blocks that these positions fill or begin, and no other.
    """

    num_computed_tokens: int
    token_ids: Sequence[int]


@dataclass(eq=False)  # a step is itself: two steps often say the same
class SchedulerOutput:
    """One step. `total_num_scheduled_tokens <= max_num_batched_tokens`, and every count in it is at least 1."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)  # in the order in which they were scheduled
    new_requests: list[NewRequestData] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)  # of running requests whose table grew
    finished_request_ids: list[str] = field(default_factory=list)  # since the last step
    preempted_request_ids: list[str] = field(default_factory=list)  # since the last step
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)  # drafts: a request's last tokens of the step
    rewound_requests: dict[str, Rewind] = field(default_factory=dict)  # since the last step; before new_requests and new_block_ids
    cached_block_ids: list[int] = field(default_factory=list)  # blocks this step gave a hash; a failed step takes it back
    decisions: list[Decision] = field(default_factory=list)  # since the last step

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class LaunchedStep(Protocol):
    """What `execute_model` returns. The next step may be launched before anybody asks for this one's result.

    `result()` waits for the device; it says what the step gave to whom it was launched for, whatever rows have changed
    since, for as long as a mailbox keeps their tokens (mailbox.py). It may never be called: nobody waits for a step whose
    requests have all ended or that is rolled back.
    """

    def result(self) -> ModelOutput: ...


@dataclass
class ModelOutput:
    """What one step sampled. A request that is still in its prompt is absent, or has an empty list."""

    sampled_token_ids: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[dict[int, Logprob]]] = field(default_factory=dict)  # one dict per sampled token
    # the first position that these logprobs are of, and one dict for each position from there on
    prompt_logprobs: dict[str, tuple[int, list[dict[int, Logprob]]]] = field(default_factory=dict)

    def result(self) -> ModelOutput:
        """Known already: a `LaunchedStep` of a runner that waits for the device by itself."""
        return self

    def discard(self, request_id: str) -> None:
        """Forget what came for a request that is gone: the id may have another owner by now."""
        for results in (self.sampled_token_ids, self.logprobs, self.prompt_logprobs):
            results.pop(request_id, None)


@dataclass
class SchedulerStats:
    """Deterministic counters since the start: the same requests in the same order give the same numbers, on any machine.

    When every request has come to its end, no step has failed, and no request was aborted or found after a preemption what it
    had not computed itself:
        num_scheduled_tokens == num_prompt_tokens - prefix_cache_hits + num_generated_tokens - num_finished
                                + num_recomputed_tokens + discarded_positions + num_rejected_positions
    (a request's last token need not be computed: nothing follows it. Planned one step ahead it sometimes is, and discarded).
    """

    num_steps: int = 0  # planned, with at least one position each
    num_scheduled_tokens: int = 0  # positions computed
    num_recomputed_tokens: int = 0  # of these: computed before, and lost to a preemption
    num_prompt_tokens: int = 0  # of requests when first admitted
    num_generated_tokens: int = 0  # sampled and kept
    num_finished: int = 0
    num_preemptions: int = 0
    num_rollbacks: int = 0  # steps that failed
    num_blocks_allocated: int = 0
    prefix_cache_queries: int = 0  # in tokens, as vLLM counts; returns after preemption are not counted
    prefix_cache_hits: int = 0
    discarded_positions: int = 0  # computed for a request that had ended when the result came
    num_drafts: int = 0  # vLLM's four names: how often drafts were verified,
    num_draft_tokens: int = 0  # how many,
    num_accepted_tokens: int = 0  # how many of these the model would have said itself,
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)  # and how many of the first, second, ... of a run
    num_rejected_positions: int = 0  # computed for drafts that brought no token

    def count_admission(self, request: Request, num_hit_tokens: int, reads_cache: bool) -> None:
        """A first admission; a return after preemption is not counted again."""
        self.num_prompt_tokens += request.num_prompt_tokens
        self.prefix_cache_queries += request.num_tokens if reads_cache else 0
        self.prefix_cache_hits += num_hit_tokens

    def count_drafts(self, num_drafted: int, num_accepted: int) -> None:
        """One verification of a request's drafts."""
        per_pos = self.num_accepted_tokens_per_pos
        per_pos += [0] * (num_drafted - len(per_pos))
        for position in range(num_accepted):
            per_pos[position] += 1
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted

    def count_tokens(self, request: Request, num_new_tokens: int, num_new_blocks: int) -> None:
        """A request's share of a step, before its progress moves on."""
        self.num_scheduled_tokens += num_new_tokens
        self.num_blocks_allocated += num_new_blocks
        num_lost = request.max_num_computed_tokens - request.num_computed_tokens  # of these, the first ones come again
        self.num_recomputed_tokens += min(num_new_tokens, num_lost) if num_lost > 0 else 0
