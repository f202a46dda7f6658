"""Lesson 9. From a schedule to tokens: flat inputs, one forward pass for prefills and decodes together, a token where one is due.

Owns the device's tensors: the weights, the KV cache, the rows of the batch. Never reads a `Request` and never decides who
runs: it follows `SchedulerOutput` to the letter. Which token comes next is the `StepSampler`'s question.

    {"a": 1, "b": 3}  ->  input_ids (4,), positions (4,), slots (4,)  ->  hidden (4, E)  ->  logits (2, V)  ->  {"a": [7], "b": [2]}

`execute_model` launches a step and does not wait for it: the sampled tokens go from the sampler into the rows, where the next
step finds them, and to the host, which reads them when it asks for the result. Logits are computed only where a token is
sampled: the head of Qwen2.5-0.5B is 27 % of the model's arithmetic. vLLM: vllm/v1/worker/gpu/model_runner.py.

A step takes one of four ways, the first that fits: a decode graph (every request gets its next token), a verification graph (some
guess ahead), a prompt graph (few tokens), or kernel by kernel. All read the same rows and write the same slots:

    what changed in the rows    one upload, one kernel; new blocks are zeroed
    the step                    hidden states of the tokens that sample
    the head and a sampler      tokens, into the rows and to the host

    rows.positions[row] == batch.num_computed[row]      once a step is launched and its wrong guesses are taken back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.async_output import AsyncOutput
from minivllm.attention import AttentionMetadata, PagedAttention, allocate_kv_cache, by_block, slot_mapping
from minivllm.config import EngineConfig
from minivllm.cuda_graphs import IDLE_STREAMS, DecodeGraphs, NewBlocks
from minivllm.flex_attention import FlexPagedAttention
from minivllm.input_batch import InputBatch, RowTensors, StepInputs
from minivllm.logprobs import step_prompt_logprobs
from minivllm.model import Qwen2ForCausalLM
from minivllm.prompt_graphs import PromptGraphs, ungraphed_metadata
from minivllm.sampling_metadata import encode_bad_words
from minivllm.scheduler_output import Rewind, SchedulerOutput
from minivllm.standing_attention import StandingAttention
from minivllm.step_sampler import StepSampler
from minivllm.transfers import upload
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
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # all steps are on it, whoever launches
        self.kv_cache = allocate_kv_cache(shape.num_hidden_layers, config.num_blocks, config.block_size,
                                          shape.num_key_value_heads, shape.head_dim, next(model.parameters()).dtype, device)
        attention = ATTENTION[config.attention_backend]
        self.kv_caches = [attention(layer, config.block_size) for layer in self.kv_cache]
        self.batch = InputBatch(config.max_num_seqs)
        self.rows = RowTensors(config.max_num_seqs, config.max_model_len, config.num_blocks, config.block_size, device)
        self.new_blocks = NewBlocks(by_block(self.kv_cache, config.block_size), self.rows)
        self.sampler = StepSampler(model, self.batch, self.rows)
        self.forward_model: Callable[..., Tensor] = model  # compiled by `warm_up`, where that is possible
        self.graphs: DecodeGraphs | None = None  # these three: after `warm_up`, with the compiled attention alone
        self.prompt_graphs: PromptGraphs | None = None
        self.verify_graphs: VerifyGraphs | None = None
        self.num_drafts, self.settled = num_drafts, set[int]()  # settled: the device has counted what these rows won last

    def execute_model(self, output: SchedulerOutput) -> AsyncOutput:
        """`launch` on the stream that has had all work before, in whatever thread this is."""
        with torch.cuda.stream(self.stream):
            return self.launch(output)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> AsyncOutput:
        """Compute the scheduled positions, write their KV, and sample for every request that has reached its newest token.

        Returns before anything is computed, where the device has a queue. What changes in the rows is written even if the step then
        fails on the host: the next one is told what has changed since.
        """
        prompts_asked, drafts = self.batch.wants["prompt_logprobs"], output.scheduled_spec_decode_tokens
        with self.rows.flushed():
            self.update_rows(output)
            if not output.num_scheduled_tokens:
                return AsyncOutput()  # rows have changed, and nothing is computed
            inputs = self.batch.prepare(output)
            graphs = self.graphs if inputs.is_decode and not prompts_asked else None
            verifies = graphs is None and self.verify_graphs is not None and self.verify_graphs.fits(inputs)
            if graphs is None and not verifies:  # those two move the rows on by themselves
                self.write_drafts(drafts)
                self.rows.write_positions(inputs.rows, inputs.seq_lens)
        self.new_blocks.run()
        if graphs is not None:
            return self.sampler.drawn(inputs.rows, *graphs.run(inputs.rows), {})
        if verifies:
            return self.verify(inputs, drafts)
        if not prompts_asked:
            return self.sampler.sample(inputs, self.forward(inputs), {}, drafts)
        hidden = self.forward_all(inputs)
        prompts = step_prompt_logprobs(self.batch, self.rows, inputs, hidden, self.model.compute_logits)
        return self.sampler.sample(inputs, hidden[upload(inputs.sampling_tokens, self.device)], prompts, drafts)

    @torch.inference_mode()
    def warm_up(self, wait_for: Callable[[str], None] = lambda _: None) -> float:
        """Compile and capture before the first request comes. Only the null block is written, and nothing is counted.

        `wait_for` waits for a part that another process compiles (compile_ahead.py). Returns the seconds that capturing took.
        """
        if not self.uses_flex or (self.config.enforce_eager and self.device.type == "cuda"):
            return 0.0
        from minivllm.warm_up import warm_up

        return warm_up(self, wait_for)

    def verify(self, inputs: StepInputs, drafts: Mapping[str, list[int]]) -> AsyncOutput:
        """A step in which every request decodes, and some have guesses to be verified."""
        graphs = self.verify_graphs
        assert graphs is not None, "it has said that the step fits"
        requests = [self.batch.request(row) for row in inputs.rows.tolist()]
        hidden, runs = graphs.verify(inputs, [drafts.get(request.request_id, ()) for request in requests])
        if not self.batch.wants["more than a temperature"] and all(request.params.logprobs is None for request in requests):
            self.batch.num_tokens[inputs.rows] += 1 + inputs.num_drafts
            self.settled = set(inputs.rows.tolist())
            return AcceptedRuns([request.request_id for request in requests], runs)
        with self.rows.flushed():
            self.write_drafts(drafts)  # rows hold what was plainly sampled, and count it
            self.rows.write_positions(inputs.rows, inputs.seq_lens)
        return self.sampler.sample(inputs, graphs.in_order(hidden, inputs), {}, drafts)

    def update_rows(self, output: SchedulerOutput) -> None:
        """Apply the differences since the last step, and zero the blocks that are new.

        The order matters: a row that was left in this step may be given away in it, and a rewound row has lost blocks before it
        gets new ones. Dropping a row that is not there does nothing, because a step that failed is told again.
        """
        self.new_blocks.forget()
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
            # The blocks before num_computed_tokens are prefix hits: they hold what others have computed.
            hits = [new.num_computed_tokens // self.block_size for new in output.new_requests] + [0] * len(output.new_block_ids)
            new_blocks = np.array([block for table, num_hits in zip(tables, hits) for block in table[num_hits:]], dtype=np.int64)
            if len(new_blocks):
                self.new_blocks.zero(new_blocks)

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
                self.rows.write_positions(np.array(rows), np.array(starts))
        self.settled = set()

    def forward(self, inputs: StepInputs) -> Tensor | None:
        """One pass over T tokens, to the hidden states (R, E) of those that sample.

        None if a graph has left them where the head looks for them, which it does for one token of each request: with guesses there
        may be more of them than the head has room for.
        """
        graphs = self.prompt_graphs
        if graphs is None or (size := graphs.bucket_for(inputs)) is None:
            return self.forward_ungraphed(inputs, upload(inputs.sampling_tokens, self.device))
        hidden = graphs.run(inputs, size)
        return hidden[upload(inputs.sampling_tokens, self.device)] if inputs.num_drafts.any() else None

    def forward_all(self, inputs: StepInputs) -> Tensor:
        """The same, to all hidden states (T, E)."""
        if self.prompt_graphs is not None and (size := self.prompt_graphs.bucket_for(inputs)) is not None:
            return self.prompt_graphs.run(inputs, size)
        return self.forward_ungraphed(inputs, None)

    def forward_ungraphed(self, inputs: StepInputs, wanted: Tensor | None) -> Tensor:
        """The same for a step of any shape: the hidden states of those `wanted` (R, E), or of all (T, E)."""
        token_rows, positions = self.upload(inputs.token_rows, inputs.positions)
        input_ids = self.rows.token_ids[token_rows, positions]  # (T,)
        slots = slot_mapping(self.rows.block_table, token_rows, positions, self.block_size)  # (T,)
        metadata = (self.paged_metadata(inputs, slots) if not self.uses_flex else
                    ungraphed_metadata(inputs, slots, self.rows, self.kv_caches[0], self.model.config, self.config.max_num_seqs))
        return self.forward_model(input_ids, positions, self.kv_caches, metadata, wanted)

    def paged_metadata(self, inputs: StepInputs, slots: Tensor) -> AttentionMetadata:
        """What the readable attention has to know of a step: of the host what it makes shapes of, of the device all else."""
        num_blocks = -(-int(inputs.seq_lens.max()) // self.block_size)  # of the longest request: no wider table is read
        rows, seq_lens, starts = self.upload(inputs.rows, inputs.seq_lens, np.concatenate(([0], np.cumsum(inputs.query_lens))))
        return AttentionMetadata(starts.int(), seq_lens.int(), self.rows.block_table[rows, :num_blocks], slots, inputs.num_decodes,
                                 inputs.query_lens.tolist(), inputs.seq_lens.tolist(),
                                 [self.batch.request(row).admission for row in inputs.rows])

    def upload(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Flat arrays of integers as int64, in one copy."""
        return upload(np.concatenate(arrays), self.device).split([len(array) for array in arrays])

    def close(self) -> None:
        """Let go of weights and KV, and hand cached GPU memory back to the device. A step that nobody waits for may still run."""
        if self.stream is not None:
            self.stream.synchronize()  # or a kernel would go on in memory that belongs to somebody else
            IDLE_STREAMS.add(self.stream)  # for the next engine; a draft's is the target's, and comes twice
        vars(self).clear()  # weights, KV, rows and graphs: nobody asks a closed runner for anything
        torch.cuda.empty_cache()  # without CUDA it does nothing

