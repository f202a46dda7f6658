"""Lesson 9. A step that is on its way: what was sampled, as a promise.

Owns the wait for a step, and what its tokens become on the host. Whoever calls `result` at once has a synchronous engine; whoever
launches the next step first has the host's work for free, because the GPU computes meanwhile.

    launch N    kernels of N | copy of N's tokens | event      in the device's queue, in this order; where a mailbox has the tokens
    launch N+1  kernels of N+1 ...                             there is no copy. May begin before the host has seen N's tokens: they
                                                               lie in the rows
    result of N waits for the event, and not for N+1

vLLM's runner (vllm/v1/worker/gpu/model_runner.py) hands out the same kind of promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from minivllm.logprobs import LogprobsTensors, PromptLogprobs, to_dicts
from minivllm.scheduler_output import ModelOutput
from minivllm.speculative import accepted_run
from minivllm.transfers import download, mark


class AsyncOutput:
    """The tokens (R,) of R rows of logits, and the logprobs that some of them asked for.

    A request whose `drafts` were verified has a row behind each of them, and gets the run of tokens that these accept. `read` gives
    the tokens once the step is over, where a mailbox has them; else they are copied.
    """

    def __init__(self, request_ids: Sequence[str] = (), token_ids: Tensor | None = None,
                 prompt_logprobs: PromptLogprobs | None = None, drafts: Mapping[str, list[int]] | None = None,
                 read: Callable[[], list[Any]] | None = None) -> None:
        self.request_ids = request_ids
        self.prompt_logprobs = prompt_logprobs or {}
        self.drafts = drafts or {}
        self.logprobs: LogprobsTensors | None = None
        self.asked: dict[int, int] = {}  # who of the R asked for logprobs, and for how many
        self.read = read or (list if token_ids is None else download(token_ids).tolist)
        self.is_done = mark(token_ids)

    def add_logprobs(self, tensors: LogprobsTensors, asked: dict[int, int]) -> None:
        self.logprobs, self.asked = LogprobsTensors(*map(download, tensors)), asked
        self.is_done = mark(tensors.token_ids)

    def wait_and_read(self) -> list[Any]:
        """What was sampled."""
        if self.is_done is not None:
            self.is_done.synchronize()
        return self.read()

    def result(self) -> ModelOutput:
        """Wait for the device and read."""
        output = ModelOutput(prompt_logprobs=self.prompt_logprobs)
        tokens = self.wait_and_read()
        if self.drafts:
            for name, token in zip(self.request_ids, tokens):
                output.sampled_token_ids.setdefault(name, []).append(token)
        else:  # every request comes once
            output.sampled_token_ids = {name: [token] for name, token in zip(self.request_ids, tokens)}
        if self.logprobs is not None:
            for index, entry in zip(self.asked, to_dicts(self.logprobs, list(self.asked.values()))):
                output.logprobs.setdefault(self.request_ids[index], []).append(entry)
        for name, draft_token_ids in self.drafts.items():
            run = output.sampled_token_ids[name] = accepted_run(draft_token_ids, output.sampled_token_ids[name])
            del output.logprobs.get(name, [])[len(run):]
        return output
