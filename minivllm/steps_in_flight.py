"""Lesson 9. One step ahead: which steps are planned and have not come back, and to whom their results belong.

    host      plan 1 | plan 2 | take in 1 | plan 3 | take in 2 | plan 4 ...
    device           | step 1 ............| step 2 ............| step 3 ...

While a step is in flight its requests may end (by the token of the step before, or an abort), be preempted and even come back,
and an id may get a new owner. So a result belongs to a `Request` object, and to one of its residencies, and never to an id.

Owns that bookkeeping, and no decision: the scheduler makes them. vLLM: vllm/v1/core/sched/async_scheduler.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from minivllm.request import Request
from minivllm.scheduler_output import SchedulerOutput


class Share(NamedTuple):
    """One request's part in one step."""

    request: Request
    num_preemptions: int  # when the step was planned: it numbers the residency, since every one ends by a preemption or the end
    num_tokens: int
    samples: bool  # the step reaches the request's newest token, so it brings the next one


class StepsInFlight:
    """Steps that are planned, and neither taken in nor rolled back, oldest first."""

    def __init__(self) -> None:
        self.steps: deque[tuple[SchedulerOutput, list[Share]]] = deque()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def outputs(self) -> list[SchedulerOutput]:
        return [output for output, _ in self.steps]

    def add(self, output: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Note a step that has just been planned, and whose it is.

        A request has placeholders only when it has caught up, and then every one of its steps samples. So where all of the step
        before sample, and nobody has come or gone, the shares are the same.
        """
        before, shares = self.steps[-1] if self.steps else (None, [])
        if (before is None or output.num_scheduled_tokens != before.num_scheduled_tokens or output.new_requests
                or not all(share.samples for share in shares)):
            shares = []
            for request_id, num_tokens in output.num_scheduled_tokens.items():
                request = requests[request_id]
                shares.append(Share(request, request.num_preemptions, num_tokens, request.num_output_placeholders > 0))
        self.steps.append((output, shares))

    def take_in(self, output: SchedulerOutput) -> list[Share]:
        """The shares of the oldest step, which is `output`: the device finishes steps in their order."""
        assert self.steps and self.steps[0][0] is output, "results are taken in step by step, in the order of planning"
        return self.steps.popleft()[1]

    def undo(self, output: SchedulerOutput) -> list[SchedulerOutput]:
        """Forget `output` and every later step, and return them, newest first: what follows a failed step has built on it."""
        assert output in self.outputs, "only a step in flight can be undone"
        undone: list[SchedulerOutput] = []
        while not undone or undone[-1] is not output:
            undone.append(self.steps.pop()[0])
        return undone
