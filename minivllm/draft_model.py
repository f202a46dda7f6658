"""Lesson 12. A small model guesses for a large one: a second runner, with KV of its own, on the same block tables.

Owns the draft model's runner and what it has computed of each request. It is driven like any runner, by `SchedulerOutput`, only
more often: first it catches up with the tokens that it does not know yet, then it decodes, one draft a step.

    target   ... knows 0 .. 9, token 9 not computed      draft   has computed 0 .. 8, of which the last two are accepted drafts
    steps    catch up with position 9 -> draft 10 | position 10 -> draft 11 | ... | verified by the target as positions 9 .. 13

The draft draws with the request's own parameters and noise: where both models see the same probabilities, they say the same
token, at any temperature. Its KV of a shared block is as good as the target's, so prefix hits count for it too. And whatever
goes wrong in here, answers stay right: the target verifies every token. vLLM: v1/spec_decode/draft_model.py.

What has to hold is about its own KV only, and a mistake shows as fewer accepted guesses and not as a wrong answer:

    resident.count_computed() <= request.num_tokens - 1    the newest known token is computed in any case: it gives the first guess
    filled[block] == hash  =>  the draft's KV in this block is that of the hash's tokens

The two runners never meet. The tables are the scheduler's, and each runner has tensors of its own under the same block ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minivllm.config import EngineConfig, ModelConfig
from minivllm.exceptions import ValidationError
from minivllm.kv_cache import BlockHash
from minivllm.mailbox import NUM_SLOTS
from minivllm.model import Qwen2ForCausalLM
from minivllm.model_runner import ModelRunner
from minivllm.packed_linear import pack_linears
from minivllm.request import Request
from minivllm.scheduler_output import LaunchedStep, NewRequestData, Rewind, SchedulerOutput
from minivllm.speculative import DraftRoom, NgramProposer, Proposer
from minivllm.speculative_config import SpeculativeConfig, describe
from minivllm.tiny import draft_path
from minivllm.weights import load_dummy_model, load_model, resolve_model


@dataclass
class Resident:
    """A request that has a row in the draft's runner.

    It may know less than the target, which runs while the draft waits: prompts are computed when the first guess is asked for,
    and steps without room for guesses leave it behind.
    """

    request: Request
    num_preemptions: int  # which of its residencies
    num_filled: int  # blocks of its table that `filled` knows
    num_computed: int  # positions whose KV the draft has, of tokens that were known then,
    drafts: list[int]  # and behind these, of the guesses that it has made (but for the last: nothing was computed from it)

    def count_computed(self) -> int:
        """How many positions are still true: the guesses count as far as the request has gone on just so.

        Looked at anew each time, since steps may lie between, without a guess for this request.
        """
        said = self.request.all_token_ids[self.num_computed:]
        pairs = zip(self.drafts[:-1], said)
        num_right = next((index for index, (draft, token_id) in enumerate(pairs) if draft != token_id),
                         min(len(self.drafts[:-1]), len(said)))
        return min(self.num_computed + num_right, self.request.num_tokens - 1)

    @property
    def is_gone(self) -> bool:
        """It has ended, or lost the blocks that its row is about."""
        return self.request.is_finished or self.request.num_preemptions != self.num_preemptions


class DraftModelProposer:
    """Drafts by a model. `budget` is the most tokens of one of its steps."""

    def __init__(self, runner: ModelRunner, num_tokens: int, budget: int) -> None:
        self.runner = runner
        self.num_tokens = num_tokens
        self.budget = budget
        self.block_size = runner.block_size
        self.residents: dict[str, Resident] = {}  # request id -> its row here
        self.leaving: list[str] = []  # rows that the runner must drop before its next step, after one that failed
        self.filled: dict[int, BlockHash] = {}  # blocks that hold the draft's KV of this content

    def warm_up(self) -> float:
        """The runner's own: its kernels and graphs are others than the target's."""
        return self.runner.warm_up()

    def propose(self, requests: Sequence[Request], room: DraftRoom) -> dict[str, list[int]]:
        """`num_tokens` drafts for each request, or as many as there is room for. If a step fails, the rows start anew."""
        # Room first: slots for drafts are the scheduler's to give, and who gets none costs the draft no step.
        granted = [(request, number) for request in requests if (number := room.reserve(request, self.num_tokens))]
        if not granted:
            return {}
        try:
            drafts = self.run({request.request_id: number for request, number in granted},
                              self.update_rows([request for request, _ in granted], room))
        except BaseException:  # nobody knows which positions were written: forget all rows, and all that was good for others
            self.leaving += self.residents
            self.residents.clear()
            self.filled.clear()
            raise
        for request, _ in granted:
            self.note_computed(request, drafts[request.request_id], room.block_ids(request))
        return drafts

    def update_rows(self, requests: Sequence[Request], room: DraftRoom) -> SchedulerOutput:
        """The beginning of a step: who has left, who is new, and what has become of each row's drafts."""
        gone = [request_id for request_id, resident in self.residents.items() if resident.is_gone]
        output = SchedulerOutput(finished_request_ids=self.leaving + gone)
        self.leaving = []
        for request_id in gone:
            del self.residents[request_id]
        for request in requests:
            resident, table = self.residents.get(request.request_id), room.block_ids(request)
            if resident is None:
                new_blocks = self.admit(request, table, output)
            else:
                # Behind the last position that is still true: tokens that are known by now stand in for guesses that were wrong.
                start = resident.num_computed = resident.count_computed()
                output.rewound_requests[request.request_id] = Rewind(start, request.all_token_ids[start:])
                if new_blocks := table[-(-start // self.block_size):]:
                    output.new_block_ids[request.request_id] = new_blocks
            for block_id in new_blocks:  # the runner wipes them
                self.filled.pop(block_id, None)
        return output

    def admit(self, request: Request, table: list[int], output: SchedulerOutput) -> list[int]:
        """Give a request a row, behind the blocks of which the draft has KV already; returns its other blocks."""
        num_hits, most = 0, (request.num_tokens - 1) // self.block_size  # at least one token is computed, as ever
        # The target's hits say nothing: it may have computed a block for a request for which nobody has ever guessed.
        for block_id, block_hash in zip(table[:most], request.block_hashes):
            if self.filled.get(block_id) != block_hash:
                break
            num_hits += 1
        new = NewRequestData.from_request(request, table)
        new.num_computed_tokens = num_hits * self.block_size
        # A guess is drawn as the answer is, by the same parameters. Only its logprobs are nobody's business.
        new.sampling_params = dataclasses.replace(new.sampling_params, logprobs=None, prompt_logprobs=None)
        output.new_requests.append(new)
        self.residents[request.request_id] = Resident(request, request.num_preemptions, num_hits, new.num_computed_tokens, [])
        return table[num_hits:]

    def run(self, num_wanted: dict[str, int], output: SchedulerOutput) -> dict[str, list[int]]:
        """Steps of at most `budget` tokens until every request has its drafts. Waits for the device once, at the end,
        or when a mailbox holds no more.
        """
        drafts: dict[str, list[int]] = {request_id: [] for request_id in num_wanted}
        num_missing = {request_id: self.residents[request_id].request.num_tokens - self.residents[request_id].num_computed
                       for request_id in num_wanted}
        num_left, launched = dict(num_wanted), list[LaunchedStep]()
        while any(num_left.values()):
            budget = self.budget
            for request_id in num_left:
                if num_left[request_id] and (count := min(num_missing[request_id], budget)):
                    output.num_scheduled_tokens[request_id] = count
                    budget -= count
                    num_missing[request_id] -= count
                    if num_missing[request_id] == 0:  # it samples, and then it misses that token
                        num_left[request_id] -= 1
                        num_missing[request_id] = 1
            launched.append(self.runner.execute_model(output))
            output = SchedulerOutput()  # rows change in the first step alone
            if len(launched) == NUM_SLOTS or not any(num_left.values()):  # what a step samples is where the next one reads it
                for step in launched:
                    for request_id, token_ids in step.result().sampled_token_ids.items():
                        drafts[request_id] += token_ids
                launched.clear()
        return drafts

    def note_computed(self, request: Request, drafts: list[int], table: list[int]) -> None:
        """Remember how far the row is, and which full blocks of known tokens have become good for others."""
        resident = self.residents[request.request_id]
        # Up to the known tokens only: what lies behind them in the table are guesses, and a guess has no name.
        known = request.block_hashes[: request.num_tokens // self.block_size]  # names may come a step later
        for index in range(resident.num_filled, len(known)):
            self.filled[table[index]] = known[index]
        resident.num_filled = len(known)
        resident.num_computed, resident.drafts = request.num_tokens, list(drafts)

    def close(self) -> None:
        """Give the draft's weights and KV back."""
        self.runner.close()


# At start


def parsed(config: EngineConfig) -> SpeculativeConfig | None:
    """Parsed where it is needed: the engine's config keeps what the user wrote, so that it can be shown and compared."""
    return SpeculativeConfig.parse(config.speculative_config, target_is_embedded=config.model is None)


def num_drafts(config: EngineConfig) -> int:
    """The most guesses that a request gets in a step; 0 if nobody guesses."""
    asked = parsed(config)
    return asked.num_speculative_tokens if asked else 0


def load_draft(config: EngineConfig, target: Qwen2ForCausalLM, tokenizer: Any | None, dtype: torch.dtype,
               device: torch.device) -> tuple[Qwen2ForCausalLM | None, str]:
    """The draft model, if one was asked for, and the line of the report. Raises `ValidationError` for one that cannot guess for
    this target.
    """
    asked, num_parameters = parsed(config), sum(weight.numel() for weight in target.parameters())
    if asked is None or asked.method != "draft_model":
        return None, "" if asked is None else describe(asked, 0, num_parameters)
    folder = draft_path() if asked.model is None else resolve_model(asked.model, asked.revision)
    draft_config = ModelConfig.from_folder(folder)
    check_draft(str(asked.model or folder), draft_config, target.config, config.max_model_len)
    check_vocabulary(str(folder), tokenizer)
    if config.load_format == "dummy":
        draft = load_dummy_model(draft_config, dtype, device, config.seed)
    else:
        draft = load_model(folder, dtype, device)
    line = describe(asked, sum(weight.numel() for weight in draft.parameters()), num_parameters)  # before they are packed
    pack_linears(draft, device, config.max_num_seqs)  # a step of the draft has as many rows as one of the target
    return draft, line


def check_draft(name: str, draft: ModelConfig, target: ModelConfig, max_model_len: int | None) -> None:
    """Same vocabulary, and as many positions as the engine may use."""
    if draft.vocab_size != target.vocab_size:
        raise ValidationError(f"speculative_config: the draft {name} has a vocabulary of {draft.vocab_size} tokens and the model "
                              f"one of {target.vocab_size}: its guesses would mean other words. Take a draft of the same family",
                              parameter="speculative_config", value=name)
    longest = max_model_len or target.max_model_len
    if draft.max_model_len < longest:
        raise ValidationError(f"speculative_config: the draft {name} was made for {draft.max_model_len} positions and "
                              f"max_model_len is {longest}: set max_model_len={draft.max_model_len}, or take another draft",
                              parameter="speculative_config", value=name)


def check_vocabulary(folder: str, tokenizer: Any | None) -> None:
    """As many tokens do not make the same vocabulary: where both have a tokenizer, every id must mean the same."""
    from transformers import AutoTokenizer

    if tokenizer is None:
        return
    try:
        others = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    except Exception:  # a draft needs no tokenizer
        return
    ours = tokenizer.get_vocab()
    if different := sorted(token for token, token_id in ours.items() if others.get(token, token_id) != token_id):
        raise ValidationError(f"speculative_config: the draft {folder} has another vocabulary than the model: {different[0]!r} is "
                              f"{ours[different[0]]} here and {others[different[0]]} there. Take a draft of the same family",
                              parameter="speculative_config", value=folder)


def make_proposer(config: EngineConfig, draft: Qwen2ForCausalLM | None, device: torch.device,
                  tokenizer: Any | None) -> Proposer | None:
    """Whoever guesses, with the sizes of a started engine."""
    asked = parsed(config)
    if asked is None:
        return None
    if draft is None:
        # No weights and no KV: a look into the request's own tokens, so its guesses are good where text repeats.
        return NgramProposer(asked.num_speculative_tokens, asked.prompt_lookup_max, asked.prompt_lookup_min)
    assert config.max_num_batched_tokens, "a started engine has decided its sizes"  # and the draft's steps keep to them, too
    return DraftModelProposer(ModelRunner(draft, config, device, tokenizer), asked.num_speculative_tokens,
                              config.max_num_batched_tokens)
