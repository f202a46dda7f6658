"""Lesson 9. From a step's hidden states to its tokens: who samples, by which of three ways, and what goes to the host.

Owns the choice of the sampler, and what it has to know of the rows. Where there are graphs they draw by temperature alone, from
logits that stay where they are; where somebody asks for more, all rows are drawn again behind it:

    nobody asks for more          the graph's own token
    top_k, top_p, penalties ...   a graph of its own (graph_sampler.py)
    a logit_bias, a large top_k   the whole sampler, some fifty kernels (sampler.py), as without any graph

Whatever was drawn becomes its row's newest token on the device, and is on its way to the host when `sample` returns. Then

    batch.num_tokens[row] == tokens of the row, the one that is on its way included
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from minivllm.async_output import AsyncOutput
from minivllm.cuda_graphs import DecodeGraphs
from minivllm.graph_sampler import SamplerGraphs
from minivllm.input_batch import InputBatch, RowTensors, StepInputs
from minivllm.logprobs import WHOLE_VOCABULARY, PromptLogprobs, compute_logprobs
from minivllm.model import Qwen2ForCausalLM
from minivllm.sampler import mask_and_bias, sample
from minivllm.sampling_metadata import RowParams, SamplingMetadata
from minivllm.transfers import upload


class StepSampler:
    """Samples for the requests of a batch. Its graphs, if it ever has any, come with `warm_up`."""

    def __init__(self, model: Qwen2ForCausalLM, batch: InputBatch, rows: RowTensors) -> None:
        self.model, self.batch, self.rows = model, batch, rows
        self.decode_graphs: DecodeGraphs | None = None
        self.sampler_graphs: SamplerGraphs | None = None
        self.key: list[int] = []  # whom `metadata` is about
        self.metadata: SamplingMetadata

    def sample(self, inputs: StepInputs, hidden: Tensor | None, prompts: PromptLogprobs,
               drafts: Mapping[str, list[int]]) -> AsyncOutput:
        """One token for every request that this step has brought to its newest one, and one behind each draft.

        `hidden` (R, E) are the hidden states of these; None where the step was a graph, which has put them where the head looks.
        """
        rows, num_sampled = inputs.rows[inputs.samples], 1 + inputs.num_drafts[inputs.samples]
        if len(rows) == 0:
            return AsyncOutput(prompt_logprobs=prompts)
        if self.decode_graphs is not None and (num_sampled == 1).all():
            if hidden is not None:
                self.decode_graphs.states[: len(rows)] = hidden
            return self.drawn(rows, *self.decode_graphs.run_head(rows), prompts)
        assert hidden is not None, "only a head that is a graph has it already"
        return self.sample_behind_drafts(rows, num_sampled, hidden, prompts, drafts)

    def drawn(self, rows: np.ndarray, logits: Tensor, token_ids: Tensor, prompts: PromptLogprobs) -> AsyncOutput:
        """What a graph has drawn, by temperature alone, from the logits (R, V) of these rows (R,), each of which comes once."""
        assert self.decode_graphs is not None, "it has made the logits"
        index, of_model, wants = self.decode_graphs.index[: len(rows)], logits, self.batch.wants
        read: Callable[[], list[int]] | None = self.rows.mailbox.reader(rows, self.batch.num_tokens[rows])
        if wants["everything"]:
            token_ids, read = self.sample_by_all_parameters(logits, rows, index), None
        elif wants["more than a temperature"] and self.sampler_graphs is not None:
            if wants["masks"]:  # written where the graph looks for logits; logprobs are those of the model
                of_model = logits.clone()
                logits.copy_(mask_and_bias(of_model, self.metadata_of(rows, index, 0, 0)))
            token_ids = self.sampler_graphs.run(len(rows), by_mass=bool(wants["a nucleus"]))
        self.batch.num_tokens[rows] += 1
        return self.launched(rows, of_model, token_ids, prompts, {}, read)

    def sample_behind_drafts(self, rows: np.ndarray, num_sampled: np.ndarray, hidden: Tensor, prompts: PromptLogprobs,
                             drafts: Mapping[str, list[int]]) -> AsyncOutput:
        """The same without a graph, and for rows that sample several tokens (B,), one behind each of their guesses."""
        # How far each sampled token is from its request's last: 0, or 2, 1, 0 behind two drafts.
        back = np.repeat(np.cumsum(num_sampled), num_sampled) - np.arange(num_sampled.sum()) - 1  # (R,)
        rows, offsets = np.repeat(rows, num_sampled), np.repeat(num_sampled, num_sampled) - 1 - back
        index, behind = upload(np.stack((rows, back)), self.rows.device)  # (R,) each, in one copy
        logits, wants = self.model.compute_logits(hidden), self.batch.wants  # (R, V)
        if not self.sampler_graphs or wants["everything"]:
            token_ids = self.sample_by_all_parameters(logits, rows, index, offsets, behind)
        else:
            some = mask_and_bias(logits, self.metadata_of(rows, index, offsets, behind)) if wants["masks"] else logits
            token_ids = self.sampler_graphs.sample(some, index, behind, by_mass=bool(wants["a nucleus"]))
        np.add.at(self.batch.num_tokens, rows, 1)  # `+=` would count a row that comes twice once
        return self.launched(rows, logits, token_ids, prompts, drafts)

    def sample_by_all_parameters(self, logits: Tensor, rows: np.ndarray, index: Tensor, offsets: np.ndarray | int = 0,
                                 back: Tensor | int = 0) -> Tensor:
        """A token (R,) for each of the logits (R, V), by all that their requests ask for; it becomes its row's newest.

        A row may come several times: its token then stands `offsets` behind the known ones, `back` before the step's last.
        """
        metadata = self.metadata_of(rows, index, offsets, back)
        token_ids = sample(logits, metadata)  # (R,)
        self.rows.token_ids[index, metadata.positions] = token_ids.int()
        return token_ids

    def launched(self, rows: np.ndarray, logits: Tensor, token_ids: Tensor, prompts: PromptLogprobs,
                 drafts: Mapping[str, list[int]], read: Callable[[], list[int]] | None = None) -> AsyncOutput:
        """Send each row's sampled token (R,) on its way to the host, unless `read` finds it there, and logprobs if asked for."""
        step = AsyncOutput(self.batch.names_of(rows), token_ids, prompts, drafts, read)  # now: rows may be others' when it arrives
        if not self.batch.wants["logprobs"]:
            return step
        wished = [self.batch.request(row).params.logprobs for row in rows.tolist()]
        if asked := {index: count for index, count in enumerate(wished) if count is not None}:
            chosen = upload(np.array(list(asked)), self.rows.device)
            most = WHOLE_VOCABULARY if WHOLE_VOCABULARY in asked.values() else max(asked.values())
            step.add_logprobs(compute_logprobs(logits[chosen], token_ids[chosen], most), asked)
        return step

    def metadata_of(self, rows: np.ndarray, index: Tensor, offsets: np.ndarray | int, back: Tensor | int) -> SamplingMetadata:
        """What the sampler must know of these rows. Built when the batch changes; else only positions and history move.

        A token's history is its row up to its own position, so that drafts before it count and those behind it do not.
        """
        requests = [self.batch.request(row) for row in rows.tolist()]
        key = [request.admission for request in requests]  # not names: an id may come back with other parameters
        known = self.batch.num_tokens[rows] + offsets  # where the new tokens will stand
        if key != self.key:  # somebody joined, left, or moved to another row
            self.key = key
            self.metadata = SamplingMetadata.from_requests(
                [RowParams(request.params, request.seed, int(position), request.num_prompt_tokens, (), request.eos_token_ids,
                           request.bad_words_token_ids) for request, position in zip(requests, known)],
                self.model.config.vocab_size, self.rows.device)
        history = self.rows.token_ids[index, : known.max()].long() if self.metadata.needs_history else None  # (R, L)
        self.metadata = self.metadata.advance(self.rows.positions[index].long() - back, history)
        return self.metadata
