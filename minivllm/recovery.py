"""After a step that failed: who is to blame for it, so that all others live on.

A forward pass fails as a whole and does not say for whom. Its requests wait again (`Scheduler.rollback`) and are suspects from
then on. They are let back in one by one, each only when the one before is past the position at which it failed. So a step holds
at most one suspect, and if that fails too, the suspect ends with finish_reason "error". Trouble that passes ends nobody.

    A B C fail | A | A B | A B C fails: C ends | A B ...

(Should one that runs already fail by itself while a suspect is tried, the wrong one ends: two independent faults at a time.)
Owns the suspects, and the number of seats while there are some. A broken device is nobody's fault: then the engine ends. vLLM
ends it at every exception (vllm/v1/engine/core.py).
"""

from __future__ import annotations

from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import SchedulerOutput


class Recovery:
    """At most one suspect runs, and nobody comes in beside it. No suspects: all seats are free and this does nothing."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.suspects: dict[str, int] = {}  # request id: how many positions it must have computed to be none any more
        self.failed: dict[str, int] = {}  # the same of the step that has just failed, until somebody asks whose fault it was

    def before_step(self) -> None:
        """Say how many requests may run in the next step."""
        scheduler, live, self.failed = self.scheduler, self.scheduler.requests, {}
        scheduler.max_num_running = scheduler.config.max_num_seqs
        self.suspects = {name: end for name, end in self.suspects.items() if name in live and live[name].num_computed_tokens < end}
        if self.suspects:
            is_tried = any(request.request_id in self.suspects for request in scheduler.running)
            scheduler.max_num_running = min(scheduler.max_num_running, len(scheduler.running) + (not is_tried))

    def roll_back(self, failed: SchedulerOutput) -> None:
        requests = self.scheduler.requests
        self.failed = {name: requests[name].num_computed_tokens for name in failed.num_scheduled_tokens if name in requests}
        self.scheduler.rollback(failed)

    def blame(self, error: Exception) -> list[str]:
        """Return who must end because of `error`, which the last step raised, and suspect the others that were in it.

        Raises `error` again if no step was rolled back, since then our own books are wrong, or if the device is broken.
        """
        if not self.failed or "CUDA error" in str(error):  # torch's words for what does not go away; not for out of memory
            raise error
        blamed = [name for name in self.failed if name in self.suspects]
        self.suspects = {name: end for name, end in (self.suspects | self.failed).items() if name not in blamed}
        return blamed
