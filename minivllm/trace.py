"""The engine's flight recorder: each step as one line of JSON, enough to draw every block, queue and decision afterwards.

Owns the format. The lessons' pictures, the live page and the trace viewer all draw from it. Records are differences, with
a full keyframe at the start and now and then, so that a viewer can begin anywhere:

    {"type": "header", "version": 1, "num_blocks": 65, "block_size": 16, ...}
    {"type": "keyframe", "step": 0, "requests": {}, "waiting": {"count": 1, "first": ["r1"]}, ...}
    {"type": "step", "step": 1, "admitted": {"r1": {...}}, "scheduled": {"r1": 9}, "sampled": {"r1": [42]}, ...}

`time` is the engine's clock and `first_tokens` the seconds from a request's arrival to its first token; nothing else depends
on a clock. Nothing is recorded, and nothing is computed, while there is no file and no listener.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from minivllm.request import Request
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import SchedulerOutput

VERSION = 1  # grows when a reader of the one before would misread a record; a further field leaves it as it is
KEYFRAME_EVERY = 100
NUM_WAITING_SHOWN = 64  # the queue may hold thousands: a picture needs its head and its length

Record = dict[str, Any]


class TraceRecorder:
    """Writes records to a file and hands them to listeners, on the engine's thread."""

    def __init__(self, scheduler: Scheduler, path: str | None = None) -> None:
        self.scheduler = scheduler
        self.file: TextIO | None = None
        self.listeners: list[Callable[[Record], None]] = []
        self.step = 0
        self.resident: dict[str, Request] = {}
        self.told: list[SchedulerOutput] = []  # planned before the first keyframe, which shows their blocks and progress
        self.num_recorded: dict[str, int] = {}  # how many tokens of each resident request the records so far have told
        self.last: Record = {}  # the newest step or keyframe
        if path is not None:
            self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
            self._introduce(self._write)

    @property
    def is_on(self) -> bool:
        return self.file is not None or bool(self.listeners)

    def subscribe(self, listener: Callable[[Record], None]) -> None:
        """Hand every later record to `listener`, beginning with a header and a keyframe of now. Called between two steps."""
        if not self.is_on:
            self.resident = {request.request_id: request for request in self.scheduler.running}
            self.num_recorded = {request_id: request.num_tokens for request_id, request in self.resident.items()}
            self.told = self.scheduler.in_flight.outputs
        self._introduce(listener)
        self.listeners.append(listener)

    def unsubscribe(self, listener: Callable[[Record], None]) -> None:
        self.listeners.remove(listener)
        self.scheduler.record_decisions = self.is_on

    def refresh(self) -> None:
        """Tell, with a keyframe, what has happened since the last record without a step: requests came or were aborted."""
        now = {"waiting": self._waiting(), "free_blocks": self.scheduler.kv_cache_manager.num_free_blocks}
        if self.is_on and any(self.last.get(name) != value for name, value in now.items()):
            self._emit(self._keyframe())

    def _introduce(self, receive: Callable[[Record], None]) -> None:
        self.scheduler.record_decisions = True
        manager, config = self.scheduler.kv_cache_manager, self.scheduler.config
        receive({"type": "header", "version": VERSION, "num_blocks": manager.num_blocks, "block_size": manager.block_size,
                 "max_num_seqs": config.max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens})
        self.last = self._keyframe()
        receive(self.last)

    def record(self, output: SchedulerOutput, moved: list[Request]) -> None:
        """Record one step that has just been made. `moved` are the requests that got tokens or ended in it."""
        if not self.is_on or output in self.told:
            return
        self.step += 1
        self._emit(self._step_record(output, {request.request_id: request for request in moved}))
        if self.step % KEYFRAME_EVERY == 0:
            self._emit(self._keyframe())

    def _step_record(self, output: SchedulerOutput, moved: dict[str, Request]) -> Record:
        admitted = {}
        for request_id in output.preempted_request_ids:
            if self.resident.pop(request_id, None) is not None:
                del self.num_recorded[request_id]
        for new in output.new_requests:
            request = moved.get(new.request_id) or self.scheduler.requests[new.request_id]
            self.resident[new.request_id] = request
            self.num_recorded[new.request_id] = len(new.token_ids)
            admitted[new.request_id] = {
                "num_prompt_tokens": new.num_prompt_tokens, "num_tokens": len(new.token_ids),
                "num_computed_tokens": new.num_computed_tokens, "blocks": list(new.block_ids),
            }
        sampled, first_tokens = self._newly_sampled()
        finished = {request_id: request.status.finish_reason for request_id, request in self.resident.items()
                    if request.is_finished}
        for request_id in finished:
            del self.resident[request_id], self.num_recorded[request_id]
        return {
            "type": "step", "step": self.step, "time": self._time(), "admitted": admitted,
            "scheduled": dict(output.num_scheduled_tokens),
            "new_blocks": {request_id: list(ids) for request_id, ids in output.new_block_ids.items() if ids},
            "cached": list(output.cached_block_ids),  # full, and known to the prefix cache from now on
            "drafts": dict(output.scheduled_spec_decode_tokens),
            "sampled": sampled, "first_tokens": first_tokens, "rewound": self._rewound(),
            "preempted": list(output.preempted_request_ids), "finished": finished,
            "waiting": self._waiting(), "free_blocks": self.scheduler.kv_cache_manager.num_free_blocks,
            "decisions": [{"request_id": decision.request_id, "action": decision.action, "reason": decision.reason,
                           "need": decision.need, "free": decision.free} for decision in output.decisions],
        }

    def _newly_sampled(self) -> tuple[dict[str, list[int]], dict[str, float]]:
        """What each request has gained since the record before; and for those whose first tokens these are, how long it took."""
        sampled, first_tokens = {}, {}
        for request_id, request in self.resident.items():
            num_recorded = self.num_recorded[request_id]
            if token_ids := request.all_token_ids[num_recorded:]:
                sampled[request_id] = token_ids.tolist()
                self.num_recorded[request_id] = request.num_tokens
                if num_recorded == request.num_prompt_tokens and request.times.first_token is not None:
                    first_tokens[request_id] = round(request.times.first_token - request.times.arrival, 6)
        return sampled, first_tokens

    def _time(self) -> float:
        return round(self.scheduler.clock(), 6)

    def _rewound(self) -> dict[str, list[int]]:
        """Whose drafts the step has found wrong: how many positions and how many blocks they are left with."""
        size = self.scheduler.kv_cache_manager.block_size
        rewound = self.scheduler.next_output.rewound_requests
        return {request_id: [rewind.num_computed_tokens, -(-rewind.num_computed_tokens // size)]
                for request_id, rewind in rewound.items() if request_id in self.resident}

    def _keyframe(self) -> Record:
        manager = self.scheduler.kv_cache_manager
        requests = {
            request_id: {"num_prompt_tokens": request.num_prompt_tokens, "num_tokens": request.num_tokens,
                         "num_computed_tokens": request.num_computed_tokens, "blocks": manager.get_block_ids(request_id)}
            for request_id, request in self.resident.items() if not request.is_finished  # aborted since the last step
        }
        return {"type": "keyframe", "step": self.step, "time": self._time(), "requests": requests, "waiting": self._waiting(),
                "free_blocks": manager.num_free_blocks, "cached": to_ranges(manager.pool.block_hashes)}

    def _waiting(self) -> Record:
        first = [request.request_id for request, _ in zip(self.scheduler.waiting, range(NUM_WAITING_SHOWN))]
        return {"count": len(self.scheduler.waiting), "first": first}

    def _emit(self, record: Record) -> None:
        self.last = record
        if self.file is not None:
            self._write(record)
        for listener in tuple(self.listeners):  # a copy: one that cannot follow leaves while it is told
            listener(record)

    def _write(self, record: Record) -> None:
        assert self.file is not None, "only called while the trace has a file"
        self.file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def to_ranges(block_ids: Iterable[int]) -> list[list[int]]:
    """Block ids as [first, count] pairs, in order: a full cache is one pair and not a hundred thousand numbers."""
    ranges: list[list[int]] = []
    for block_id in sorted(block_ids):
        if ranges and block_id == sum(ranges[-1]):
            ranges[-1][1] += 1
        else:
            ranges.append([block_id, 1])
    return ranges


@dataclass
class TraceState:
    """The engine after one step, rebuilt from records: what a picture is drawn from."""

    block_size: int = 1
    step: int = 0
    requests: dict[str, Record] = field(default_factory=dict)  # resident ones, in the order of their admission
    waiting: Record = field(default_factory=dict)
    free_blocks: int = 0
    cached: set[int] = field(default_factory=set)  # blocks that the prefix cache knows, held or free
    last: Record = field(default_factory=dict)  # the step's own record

    def block_owners(self) -> dict[int, list[str]]:
        """For every block in use the requests whose tables hold it; more than one means that it is shared."""
        owners: dict[int, list[str]] = {}
        for request_id, request in self.requests.items():
            for block_id in request["blocks"]:
                owners.setdefault(block_id, []).append(request_id)
        return owners


def replay(records: Iterable[Record]) -> Iterator[TraceState]:
    """The state at every keyframe that starts a trace and after every step. Raises `ValueError` for another version."""
    state = TraceState()
    for record in records:
        if record["type"] == "header":
            if record["version"] != VERSION:
                raise ValueError(f"this trace has version {record['version']}, and this program reads version {VERSION}")
            state = TraceState(record.get("block_size", 1))
            continue
        if record["type"] == "keyframe":
            is_first = not state.last and not state.step
            state.step = record["step"]
            state.requests = {name: {**entry, "blocks": list(entry["blocks"])} for name, entry in record["requests"].items()}
            state.waiting, state.free_blocks = record["waiting"], record["free_blocks"]
            state.cached = {block_id for first, count in record.get("cached", ()) for block_id in range(first, first + count)}
            if is_first:
                yield state
            continue
        _apply_step(state, record)
        yield state


def _apply_step(state: TraceState, record: Record) -> None:
    for request_id in record["preempted"]:
        state.requests.pop(request_id, None)
    for request_id, entry in record["admitted"].items():
        state.requests[request_id] = {**entry, "blocks": list(entry["blocks"])}
    for request_id, block_ids in record["new_blocks"].items():
        state.requests[request_id]["blocks"] += block_ids
    _apply_cache(state, record)
    for request_id, count in record["scheduled"].items():
        state.requests[request_id]["num_computed_tokens"] += count
    for request_id, token_ids in record["sampled"].items():  # the live page is told how many, and not which
        state.requests[request_id]["num_tokens"] += token_ids if isinstance(token_ids, int) else len(token_ids)
    for request_id, (num_computed, num_blocks) in record.get("rewound", {}).items():
        state.requests[request_id]["num_computed_tokens"] = num_computed
        del state.requests[request_id]["blocks"][num_blocks:]
    for request_id in record["finished"]:
        state.requests.pop(request_id, None)
    state.step, state.waiting, state.free_blocks, state.last = record["step"], record["waiting"], record["free_blocks"], record


def _apply_cache(state: TraceState, record: Record) -> None:
    """A block is forgotten when somebody takes it anew, and known once it is full. A failed step shows in the next keyframe."""
    taken = [entry["blocks"][entry["num_computed_tokens"] // state.block_size:] for entry in record["admitted"].values()]
    for block_ids in (*taken, *record["new_blocks"].values()):
        state.cached.difference_update(block_ids)
    state.cached.update(record.get("cached", ()))


def read_trace(path: str) -> list[Record]:
    """All records of a trace file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
