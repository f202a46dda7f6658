"""Lesson 12. Guess ahead: somebody cheap proposes the next tokens, and one forward pass of the model verifies them all.

Reading the weights is what a decode step takes its time for, and k + 1 positions read them once. So drafts are scheduled as
ordinary tokens, the model samples at each of them, and what it would have said itself is kept:

    known       ... the  cat            position      p     p+1   p+2   p+3
    drafts               sat on a       in            cat   sat   on    a
    verified             sat on the     samples       sat   on    the   (?)    the first two are right, `the` comes on top

A draft is accepted when it *equals* what the model samples there. Noise is a pure function of seed and position (lesson 4), so
a request says the same with and without speculation, at any temperature. Engines without such noise accept by chance
(rejection_sampling.py). What was computed for wrong drafts is taken back: `num_computed_tokens`, whole blocks; and no block is
published before its last token is accepted.

Owns the scheduler's part and the n-gram proposer. No torch. vLLM: v1/core/sched/scheduler.py, v1/spec_decode/ngram_proposer.py.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from minivllm.request import Request, RequestStatus
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import ModelOutput, Rewind, SchedulerOutput


def accepted_run(draft_token_ids: Sequence[int], sampled_token_ids: Sequence[int]) -> list[int]:
    """What a verification says: the sampled tokens as long as the drafts were these, and the first that was no longer.

    Token i was sampled behind drafts 0 .. i-1, so it counts if those are right. One token comes in any case. There is one sample
    more than drafts; any other number is the caller's mistake, and an assert says so.
    """
    assert len(sampled_token_ids) == len(draft_token_ids) + 1, "the model samples behind every draft, and behind the last"
    pairs = zip(draft_token_ids, sampled_token_ids)
    num_right = next((index for index, (draft, sampled) in enumerate(pairs) if draft != sampled), len(draft_token_ids))
    return list(sampled_token_ids[: num_right + 1])


class Proposer(Protocol):
    """Guesses how requests go on. Wrong guesses cost time and never change an answer."""

    def propose(self, requests: Sequence[Request], room: DraftRoom) -> dict[str, list[int]]:
        """Drafts by request id, at most as many as `room.reserve` granted; requests without any may be left out."""
        ...

    def close(self) -> None: ...


class NgramProposer:
    """Prompt lookup: what followed the last time, when the text ended as it does now. Good at copying and correcting."""

    def __init__(self, num_tokens: int, longest: int, shortest: int) -> None:
        self.num_tokens = num_tokens
        self.longest = longest
        self.shortest = shortest

    def propose(self, requests: Sequence[Request], room: DraftRoom) -> dict[str, list[int]]:
        drafts = {}
        for request in requests:
            found = look_up(request.all_token_ids, self.longest, self.shortest, self.num_tokens)
            drafts[request.request_id] = found[: room.reserve(request, len(found))] if found else []
        return drafts

    def close(self) -> None:
        pass


def look_up(token_ids: Sequence[int], longest: int, shortest: int, num_tokens: int) -> list[int]:
    """The tokens that follow the first place where the last n tokens stand, for the largest n in shortest..longest.

    The first place and not the last: in "a a a a" more tokens follow it. Tokens are searched as bytes, 8 each, by the
    C library; a match counts if it begins with a token.
    """
    text = array("q", token_ids)
    width, content = text.itemsize, text.tobytes()
    for length in range(min(longest, len(text) - 1), shortest - 1, -1):
        end = content[-length * width :]
        start = content.find(end)
        while start % width:
            start = content.find(end, start + 1)
        following = start // width + length
        if following < len(text):  # else it has found the end itself
            return list(text[following : following + num_tokens])
    return []


class DraftRoom:
    """What a step can spare for drafts: budget and blocks beyond what running requests need for the tokens they know.

    So drafts never preempt anybody, and never take a turn from one that is running.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.manager = scheduler.kv_cache_manager
        self.scheduler = scheduler
        running = scheduler.running
        self.num_tokens = scheduler.max_num_batched_tokens - sum(one.num_tokens - one.num_computed_tokens for one in running)
        self.num_blocks = self.manager.num_free_blocks - sum(map(self.num_blocks_for_known, running))

    def num_blocks_for_known(self, request: Request) -> int:
        return self.manager.num_blocks_to_take(request, request.num_tokens)

    def block_ids(self, request: Request) -> list[int]:
        """The request's table, a copy."""
        return self.manager.get_block_ids(request.request_id)

    def reserve(self, request: Request, num_wanted: int) -> int:
        """Own slots for the request's known tokens and up to `num_wanted` drafts behind them; returns how many drafts.

        Once a step and request. No more than could be said: a request's last token comes from the model, not from a draft.
        """
        size, num_owned = self.manager.block_size, len(self.block_ids(request))
        num_known = self.num_blocks_for_known(request)
        num_slots = (num_owned + num_known + max(0, self.num_blocks)) * size - request.num_tokens
        most = self.scheduler.max_model_len - request.num_tokens, (request.max_tokens or math.inf) - request.num_output_tokens
        share = self.scheduler.config.long_prefill_token_threshold or math.inf  # of a step, for one request
        granted = int(min(num_wanted, self.num_tokens, num_slots, min(most) - 1, share - 1))
        if granted <= 0 or self.num_blocks < 0:
            return 0
        new_blocks = self.manager.allocate_slots(request, 1 + granted)
        assert new_blocks is not None, f"request {request.request_id} was granted {granted} drafts, and no block is left for them"
        self.num_tokens -= granted
        self.num_blocks -= len(new_blocks) - num_known
        if new_blocks:
            self.scheduler.next_output.new_block_ids[request.request_id] = new_blocks
            self.scheduler.stats.num_blocks_allocated += len(new_blocks)
        return granted


class SpeculatingScheduler(Scheduler):
    """A scheduler that asks a proposer before it plans, and takes back what verification has refused.

    Drafts live for one step: proposed, scheduled and verified. Steps are made in turn, because the next drafts follow the
    tokens that this step brings (vLLM plans ahead with placeholders for them).
    """

    def __init__(self, *args: Any, proposer: Proposer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.config.async_scheduling, "speculation makes steps in turn"
        self.proposer = proposer

    def schedule(self) -> SchedulerOutput:
        """`Scheduler.schedule`, with drafts behind the known tokens of requests that miss only their newest one."""
        drafted = self._draft()
        output = super().schedule()
        for request in drafted:
            token_ids, request.spec_token_ids = request.spec_token_ids, []
            assert output.num_scheduled_tokens.get(request.request_id) == 1 + len(token_ids), (
                f"request {request.request_id} has room for {len(token_ids)} drafts and gets "
                f"{output.num_scheduled_tokens.get(request.request_id)} tokens")
            output.scheduled_spec_decode_tokens[request.request_id] = token_ids
        return output

    def _draft(self) -> list[Request]:
        """Give running requests their drafts, and return those that got some."""
        ready = [request for request in self.running if request.num_computed_tokens == request.num_tokens - 1]
        room = DraftRoom(self)
        if not ready or room.num_tokens <= 0 or room.num_blocks < 0:
            return []
        drafts = self.proposer.propose(ready, room)
        for request in ready:
            request.spec_token_ids = list(drafts.get(request.request_id, ()))
        return [request for request in ready if request.spec_token_ids]

    def update_from_output(self, scheduler_output: SchedulerOutput, model_output: ModelOutput) -> list[Request]:
        """Take back what wrong drafts had been given, then append the tokens as ever."""
        verified = []
        for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            request, token_ids = self.requests.get(request_id), model_output.sampled_token_ids.get(request_id)
            if request is not None and token_ids:
                verified.append((request, 1 + len(drafts), request.num_tokens))
                self._take_back(request, len(drafts), token_ids)
        moved = super().update_from_output(scheduler_output, model_output)
        for request, num_positions, num_tokens in verified:
            self.stats.num_rejected_positions += num_positions - (request.num_tokens - num_tokens)
        return moved

    def _take_back(self, request: Request, num_drafts: int, token_ids: Sequence[int]) -> None:
        """Count as computed only what is accepted, give back the blocks beyond, and tell the runner.

        Who had drafts is scheduled again by the very next step or preempted by it: whoever comes before it fits into one step
        with all its known tokens. So a failed step has nothing to repeat here.
        """
        request.num_output_placeholders -= num_drafts
        num_rejected = num_drafts + 1 - len(token_ids)
        self.stats.count_drafts(num_drafts, num_drafts - num_rejected)
        if num_rejected:
            request.num_computed_tokens -= num_rejected
            request.max_num_computed_tokens = request.num_computed_tokens
            self.kv_cache_manager.truncate(request, request.num_computed_tokens)
            self.next_output.rewound_requests[request.request_id] = Rewind(request.num_computed_tokens, list(token_ids[-1:]))

    def drop_tokens(self, requests: Sequence[Request], surplus: Mapping[str, int]) -> None:
        """Forget the tokens that an accepted run holds behind a stop string: they were never said, whatever they ended."""
        for request in requests:
            if number := surplus.get(request.request_id, 0):
                del request.all_token_ids[-number:]
                self.stats.num_generated_tokens -= number
                self.stats.num_rejected_positions += number
                if request.is_finished:
                    request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, None
