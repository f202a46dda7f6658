"""Lesson 9. From a schedule to tokens: flat inputs, one forward pass for prefills and decodes together, a token where one is due.

Owns the device's tensors: the weights, the KV cache, the rows of the batch. Never reads a `Request` and never decides who
runs: it follows `SchedulerOutput` to the letter.

    {"a": 1, "b": 3}  ->  input_ids (4,), positions (4,), slots (4,)  ->  hidden (4, E)  ->  logits (2, V)  ->  {"a": [7], "b": [2]}

`execute_model` launches a step and does not wait for it: the sampled tokens go from the sampler into the rows, where the next
step finds them, and to the host, which reads them when it asks for the result. Logits are computed only where a token is
sampled: the head of Qwen2.5-0.5B is 27 % of the model's arithmetic. vLLM: vllm/v1/worker/gpu/model_runner.py.

A step takes one of four ways, the first that fits: a decode graph (every request gets its next token), a verification graph (some
guess ahead), a prompt graph (few tokens), or kernel by kernel. All read the same rows and write the same slots.

    rows.positions[row] == batch.num_computed[row]      once a step is launched and its wrong guesses are taken back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.async_output import AsyncOutput, PromptLogprobs
from minivllm.attention import AttentionMetadata, PagedAttention, allocate_kv_cache, by_block, slot_mapping, zero_blocks
from minivllm.config import EngineConfig
from minivllm.cuda_graphs import DecodeGraphs
from minivllm.flex_attention import FlexPagedAttention
from minivllm.graph_sampler import SamplerGraphs
from minivllm.input_batch import InputBatch, RowTensors, StepInputs, upload
from minivllm.logprobs import WHOLE_VOCABULARY, compute_logprobs, prompt_logprobs
from minivllm.model import Qwen2ForCausalLM
from minivllm.prompt_graphs import PromptGraphs, ungraphed_metadata
from minivllm.sampler import mask_and_bias, sample
from minivllm.sampling_metadata import RowParams, SamplingMetadata, encode_bad_words
from minivllm.scheduler_output import Rewind, SchedulerOutput
from minivllm.standing_attention import StandingAttention
from minivllm.verify_graphs import AcceptedRuns, VerifyGraphs

ATTENTION = {"paged_gather": PagedAttention, "standing": StandingAttention, "flex_attention": FlexPagedAttention}


class ModelRunner:
    """Runs the model on one block table, and verifies up to `num_drafts` guesses a request. A second one on the same table is a
    draft model (lesson 12).
    """

    def __init__(self, model: Qwen2ForCausalLM, config: EngineConfig, device: torch.device, tokenizer: Any | None = None,
                 num_drafts: int = 0) -> None:
        assert config.num_blocks and config.block_size and config.max_model_len, "a started engine has decided its sizes"
        shape = model.config
        self.model = model
        self.config = config
        self.device = device
        self.block_size = config.block_size
        self.tokenizer = tokenizer  # for bad words alone, which are written as text
        self.uses_flex = config.attention_backend == "flex_attention"
        dtype = next(model.parameters()).dtype
        self.kv_cache = allocate_kv_cache(shape.num_hidden_layers, config.num_blocks, config.block_size,
                                          shape.num_key_value_heads, shape.head_dim, dtype, device)
        # One tensor for all layers, so that new blocks are zeroed by one kernel; each layer gets a view of it.
        self.blocks = by_block(self.kv_cache, config.block_size)
        attention = ATTENTION[config.attention_backend]
        self.kv_caches = [attention(layer, config.block_size) for layer in self.kv_cache]
        self.batch = InputBatch(config.max_num_seqs)
        self.rows = RowTensors(config.max_num_seqs, config.max_model_len, config.num_blocks, config.block_size, device)
        self.sampling_key: list[int] = []  # whom `metadata` is about
        self.metadata: SamplingMetadata
        self.forward_model: Callable[..., Tensor] = model  # this and the next one: compiled by `warm_up`, where that is possible
        self.zero_blocks: Callable[..., None] = zero_blocks
        self.graphs: DecodeGraphs | None = None  # these four: after `warm_up`, with the compiled attention alone
        self.sampler_graphs: SamplerGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self.verify_graphs: VerifyGraphs | None = None
        self.num_drafts, self.settled = num_drafts, set[int]()  # settled: the device has counted what these rows won last

    @torch.inference_mode()
    def execute_model(self, output: SchedulerOutput) -> AsyncOutput:
        """Compute the scheduled positions, write their KV, and sample for every request that has reached its newest token."""
        self.update_rows(output)
        if not output.num_scheduled_tokens:
            return AsyncOutput()  # rows have changed, and nothing is computed
        inputs, drafts = self.batch.prepare(output), output.scheduled_spec_decode_tokens
        if self.graphs is not None and inputs.is_decode and not self.batch.wants["prompt_logprobs"]:
            return self.run_graph(inputs, self.graphs)
        if self.verify_graphs is not None and self.verify_graphs.fits(inputs):
            return self.verify(inputs, drafts, self.verify_graphs)
        self.write_drafts(drafts)
        wanted = upload(inputs.sampling_tokens, self.device)
        if not self.batch.wants["prompt_logprobs"]:
            return self.sample(inputs, self.forward(inputs, wanted), {}, drafts)
        hidden = self.forward(inputs)
        return self.sample(inputs, hidden[wanted], self.prompt_logprobs(inputs, hidden), drafts)

    @torch.inference_mode()
    def warm_up(self, wait_for: Callable[[str], None] = lambda _: None) -> float:
        """Compile and capture before the first request comes. Only the null block is written, and nothing is counted.

        `wait_for` waits for a part that another process compiles (compile_ahead.py). Returns the seconds that capturing took.
        """
        if not self.uses_flex or (self.config.enforce_eager and self.device.type == "cuda"):
            return 0.0
        from minivllm.warm_up import warm_up

        return warm_up(self, wait_for)

    def run_graph(self, inputs: StepInputs, graphs: DecodeGraphs) -> AsyncOutput:
        """A step in which every request gets its next token.

        The graph has drawn by temperature alone. Where somebody asks for more, all are drawn again behind it: by another graph, or
        by the whole sampler, some fifty kernels.
        """
        logits, token_ids = graphs.run(inputs.rows)
        index, of_model = graphs.index[: len(inputs.rows)], logits
        if self.batch.wants["everything"]:
            token_ids = self.sample_by_all_parameters(logits, inputs.rows, index)
        elif self.batch.wants["more than a temperature"] and self.sampler_graphs is not None:
            if self.batch.wants["masks"]:  # written where the graph looks for logits; logprobs are those of the model
                of_model = logits.clone()
                logits.copy_(mask_and_bias(of_model, self.sampling_metadata(inputs.rows, index, 0, 0)))
            token_ids = self.sampler_graphs.run(len(inputs.rows), by_mass=bool(self.batch.wants["a nucleus"]))
        return self.launched(inputs.rows, of_model, token_ids, {}, {})

    def verify(self, inputs: StepInputs, drafts: Mapping[str, list[int]], graphs: VerifyGraphs) -> AsyncOutput:
        """The same where some have guesses to be verified."""
        requests = [self.batch.request(row) for row in inputs.rows.tolist()]
        hidden, runs = graphs.verify(inputs, [drafts.get(request.request_id, ()) for request in requests])
        if not self.batch.wants["more than a temperature"] and all(request.params.logprobs is None for request in requests):
            self.batch.num_tokens[inputs.rows] += 1 + inputs.num_drafts
            self.settled = set(inputs.rows.tolist())
            return AcceptedRuns([request.request_id for request in requests], runs)
        self.write_drafts(drafts)  # rows hold what was plainly sampled, and count it
        self.set_positions(inputs.rows, inputs.seq_lens)
        return self.sample(inputs, graphs.in_order(hidden, inputs), {}, drafts)

    def update_rows(self, output: SchedulerOutput) -> None:
        """Apply the differences since the last step, and zero the blocks that are new.

        The order matters: a row that was left in this step may be given away in it, and a rewound row has lost blocks before it
        gets new ones. Dropping a row that is not there does nothing, because a step that failed is told again.
        """
        for request_id in (*output.finished_request_ids, *output.preempted_request_ids):
            self.batch.remove(request_id)
        self.rewind(output.rewound_requests)
        new_rows = [self.batch.add(new, encode_bad_words(self.tokenizer, new.sampling_params.bad_words or ()))
                    for new in output.new_requests]
        if new_rows:
            self.rows.start_rows(new_rows, output.new_requests)
            self.rows.write_tokens(new_rows, [0] * len(new_rows), [new.token_ids for new in output.new_requests])
        tables = [new.block_ids for new in output.new_requests] + list(output.new_block_ids.values())
        if tables:
            rows = new_rows + [self.batch.row_of[request_id] for request_id in output.new_block_ids]
            self.rows.write_blocks(rows, self.batch.num_blocks[rows].tolist(), tables)
            self.batch.num_blocks[rows] += [len(table) for table in tables]
            # A block is zeroed for its new owner: attention may read all of it before all of it is written (0 * NaN is NaN).
            # The blocks before num_computed_tokens are prefix hits: they hold what others have computed.
            hits = [new.num_computed_tokens // self.block_size for new in output.new_requests] + [0] * len(output.new_block_ids)
            new_blocks = np.array([block for table, num_hits in zip(tables, hits) for block in table[num_hits:]], dtype=np.int64)
            if len(new_blocks):  # a single one comes twice, and needs no kernel of its own
                self.zero_blocks(self.blocks, upload(np.resize(new_blocks, max(2, len(new_blocks))), self.device))

    def write_drafts(self, drafts: Mapping[str, list[int]]) -> None:
        """Put guesses into their rows, behind the known tokens: they stand there like tokens, until `rewind`."""
        if drafts:
            rows = [self.batch.row_of[request_id] for request_id in drafts]
            self.rows.write_tokens(rows, self.batch.num_tokens[rows].tolist(), list(drafts.values()))

    def rewind(self, rewound: Mapping[str, Rewind]) -> None:
        """Take rows back to what is true of them. The row counts all its drafts as accepted until it is told otherwise."""
        known = {self.batch.row_of[request_id]: rewind for request_id, rewind in rewound.items() if request_id in self.batch.row_of}
        if known:
            rows, starts = list(known), [rewind.num_computed_tokens for rewind in known.values()]
            token_ids = [rewind.token_ids for rewind in known.values()]
            self.batch.rewind(rows, starts, [start + len(tokens) for start, tokens in zip(starts, token_ids)], self.block_size)
            if not self.settled.issuperset(rows):
                self.rows.write_tokens(rows, starts, token_ids)
                self.set_positions(np.array(rows), np.array(starts))
        self.settled = set()

    def set_positions(self, rows: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Say which position each row computes next; returns both arrays on the device."""
        index, known = self.upload(rows, positions)
        self.rows.positions[index] = known.int()
        return index, known

    def forward(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        """One pass over T tokens of B requests, to the hidden states of those `wanted` (R, E), or of all (T, E)."""
        rows, seq_lens = self.set_positions(inputs.rows, inputs.seq_lens)
        if self.prompt_graphs is not None and (size := self.prompt_graphs.bucket_for(inputs)) is not None:
            return self.prompt_graphs.run(inputs, size)[slice(None) if wanted is None else wanted]
        return self.forward_ungraphed(inputs, rows, seq_lens, wanted)

    def forward_ungraphed(self, inputs: StepInputs, rows: Tensor, seq_lens: Tensor, wanted: Tensor | None) -> Tensor:
        """The same for a step of any shape."""
        token_rows, positions = self.upload(inputs.token_rows, inputs.positions)
        input_ids = self.rows.token_ids[token_rows, positions]  # (T,)
        slots = slot_mapping(self.rows.block_table, token_rows, positions, self.block_size)  # (T,)
        metadata = (self.paged_metadata(inputs, rows, seq_lens, slots) if not self.uses_flex else
                    ungraphed_metadata(inputs, slots, self.rows, self.kv_caches[0], self.model.config, self.config.max_num_seqs))
        return self.forward_model(input_ids, positions, self.kv_caches, metadata, wanted)

    def paged_metadata(self, inputs: StepInputs, rows: Tensor, seq_lens: Tensor, slots: Tensor) -> AttentionMetadata:
        """What the readable attention has to know of a step."""
        num_blocks = -(-int(inputs.seq_lens.max()) // self.block_size)  # of the longest request: no wider table is read
        (starts,) = self.upload(np.concatenate(([0], np.cumsum(inputs.query_lens))))
        return AttentionMetadata(starts.int(), seq_lens.int(), self.rows.block_table[rows, :num_blocks], slots, inputs.num_decodes,
                                 inputs.query_lens.tolist(), inputs.seq_lens.tolist(),
                                 [self.batch.request(row).admission for row in inputs.rows])

    def sample(self, inputs: StepInputs, hidden: Tensor, prompts: PromptLogprobs, drafts: Mapping[str, list[int]]) -> AsyncOutput:
        """One token for every request that this step has brought to its newest one, and one behind each draft: hidden is (R, E)."""
        rows, num_sampled = inputs.rows[inputs.samples], 1 + inputs.num_drafts[inputs.samples]
        if len(rows) == 0:
            return AsyncOutput(prompt_logprobs=prompts)
        # How far each sampled token is from its request's last: 0, or 2, 1, 0 behind two drafts.
        back = np.repeat(np.cumsum(num_sampled), num_sampled) - np.arange(num_sampled.sum()) - 1  # (R,)
        rows, offsets = np.repeat(rows, num_sampled), np.repeat(num_sampled, num_sampled) - 1 - back
        index, behind = self.upload(rows, back)  # (R,) each, in one copy
        logits, wants = self.model.compute_logits(hidden), self.batch.wants  # (R, V)
        if not self.graphs or not self.sampler_graphs or wants["everything"]:
            token_ids = self.sample_by_all_parameters(logits, rows, index, offsets, behind)
        elif wants["more than a temperature"] or back.any():
            some = mask_and_bias(logits, self.sampling_metadata(rows, index, offsets, behind)) if wants["masks"] else logits
            token_ids = self.sampler_graphs.sample(some, index, behind, by_mass=bool(wants["a nucleus"]))
        else:  # good for one token a row: behind drafts a row has several, each at a place of its own
            token_ids = self.graphs.sample(logits, index)
        return self.launched(rows, logits, token_ids, prompts, drafts)

    def sample_by_all_parameters(self, logits: Tensor, rows: np.ndarray, index: Tensor, offsets: np.ndarray | int = 0,
                                 back: Tensor | int = 0) -> Tensor:
        """A token (R,) for each of the logits (R, V), by all that their requests ask for; it becomes its row's newest.

        A row may come several times: its token then stands `offsets` behind the known ones, `back` before the step's last.
        """
        metadata = self.sampling_metadata(rows, index, offsets, back)
        token_ids = sample(logits, metadata)  # (R,)
        self.rows.token_ids[index, metadata.positions] = token_ids.int()
        return token_ids

    def launched(self, rows: np.ndarray, logits: Tensor, token_ids: Tensor, prompts: PromptLogprobs,
                 drafts: Mapping[str, list[int]]) -> AsyncOutput:
        """Count each row's sampled token (R,), and send it on its way to the host."""
        np.add.at(self.batch.num_tokens, rows, 1)  # `+=` would count a row that comes twice once
        requests = [self.batch.request(row) for row in rows.tolist()]  # now: rows may belong to others when the tokens arrive
        step = AsyncOutput([request.request_id for request in requests], token_ids, prompts, drafts)
        asked = {index: request.params.logprobs for index, request in enumerate(requests) if request.params.logprobs is not None}
        if asked:
            (chosen,) = self.upload(np.array(list(asked)))
            most = WHOLE_VOCABULARY if WHOLE_VOCABULARY in asked.values() else max(asked.values())
            step.add_logprobs(compute_logprobs(logits[chosen], token_ids[chosen], most), asked)
        return step

    def sampling_metadata(self, rows: np.ndarray, index: Tensor, offsets: np.ndarray | int, back: Tensor | int) -> SamplingMetadata:
        """What the sampler must know of these rows. Built when the batch changes; else only positions and history move.

        A token's history is its row up to its own position, so that drafts before it count and those behind it do not.
        """
        requests = [self.batch.request(row) for row in rows.tolist()]
        key = [request.admission for request in requests]  # not names: an id may come back with other parameters
        known = self.batch.num_tokens[rows] + offsets  # where the new tokens will stand
        if key != self.sampling_key:  # somebody joined, left, or moved to another row
            self.sampling_key = key
            self.metadata = SamplingMetadata.from_requests(
                [RowParams(request.params, request.seed, int(position), request.num_prompt_tokens, (), request.eos_token_ids,
                           request.bad_words_token_ids) for request, position in zip(requests, known)],
                self.model.config.vocab_size, self.device)
        history = self.rows.token_ids[index, : known.max()].long() if self.metadata.needs_history else None  # (R, L)
        self.metadata = self.metadata.advance(self.rows.positions[index].long() - back, history)
        return self.metadata

    def prompt_logprobs(self, inputs: StepInputs, hidden: Tensor) -> PromptLogprobs:
        """For requests that asked: logprobs of the prompt tokens that this step's positions predict. Waits for the device."""
        found: PromptLogprobs = {}
        starts = np.cumsum(inputs.query_lens) - inputs.query_lens
        for index, row in enumerate(inputs.rows):
            request = self.batch.request(row)
            end = min(int(inputs.seq_lens[index]), request.num_prompt_tokens - 1)  # the prompt's last position predicts output
            first = int(inputs.seq_lens[index] - inputs.query_lens[index])
            if request.params.prompt_logprobs is None or first >= end:
                continue  # did not ask, or is past its prompt
            states = hidden[starts[index] : starts[index] + end - first]  # (end - first, E)
            following = self.rows.token_ids[row, first + 1 : end + 1].long()  # (end - first,) what came there
            entries = prompt_logprobs(states, following, self.model.compute_logits, request.params.prompt_logprobs)
            found[request.request_id] = (first + 1, list(entries))
        return found

    def upload(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Flat arrays of integers as int64, in one copy."""
        return upload(np.concatenate(arrays), self.device).split([len(array) for array in arrays])

    def close(self) -> None:
        """Let go of weights and KV, and hand cached GPU memory back to the device. A step that nobody waits for may still run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or a kernel would go on in memory that belongs to somebody else
        vars(self).clear()  # weights, KV, rows and graphs: nobody asks a closed runner for anything
        torch.cuda.empty_cache()  # without CUDA it does nothing

