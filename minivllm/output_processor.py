"""From the tokens of a step to what a user sees: text, stop strings, logprobs, and n children joined into one output.

Owns one `OutputState` per unfinished user request. Never touches a block or a queue: when a stop string has appeared, it
names the request and the engine has the scheduler end it. Everything handed out is cumulative; the async face and the
server take differences.

    step's tokens  {"0_r": [11], "1_r": [42]}  ->  RequestOutput("r", outputs=[" a", " the"])

Between two steps, for every user request that is in here:

    num_unfinished == children in `parents` >= 1
    len(child.token_ids) == child.request.num_output_tokens, and as many logprobs if they were asked for

vLLM: v1/engine/output_processor.py, beside the API server and not beside the scheduler, so that text never delays a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from minivllm.detokenizer import IncrementalDetokenizer
from minivllm.input_processor import ProcessedInput
from minivllm.request import CompletionOutput, Logprob, Request, RequestOutput, RequestStatus
from minivllm.scheduler_output import ModelOutput


class ChildState:
    """One answer in the making: its detokenizer, logprobs and how much of the request's tokens has been seen."""

    def __init__(self, index: int, request: Request, tokenizer: Any | None, final_only: bool) -> None:
        self.index = index
        self.request = request
        params = request.sampling_params
        self.detokenizer = IncrementalDetokenizer(tokenizer, params)
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.stop_string: str | None = None  # the one that ended the text; the request's own status knows of tokens only
        # Is there anything to do for a token? A text that nobody sees before its end, and that cannot end the answer, waits for it,
        # and the request knows its tokens itself.
        needs_text = self.detokenizer.stream is not None and (bool(params.stop_strings) or not final_only)
        self.is_followed = needs_text or self.logprobs is not None

    def update(self, logprobs: list[dict[int, Logprob]]) -> None:
        """Take in the tokens that the request has gained, and note the stop string that they completed, if any.

        `logprobs` has one entry for each of them, or none at all where nobody asked.
        """
        request = self.request
        # One, or with speculation the accepted run. Only these are copied: a long answer grows by one at every step.
        new_token_ids = request.all_token_ids[request.num_prompt_tokens + len(self.token_ids):].tolist()
        # The text of the token that ended the request, "<|im_end|>" say, is not shown: the detokenizer must know that it did.
        self.stop_string = self.detokenizer.update(new_token_ids, stop_terminated=request.status == RequestStatus.FINISHED_STOPPED)
        if self.stop_string is not None:  # what an accepted run holds behind it was never said
            new_token_ids = new_token_ids[: self.detokenizer.num_tokens_kept - len(self.token_ids)]
        self.token_ids += new_token_ids
        if self.logprobs is not None and self.cumulative_logprob is not None:
            self.logprobs += logprobs[: len(new_token_ids)]
            self.cumulative_logprob += sum(entry[token].logprob for token, entry in zip(new_token_ids, logprobs))

    def finish(self) -> None:
        """The request has ended: show what was held back for a stop string that did not come, or else all text."""
        if self.is_followed:
            self.detokenizer.finish()
        else:
            ended_by_token = self.request.status == RequestStatus.FINISHED_STOPPED
            self.token_ids = self.request.output_token_ids
            self.detokenizer.take_all(self.token_ids, stop_terminated=ended_by_token)

    def to_output(self) -> CompletionOutput:
        """A snapshot that later steps do not change. A stop string outranks a length reached by the same token."""
        request, found = self.request, self.stop_string
        return CompletionOutput(
            index=self.index, text=self.detokenizer.text, cumulative_logprob=self.cumulative_logprob,
            token_ids=self.token_ids[:] if self.is_followed or self.token_ids else request.output_token_ids,
            logprobs=None if self.logprobs is None else list(self.logprobs),  # a copy of the list, not of its dicts
            finish_reason=request.status.finish_reason if found is None else "stop",
            stop_reason=request.stop_reason if found is None else found)


@dataclass
class OutputState:
    """One user request: its input, its children, and the prompt's logprobs as far as they are known."""

    processed: ProcessedInput
    children: list[ChildState]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_unfinished: int = 0

    def to_output(self) -> RequestOutput:
        """What the user gets: all n answers as far as they are, in the order of their index, whoever has moved."""
        requests = [child.request for child in self.children]
        return RequestOutput(
            request_id=self.processed.request_id,
            prompt=self.processed.prompt,
            prompt_token_ids=self.processed.prompt_token_ids,
            outputs=[child.to_output() for child in self.children],
            finished=self.num_unfinished == 0,
            prompt_logprobs=self.prompt_logprobs,
            # every child counts its own hits; the first one's are what the prompt itself found in the cache
            num_cached_tokens=max(requests[0].num_cached_tokens, 0),
            metrics=[request.times for request in requests],
        )


class OutputProcessor:
    """All unfinished requests by their user-visible id, and the way from a child's id to its parent."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer
        self.states: dict[str, OutputState] = {}
        self.parents: dict[str, tuple[OutputState, ChildState]] = {}
        self.token_texts: dict[int, str] = {}  # of tokens that logprobs have named: decoding costs more than looking up

    def add(self, processed: ProcessedInput, children: list[Request]) -> None:
        """Start keeping track of a request that the scheduler has accepted."""
        # The first token of a prompt follows nothing, so its place in the prompt's logprobs is None, as in vLLM.
        states = [ChildState(index, request, self.tokenizer, processed.final_only) for index, request in enumerate(children)]
        wants_prompt = processed.params.prompt_logprobs is not None
        state = OutputState(processed, states, [None] if wants_prompt else None, num_unfinished=len(states))
        self.states[processed.request_id] = state  # by the user's id; below, by the ids that the scheduler knows
        for child in states:
            self.parents[child.request.request_id] = (state, child)

    def update(self, requests: list[Request], output: ModelOutput) -> dict[str, int]:
        """Take in what a step produced: new text and logprobs. Returns the ids of requests that a stop string has ended, and
        how many tokens they have behind it: with speculation a step brings several.
        """
        for request_id, (start, entries) in output.prompt_logprobs.items():
            known = self.parents[request_id][0].prompt_logprobs
            # A preempted request computes its prompt again: what is known already is not taken twice.
            if known is not None and len(known) >= start:
                known += map(self.name_tokens, entries[len(known) - start:])
        stopped = {}
        for request in requests:
            child = self.parents[request.request_id][1]
            if child.is_followed:
                child.update([self.name_tokens(entry) for entry in output.logprobs.get(request.request_id, ())])
            if child.stop_string is not None:
                stopped[request.request_id] = request.num_output_tokens - len(child.token_ids)
        return stopped

    def name_tokens(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        """The same logprobs with each token's text, as it looks alone: half a character is U+FFFD."""
        if self.tokenizer is None:
            return entry  # ids alone: whoever works without a tokenizer has asked for no text
        for token_id in entry.keys() - self.token_texts.keys():
            self.token_texts[token_id] = self.tokenizer.decode([token_id])
        return {token_id: replace(logprob, decoded_token=self.token_texts[token_id]) for token_id, logprob in entry.items()}

    def collect(self, requests: list[Request]) -> list[RequestOutput]:
        """One `RequestOutput` for every user request that one of these belongs to; what has ended is forgotten.

        An output holds everything so far, so one per token costs the square of the answer's length: who waits for the end
        (`final_only`) gets the last one alone.
        """
        moved: dict[str, OutputState] = {}
        for request in requests:
            state, child = self.parents[request.request_id]
            if state.processed.final_only and not request.is_finished:
                continue
            moved[state.processed.request_id] = state
            if request.is_finished:
                child.finish()
                del self.parents[request.request_id]
                state.num_unfinished -= 1
        # The user's request ends with the last of its children; until then its id stays taken.
        for request_id, state in moved.items():
            if state.num_unfinished == 0:
                del self.states[request_id]
        return [state.to_output() for state in moved.values() if state.num_unfinished == 0 or not state.processed.final_only]
