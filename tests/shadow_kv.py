"""The shadow KV: scheduler and KV manager played against a dictionary instead of a model, and nothing may ever be misread.

Writing position p of a sequence stores `kv[slot] = name of tokens[:p + 1]`. "Attention" for a query then reads every earlier
position through the block table and must find exactly those names. Sampling is a function of the tokens alone, so what a
request must answer is known without any engine. All sizes are tiny and the alphabet has two or three letters: prefixes
collide, blocks run out and steps fail in nearly every workload.

    workload = World(block_size=2, num_blocks=4, ...), [("add", [0, 1, 1], 3, ...), ("step", None), ("abort", 0), ...]
    play(*workload)          # AssertionError with a sentence if anything is wrong

The runner here sees only `SchedulerOutput`, as the real one does, so the differences it carries are under test as well.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from minivllm import speculative
from minivllm.config import EngineConfig
from minivllm.exceptions import ValidationError
from minivllm.kv_cache import KVCacheManager
from minivllm.request import Request, RequestStatus
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import ModelOutput, SchedulerOutput
from minivllm.speculative import DraftRoom, SpeculatingScheduler

EOS = 0
FAILURES = ("before the rows", "after the rows", "halfway through the writes", "after the writes")  # of a launch
AT_ITS_RESULT = "when its result is asked for"  # launched well, and the device has written garbage
GARBAGE = -1


@dataclass(frozen=True)
class World:
    """All sizes of one workload. `plans_ahead`: step N+1 is launched before the results of step N are taken in."""

    block_size: int = 2
    num_blocks: int = 6
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 8
    max_model_len: int = 16
    threshold: int = 0
    chunked: bool = True
    caching: bool = True
    letters: int = 2
    plans_ahead: bool = False
    num_drafts: int = 0  # most drafts of a request in a step; 0: nobody speculates
    right: int = 4  # of five drafts so many are right

    def make_scheduler(self) -> Scheduler:
        budget = self.max_num_batched_tokens if self.chunked else max(self.max_num_batched_tokens, self.max_model_len)
        config = EngineConfig(
            block_size=self.block_size, num_blocks=self.num_blocks, max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=budget, max_model_len=self.max_model_len, enable_prefix_caching=self.caching,
            enable_chunked_prefill=self.chunked, long_prefill_token_threshold=self.threshold if self.chunked else 0)
        manager = KVCacheManager(self.num_blocks, self.block_size, self.caching, self.max_model_len)
        if self.num_drafts:
            return SpeculatingScheduler(config, manager, clock=lambda: 0.0, proposer=ReplayProposer(self))
        return Scheduler(config, manager, clock=lambda: 0.0)


def name_prefixes(token_ids: list[int], salt: int) -> list[int]:
    """One number for every prefix. A salt goes in too: whoever reads KV of another salt finds another name."""
    names, name = [], salt + 1
    for token_id in token_ids:
        name = (name * 1_000_003 + token_id + 7) % (2**61 - 1)
        names.append(name)
    return names


def next_token(prefix_name: int, letters: int) -> int:
    return (prefix_name >> 13) % letters


def expected_tokens(prompt: list[int], salt: int, max_tokens: int, stops_at_eos: bool, world: World) -> list[int]:
    """What a request must answer, whatever happens around it."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, world.max_model_len):
        tokens.append(next_token(name_prefixes(tokens, salt)[-1], world.letters))
        if stops_at_eos and tokens[-1] == EOS:
            break
    return tokens[len(prompt):]


@dataclass
class ReplayProposer:
    """Knows how everybody goes on, says so or lies, and sometimes says nothing: a function of the world and the sequence."""

    world: World

    def propose(self, requests: list[Request], room: DraftRoom) -> dict[str, list[int]]:
        drafts = {}
        for request in requests:
            names = name_prefixes(request.all_token_ids, salt := int(request.cache_salt or 0))
            wanted = names[-1] % (self.world.num_drafts + 1)
            token_ids = list(request.all_token_ids)
            for _ in range(room.reserve(request, wanted)):
                name = name_prefixes(token_ids, salt)[-1]
                token_ids.append((next_token(name, self.world.letters) + (name % 5 >= self.world.right)) % self.world.letters)
            drafts[request.request_id] = token_ids[request.num_tokens:]
        return drafts

    def close(self) -> None:
        pass


class StepFailed(Exception):
    """What an injected failure raises."""


@dataclass
class Row:
    """What the runner keeps of a resident request."""

    token_ids: list[int]
    table: list[int]
    num_computed: int
    salt: int


class ShadowRunner:
    """A model runner whose KV cache is a dictionary from slot to the name of the prefix that was written there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kv: dict[int, int] = {}
        self.rows: dict[str, Row] = {}
        self.salts: dict[str, int] = {}  # the one thing a row needs that a step does not say
        self.num_positions = self.num_accepted = 0
        self.is_broken = False  # a step has failed on the device: garbage is what it and all later ones compute

    def slot(self, row: Row, position: int) -> int:
        size = self.world.block_size
        return row.table[position // size] * size + position % size

    def execute_model(self, output: SchedulerOutput, failure: str | None = None) -> ModelOutput:
        if failure == FAILURES[0]:
            raise StepFailed
        self.update_rows(output)
        if failure == FAILURES[1]:
            raise StepFailed
        self.is_broken |= failure == AT_ITS_RESULT
        self.write(output, failure)  # the whole batch writes before anybody reads, as in each layer of a model
        if failure in FAILURES:
            raise StepFailed
        sampled = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            row, drafts = self.rows[request_id], output.scheduled_spec_decode_tokens.get(request_id, [])
            row.num_computed += num_tokens
            if not self.is_broken:
                self.read(request_id, row)
            if row.num_computed == len(row.token_ids):
                num_known = len(row.token_ids) - len(drafts)
                names = name_prefixes(row.token_ids, row.salt)[num_known - 1:]
                row.token_ids[num_known:] = [next_token(name, self.world.letters) for name in names]
                sampled[request_id] = speculative.accepted_run(drafts, row.token_ids[num_known:])
                said = [draft == token_id for draft, token_id in zip(drafts, row.token_ids[num_known:])]
                self.num_accepted += (*said, False).index(False)
        self.num_positions += output.total_num_scheduled_tokens
        return ModelOutput(sampled)

    def update_rows(self, output: SchedulerOutput) -> None:
        """Drop, add, lengthen, in this order. A block that is handed out is wiped, as the real runner zeroes it."""
        for request_id in output.finished_request_ids + output.preempted_request_ids:
            self.rows.pop(request_id, None)
        for request_id, rewind in output.rewound_requests.items():
            if request_id in self.rows:
                row, end = self.rows[request_id], rewind.num_computed_tokens
                row.token_ids[end:], row.num_computed = rewind.token_ids, end
                del row.table[-(-end // self.world.block_size):]
        for new in output.new_requests:
            assert new.request_id not in self.rows, f"request {new.request_id} is new and the runner has a row of it"
            self.rows[new.request_id] = Row(list(new.token_ids), new.block_ids, new.num_computed_tokens, self.salts[new.request_id])
            self.wipe(new.block_ids[new.num_computed_tokens // self.world.block_size:])
        for request_id, block_ids in output.new_block_ids.items():
            self.rows[request_id].table += block_ids
            self.wipe(block_ids)
        for request_id, token_ids in output.scheduled_spec_decode_tokens.items():
            self.rows[request_id].token_ids += token_ids

    def wipe(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            for offset in range(self.world.block_size):
                self.kv.pop(block_id * self.world.block_size + offset, None)

    def write(self, output: SchedulerOutput, failure: str | None) -> None:
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            row = self.rows[request_id]
            end = row.num_computed + num_tokens
            assert end <= len(row.token_ids), (
                f"request {request_id} is scheduled up to position {end} and has {len(row.token_ids)} tokens")
            assert end <= len(row.table) * self.world.block_size, (
                f"request {request_id} is scheduled up to position {end} and owns {len(row.table)} blocks")
            names = name_prefixes(row.token_ids, row.salt)
            for position in range(row.num_computed, end):
                wrong = self.is_broken or failure == FAILURES[2]
                slot = self.slot(row, position)
                assert slot >= self.world.block_size, f"request {request_id} writes position {position} to the null block"
                if failure != FAILURES[2] or position % 2:
                    self.kv[slot] = GARBAGE if wrong else names[position]

    def read(self, request_id: str, row: Row) -> None:
        names = name_prefixes(row.token_ids, row.salt)
        for position in range(row.num_computed):
            found = self.kv.get(self.slot(row, position))
            assert found == names[position], (
                f"request {request_id} reads position {position} of {row.num_computed} in block "
                f"{row.table[position // self.world.block_size]} and finds "
                + ("nothing" if found is None else "what a failed step left" if found == GARBAGE else "another sequence's KV"))


@dataclass
class ShadowEngine:
    """`LLMEngine.step` over the shadow runner, with every promise of the scheduler checked on the way."""

    world: World
    asked: list[tuple] = field(default_factory=list)  # what `add` was given, by arrival number
    accepted: dict[int, Request] = field(default_factory=dict)  # by arrival number: an id may be used again
    aborted: set[int] = field(default_factory=set)
    first_tokens: list[int] = field(default_factory=list)  # arrival numbers, in the order of first tokens
    num_steps: int = 0
    num_failures: int = 0
    num_drafted: int = 0

    def __post_init__(self) -> None:
        self.scheduler = self.world.make_scheduler()
        self.manager = self.scheduler.kv_cache_manager
        self.runner = ShadowRunner(self.world)
        self.launched: deque[tuple[SchedulerOutput, ModelOutput | None]] = deque()  # None: to fail when its result is asked for

    def add(self, prompt: list[int], max_tokens: int, salt: int = 0, wants_prompt_logprobs: bool = False,
            stops_at_eos: bool = False, reuses_id: bool = False) -> None:
        number = len(self.asked)
        request_id = next(reversed(self.free_ids()), str(number)) if reuses_id else str(number)
        self.asked.append((prompt, max_tokens, salt, wants_prompt_logprobs, stops_at_eos))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=not stops_at_eos,
                                prompt_logprobs=1 if wants_prompt_logprobs else None)
        request = Request(request_id, prompt, params, eos_token_ids=[EOS], cache_salt=str(salt) if salt else None,
                          arrival_time=number)
        num_positions = min(len(prompt) + max_tokens, self.world.max_model_len) - 1
        fits = len(prompt) < self.world.max_model_len and num_positions <= (self.world.num_blocks - 1) * self.world.block_size
        try:
            self.scheduler.add_request(request)
        except ValidationError:
            assert not fits, f"request {request_id} needs {num_positions} positions, which the pool has, and is refused"
            return
        assert fits, f"request {request_id} needs {num_positions} positions, which the pool does not have, and is accepted"
        self.accepted[number] = request
        self.runner.salts[request_id] = salt

    def free_ids(self) -> list[str]:
        """Ids of ended requests, in the order of arrival, that nobody else has now."""
        return [request.request_id for request in self.accepted.values()
                if request.is_finished and request.request_id not in self.scheduler.requests]

    def abort(self, index: int) -> None:
        """Abort one of all requests ever asked for, in whatever state it is, and one that nobody knows."""
        number = index % (len(self.asked) + 1)
        request = self.accepted.get(number)
        if request is None:
            self.scheduler.finish_requests(["nobody"], RequestStatus.FINISHED_ABORTED)
        elif not request.is_finished:  # else the id may have another owner
            self.aborted.add(number)
            self.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
        self.check()

    def reset(self) -> None:
        done, num_running = self.manager.reset_prefix_cache(), len(self.scheduler.running)
        assert done == (num_running == 0), f"reset says {done} while {num_running} requests hold blocks"
        self.check()

    def step(self, failure: str | None = None) -> None:
        """As in LLMEngine.step: schedule and launch, when planning ahead until two steps are in flight; take in the oldest."""
        while len(self.launched) <= self.world.plans_ahead and (planned := self.schedule()).num_scheduled_tokens:
            if not self.launch(planned, failure):
                return
            failure = None
        if self.launched:
            self.take_in(*self.launched.popleft())
        self.check()

    def launch(self, planned: SchedulerOutput, failure: str | None) -> bool:
        """Run the shadow runner at once, in the order of launching, as a device does. False if the launch failed."""
        try:
            model_output = self.runner.execute_model(planned, failure)
        except StepFailed:
            self.roll_back([planned])
            return False
        rows, residents = self.runner.rows.keys(), {request.request_id for request in self.scheduler.running}
        assert rows == residents, f"the runner has rows of {sorted(rows)}, and running are {sorted(residents)}"
        for request_id, row in self.runner.rows.items():
            table = self.manager.get_block_ids(request_id)
            assert row.table == table, f"the runner's table of request {request_id} is {row.table}, and it owns {table}"
        self.launched.append((planned, None if failure == AT_ITS_RESULT else model_output))
        return True

    def take_in(self, planned: SchedulerOutput, model_output: ModelOutput | None) -> None:
        if model_output is None:
            failed_steps = [planned, *(later for later, _ in self.launched)]
            self.launched.clear()
            self.runner.is_broken = False
            return self.roll_back(failed_steps)
        before = {id(request): request.output_token_ids for request in self.accepted.values()}
        moved = self.scheduler.update_from_output(planned, model_output)
        for request in moved:
            assert not self.world.plans_ahead or request.num_output_placeholders in (0, 1), f"{request!r} has too many on the way"
            if not before[id(request)]:
                self.first_tokens.append(int(request.times.arrival))
        for request in self.accepted.values():
            assert request in moved or request.output_token_ids == before[id(request)], f"{request!r} has moved unseen"
        return None

    def roll_back(self, failed_steps: list[SchedulerOutput]) -> None:
        """What the failed steps had scheduled waits again, in its order, before all that waited already."""
        self.num_failures += 1
        failed = [request for request in self.scheduler.running
                  if any(request.request_id in output.num_scheduled_tokens for output in failed_steps)]
        expected = failed + list(self.scheduler.waiting)
        self.scheduler.rollback(failed_steps[0])
        assert list(self.scheduler.waiting) == expected, "after a failed step the queue is in another order"
        self.check()

    def schedule(self) -> SchedulerOutput:
        waiting = [request.request_id for request in self.scheduler.waiting]
        num_preemptions = self.scheduler.stats.num_preemptions
        output = self.scheduler.schedule()
        self.num_steps += 1
        did_preempt = self.scheduler.stats.num_preemptions > num_preemptions
        self.check_amounts(output)
        self.check_admissions(output)
        self.check_order(output, waiting, did_preempt)
        assert not (output.scheduled_spec_decode_tokens and did_preempt), f"step {self.num_steps} preempts to verify drafts"
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            self.num_drafted += len(drafts)
            num_left = self.num_left(self.scheduler.requests[request_id])
            assert num_left > len(drafts) > 0, f"request {request_id} has {len(drafts)} drafts and ends in {num_left} tokens"
        for request_id in output.rewound_requests if output.num_scheduled_tokens else ():
            assert request_id in (*output.num_scheduled_tokens, *output.preempted_request_ids, *output.finished_request_ids), (
                f"request {request_id} is taken back and neither moves nor gives way")
        if not did_preempt:
            self.check_no_idling(output)
        return output

    def check_amounts(self, output: SchedulerOutput) -> None:
        """The step keeps to its budget, its cap and its seats, and moves something."""
        counts, total = output.num_scheduled_tokens, output.total_num_scheduled_tokens
        budget = self.scheduler.max_num_batched_tokens
        assert total <= budget, f"step {self.num_steps} has {total} tokens and a budget of {budget}"
        assert all(count > 0 for count in counts.values()), f"step {self.num_steps} has an empty query: {counts}"
        assert counts or not self.scheduler.requests or self.launched, f"step {self.num_steps} moves nothing"
        assert len(self.scheduler.running) <= self.world.max_num_seqs, (
            f"{len(self.scheduler.running)} requests are resident and max_num_seqs is {self.world.max_num_seqs}")
        if self.world.chunked and self.world.threshold and len(self.scheduler.requests) > 1:
            most = max(counts.values(), default=0)
            assert most <= self.world.threshold, f"one request gets {most} tokens, and the threshold is {self.world.threshold}"

    def check_admissions(self, output: SchedulerOutput) -> None:
        """Hits are whole blocks and never everything, chunks are allowed, and all known tokens of the newest would fit."""
        for new in output.new_requests:
            num_hits, size = new.num_computed_tokens, self.world.block_size
            assert num_hits % size == 0 and num_hits < len(new.token_ids), (
                f"request {new.request_id} starts with {num_hits} of its {len(new.token_ids)} tokens computed")
            wants_prompt_logprobs = new.sampling_params.prompt_logprobs is not None
            assert num_hits == 0 or (self.world.caching and not wants_prompt_logprobs), (
                f"request {new.request_id} must not read the cache and hits {num_hits} tokens")
            assert self.world.chunked or output.num_scheduled_tokens[new.request_id] == len(new.token_ids) - num_hits, (
                f"request {new.request_id} is cut into chunks although that is switched off")
        if output.new_requests:
            num_blocks = -(-len(new.token_ids) // self.world.block_size) - len(new.block_ids)
            assert num_blocks <= self.manager.num_free_blocks, (
                f"request {new.request_id} is admitted, lacks {num_blocks} blocks and {self.manager.num_free_blocks} are left")

    def check_order(self, output: SchedulerOutput, waiting: list[str], did_preempt: bool) -> None:
        """Nobody overtakes: admitted are the first of the queue, and nobody in a step that took memory away."""
        admitted = [new.request_id for new in output.new_requests]
        assert admitted == waiting[:len(admitted)], f"admitted were {admitted} and the queue was {waiting}"
        assert not (admitted and did_preempt), f"step {self.num_steps} preempted and admitted {admitted}"
        resident = [request.request_id for request in self.scheduler.running]
        missing = [request_id for request_id in output.num_scheduled_tokens if request_id not in resident]
        assert not missing, f"requests {missing} were scheduled and preempted in one step"

    def check_no_idling(self, output: SchedulerOutput) -> None:
        """Who gets nothing has a reason: the budget is spent, or there is no seat or no room."""
        left = self.scheduler.max_num_batched_tokens - output.total_num_scheduled_tokens
        idle = [request.request_id for request in self.scheduler.running
                if request.request_id not in output.num_scheduled_tokens and not self.waits_for_its_end(request)]
        assert left == 0 or not idle, f"requests {idle} run and get nothing while {left} tokens of the budget are left"
        if left and self.scheduler.waiting and len(self.scheduler.running) < self.world.max_num_seqs:
            head = self.scheduler.waiting.peek()
            num_blocks, num_free = -(-head.num_tokens // self.world.block_size), self.manager.num_free_blocks
            assert num_blocks > num_free or (not self.world.chunked and head.num_tokens > left), (
                f"request {head.request_id} needs {num_blocks} blocks of {num_free} free and is not admitted")

    def num_left(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.max_tokens, self.world.max_model_len) - request.num_tokens

    def waits_for_its_end(self, request: Request) -> bool:
        """Its last token is on the way."""
        num_tokens = request.num_tokens + request.num_output_placeholders
        last = min(request.num_prompt_tokens + request.max_tokens, self.world.max_model_len)
        assert num_tokens <= last, f"{request!r} has {request.num_output_placeholders} tokens on the way and ends at {last}"
        return num_tokens == last

    def check(self) -> None:
        """What holds between any two steps: blocks and requests are conserved, and the inequalities of every status."""
        self.manager.check()
        scheduler = self.scheduler
        queued = [request.request_id for request in (*scheduler.waiting, *scheduler.running)]
        unfinished = sorted(request.request_id for request in self.accepted.values() if not request.is_finished)
        assert sorted(queued) == unfinished == sorted(scheduler.requests), f"queued are {queued} and unfinished {unfinished}"
        for request in scheduler.waiting:
            is_waiting = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            assert is_waiting and request.num_computed_tokens == request.num_output_placeholders == 0, f"{request!r} waits"
        running, owners = {request.request_id for request in scheduler.running}, self.manager.block_tables.keys()
        assert owners == running, f"blocks belong to {sorted(owners)}, running are {sorted(running)}"
        for request in scheduler.running:
            num_slots = len(self.manager.get_block_ids(request.request_id)) * self.world.block_size
            assert request.status is RequestStatus.RUNNING and request.num_computed_tokens <= num_slots, (
                f"{request!r} owns {num_slots} slots")
            num_tokens = request.num_tokens + request.num_output_placeholders
            assert request.num_computed_tokens < num_tokens, f"{request!r} runs and has nothing to do"
            assert self.launched or not request.num_output_placeholders, f"{request!r} waits for a token that nobody samples"
            if request.request_id in scheduler.next_output.rewound_requests:
                num_unused = num_slots - request.num_computed_tokens
                assert num_unused < self.world.block_size, f"{request!r} keeps the blocks of its drafts"
            self.check_published(request)
        assert len(scheduler.in_flight) == len(self.launched)

    def check_published(self, request: Request) -> None:
        """A published block holds tokens that were said, and the name says which."""
        if self.launched:  # of a step in flight nothing is known yet
            return
        size, table = self.world.block_size, self.manager.get_block_ids(request.request_id)
        for index in range(self.manager.num_cached_blocks[request.request_id] if self.world.caching else 0):
            name, said = self.manager.pool.block_hashes[table[index]], request.all_token_ids[index * size:(index + 1) * size]
            published = array("q", name.token_ids)
            assert published == said, f"{request!r} has published {published.tolist()} and said {said.tolist()}"

    def run_to_the_end(self) -> None:
        """Whoever is oldest moves in every step, so the work of all, once more for each failure, bounds the steps."""
        work = sum(len(prompt) + max_tokens for prompt, max_tokens, *_ in self.asked)
        bound = self.num_steps + (work + 2) * (self.num_failures + 1) * (3 if self.world.plans_ahead else 1)
        while self.scheduler.has_unfinished_requests() or self.launched:
            num_left = len(self.scheduler.requests)
            assert self.num_steps < bound, f"{num_left} requests are unfinished after {self.num_steps} steps"
            self.step()
        self.check_end()

    def check_end(self) -> None:
        """Everybody has got exactly what it had to get, in order of arrival, and every block is back."""
        for number, request in self.accepted.items():
            prompt, max_tokens, salt, _, stops_at_eos = self.asked[number]
            expected = expected_tokens(prompt, salt, max_tokens, stops_at_eos, self.world)
            got = request.output_token_ids
            is_right = got == expected[:len(got)] if number in self.aborted else got == expected
            assert is_right, f"request {number} answered {got}, and alone it answers {expected}"
        assert self.manager.num_free_blocks == self.world.num_blocks - 1, f"{self.manager.num_free_blocks} blocks came back"
        assert self.manager.usage == 0
        if not self.num_failures and not (self.world.chunked and self.world.threshold):
            assert self.first_tokens == sorted(self.first_tokens), f"first tokens came in the order {self.first_tokens}"
        self.check_positions()

    def check_positions(self) -> None:
        """The identity of SchedulerStats, and no position behind the last token where the length alone ends a request."""
        stats = self.scheduler.stats
        if not self.num_failures:
            assert stats.num_scheduled_tokens == self.runner.num_positions, "positions are miscounted"
        if not self.num_failures and not self.aborted and (not self.world.caching or not stats.num_preemptions):
            assert stats.num_scheduled_tokens == (
                stats.num_prompt_tokens - stats.prefix_cache_hits + stats.num_generated_tokens - stats.num_finished
                + stats.num_recomputed_tokens + stats.discarded_positions + stats.num_rejected_positions), (
                f"positions do not add up: {stats}")
        counted, seen = (stats.num_draft_tokens, stats.num_accepted_tokens), (self.num_drafted, self.runner.num_accepted)
        assert counted == seen or self.num_failures, f"drafts and accepted drafts are {seen}, and counted are {counted}"
        if not self.aborted and (not self.world.plans_ahead or not any(stops_at_eos for *_, stops_at_eos in self.asked)):
            assert stats.discarded_positions == 0, f"{stats.discarded_positions} positions were computed for nothing"


def play(world: World, ops: list[tuple]) -> ShadowEngine:
    """Run one workload, then everything to its end. Raises AssertionError with a sentence if a promise is broken."""
    engine = ShadowEngine(world)
    for op, *arguments in ops:
        getattr(engine, op)(*arguments)
    engine.run_to_the_end()
    return engine


MISHAPS = [("step", failure) for failure in (*FAILURES, AT_ITS_RESULT)] + [("abort", index) for index in range(8)] + [("reset",)]
# salt, wants_prompt_logprobs, stops_at_eos
FLAGS = [(0, False, False)] * 5 + [(0, False, True), (1, False, False), (1, False, False), (0, True, False)]


@st.composite
def workloads(draw) -> tuple[World, list[tuple]]:
    """A small world and a list of plain operations in it, so that a shrunk failure can be read and typed in again.

    Sizes are drawn before lists, because Hypothesis' own lists are short: memory must run out in most workloads. Prompts
    are the beginning of one of two stems and a few letters more, so that prefixes are shared and then part.
    """
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(3, 13))
    world = World(
        block_size=block_size, num_blocks=num_blocks, max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 16)), max_model_len=draw(st.integers(4, 32)),
        threshold=draw(st.sampled_from([0, 0, 1, 3])), chunked=draw(st.sampled_from([True, True, False])),
        caching=draw(st.sampled_from([True, True, True, False])), letters=draw(st.integers(2, 3)),
        plans_ahead=draw(st.booleans()))
    longest = min(world.max_model_len - 1, (num_blocks - 1) * block_size)
    stems = [draw(st.lists(st.integers(0, world.letters - 1), min_size=longest, max_size=longest)) for _ in range(2)]

    def add() -> tuple:
        tail = draw(st.lists(st.integers(0, world.letters - 1), max_size=3))
        prompt = draw(st.sampled_from(stems))[:draw(st.integers(1, longest))] + tail
        max_tokens = draw(st.integers(1, 12))
        if draw(st.integers(0, 9)):  # one in ten may be too long, and is refused
            prompt = prompt[:longest]
            max_tokens = min(max_tokens, (num_blocks - 1) * block_size + 1 - len(prompt))
        return ("add", prompt, max_tokens, *draw(st.sampled_from(FLAGS)), draw(st.integers(0, 3)) == 0)

    def operation() -> tuple:
        kind = draw(st.integers(0, 19))
        if kind < 9:
            return add()
        if kind < 17:
            return ("step", None)
        return draw(st.sampled_from(MISHAPS))

    return world, [operation() for _ in range(draw(st.integers(1, 30)))]


@st.composite
def speculating_workloads(draw) -> tuple[World, list[tuple]]:
    """The same, with drafts that are always right, always wrong, or mostly one of the two."""
    world, operations = draw(workloads())
    num_drafts, right = draw(st.integers(1, 6)), draw(st.sampled_from([0, 2, 4, 5, 5]))
    return replace(world, plans_ahead=False, num_drafts=num_drafts, right=right), operations
