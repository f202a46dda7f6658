"""Lesson 9. From a schedule to tokens: flat inputs, one forward pass for prefills and decodes together, a token where one is due.

Owns the device's tensors: the weights, one K and one V tensor per layer, the inputs of a step. Never reads a `Request` and
never decides who runs: it follows `SchedulerOutput` to the letter.

    {"a": 1, "b": 3}  ->  input_ids (4,), positions (4,), slots (4,)  ->  hidden (4, E)  ->  logits (2, V)  ->  {"a": [7], "b": [2]}

Logits are computed only where a token is sampled: the head of Qwen2.5-0.5B is 27 % of the model's arithmetic. vLLM:
vllm/v1/worker/gpu/model_runner.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import AttentionMetadata, PagedAttention, slot_mapping
from minivllm.config import EngineConfig
from minivllm.cuda_graphs import DecodeGraphs, compile_layers
from minivllm.flex_attention import FlexPagedAttention
from minivllm.input_batch import InputBatch, StepInputs
from minivllm.logprobs import WHOLE_VOCABULARY, compute_logprobs, prompt_logprobs, to_dicts
from minivllm.model import Qwen2ForCausalLM
from minivllm.request import Logprob
from minivllm.sampler import sample
from minivllm.sampling_metadata import RowParams, SamplingMetadata, encode_bad_words
from minivllm.scheduler_output import ModelOutput, SchedulerOutput


class ModelRunner:
    """Runs the model on one block table. A second one on the same table is how a draft model will join (lesson 12)."""

    def __init__(self, model: Qwen2ForCausalLM, config: EngineConfig, device: torch.device, tokenizer: Any | None = None) -> None:
        assert config.num_blocks and config.block_size and config.max_model_len, "a started engine has decided its sizes"
        shape = model.config
        self.model = model
        self.device = device
        self.block_size = config.block_size
        self.tokenizer = tokenizer
        dtype = next(model.parameters()).dtype
        self.config = config
        attention = FlexPagedAttention if config.attention_backend == "flex_attention" else PagedAttention
        self.kv_caches = [
            attention(config.num_blocks, config.block_size, shape.num_key_value_heads, shape.head_dim, dtype, device)
            for _ in range(shape.num_hidden_layers)
        ]
        self.batch = InputBatch(config.max_num_seqs, config.max_model_len, config.block_size)
        self.sampling_key: list[int] = []  # whom `metadata` is about
        self.metadata: SamplingMetadata
        self.graphs: DecodeGraphs | None = None
        self.graph_key: list[int] = []

    @torch.inference_mode()
    def execute_model(self, output: SchedulerOutput) -> ModelOutput:
        """Compute the scheduled positions, write their KV, and sample for every request that has reached its newest token."""
        self.update_rows(output)
        if not output.num_scheduled_tokens:
            return ModelOutput()
        inputs = self.batch.prepare(output)
        if self.graphs is not None and inputs.samples.all() and not self.batch.wants_prompt_logprobs and inputs.is_decode:
            return self.run_graph(inputs, self.graphs)
        hidden = self.forward(inputs)
        result = ModelOutput(prompt_logprobs=self.prompt_logprobs(inputs, hidden))
        self.sample(inputs, hidden, result)
        return result

    def warm_up(self) -> None:
        """Compile and capture before the first request comes. Only the null block is written, and nothing is counted."""
        if self.config.attention_backend == "flex_attention" and not self.config.enforce_eager:
            with torch.inference_mode():
                compile_layers(self.model)
                self.graphs = DecodeGraphs(self.model, self.kv_caches, self.config.max_num_seqs, self.batch.block_table.shape[1])
                self.graphs.capture()

    def run_graph(self, inputs: StepInputs, graphs: DecodeGraphs) -> ModelOutput:
        """A step in which every request gets its next token. What the graph does not know of sampling is done after it."""
        rows = inputs.rows
        metadata = self.sampling_metadata(rows)
        if self.graph_key != self.sampling_key:
            self.graph_key = self.sampling_key
            graphs.set_sampling(metadata)
        num_blocks = -(-int(inputs.seq_lens.max()) // self.block_size)
        logits, token_ids = graphs.run(inputs.token_ids, inputs.positions, self.batch.block_table[rows, :num_blocks])
        result = ModelOutput()
        self.take(rows, logits, token_ids if metadata.is_plain else sample(logits, metadata), result)
        return result

    def update_rows(self, output: SchedulerOutput) -> None:
        """Apply the differences since the last step, and zero the blocks that are new."""
        for request_id in (*output.finished_request_ids, *output.preempted_request_ids):
            self.batch.remove(request_id)
        new_blocks: list[int] = []
        for new in output.new_requests:
            self.batch.add(new, encode_bad_words(self.tokenizer, new.sampling_params.bad_words or ()))
            new_blocks += new.block_ids[new.num_computed_tokens // self.block_size:]  # what lies before are prefix hits
        for request_id, block_ids in output.new_block_ids.items():
            self.batch.append_blocks(request_id, block_ids)
            new_blocks += block_ids
        if new_blocks:
            for cache in self.kv_caches:
                cache.zero_blocks(new_blocks)

    def forward(self, inputs: StepInputs) -> Tensor:
        """One pass over T tokens of B requests; returns hidden states (T, E)."""
        num_blocks = -(-int(inputs.seq_lens.max()) // self.block_size)
        block_table = self.to_device(self.batch.block_table[inputs.rows, :num_blocks])  # (B, blocks in use)
        positions = self.to_device(inputs.positions)  # (T,)
        metadata = AttentionMetadata(
            query_start_loc=self.to_device(np.concatenate(([0], np.cumsum(inputs.query_lens))).astype(np.int32)),
            seq_lens=self.to_device(inputs.seq_lens.astype(np.int32)),
            block_table=block_table,
            slot_mapping=slot_mapping(block_table, self.to_device(inputs.token_rows), positions, self.block_size),
            num_decodes=inputs.num_decodes,
            host_query_lens=inputs.query_lens.tolist(),
            host_seq_lens=inputs.seq_lens.tolist(),
        )
        return self.model(self.to_device(inputs.token_ids), positions, self.kv_caches, metadata)

    def sample(self, inputs: StepInputs, hidden: Tensor, result: ModelOutput) -> None:
        """One token for every request that this step has brought to its newest one; others are still in their prompt."""
        rows = inputs.rows[inputs.samples]
        if len(rows) == 0:
            return
        last = (np.cumsum(inputs.query_lens) - 1)[inputs.samples]  # each request's last row in the flat batch
        logits = self.model.compute_logits(hidden[self.to_device(last)])  # (R, V)
        self.take(rows, logits, sample(logits, self.sampling_metadata(rows)), result)

    def take(self, rows: np.ndarray, logits: Tensor, token_ids: Tensor, result: ModelOutput) -> None:
        """Append each row's sampled token (R,) and report it. The one place of a step where the host waits for the device."""
        self.take_logprobs(rows, logits, token_ids, result)
        sampled = token_ids.cpu().numpy()
        self.batch.append_tokens(rows, sampled)
        for row, token_id in zip(rows, sampled.tolist()):
            result.sampled_token_ids[self.batch.request(row).request_id] = [token_id]

    def sampling_metadata(self, rows: np.ndarray) -> SamplingMetadata:
        """What the sampler must know of these rows. Built when the batch changes; else only positions and history move."""
        requests = [self.batch.request(row) for row in rows]
        key = [request.admission for request in requests]
        positions = self.batch.num_tokens[rows]  # where the new tokens will stand
        if key != self.sampling_key:
            self.sampling_key = key
            self.metadata = SamplingMetadata.from_requests(
                [RowParams(request.params, request.seed, int(position), request.num_prompt_tokens, (), request.eos_token_ids,
                           request.bad_words_token_ids) for request, position in zip(requests, positions)],
                self.model.config.vocab_size, self.device)
        history = None
        if self.metadata.needs_history:
            history = self.to_device(self.batch.token_ids[rows, : positions.max()])  # (R, L)
        self.metadata = self.metadata.advance(self.to_device(positions), history)
        return self.metadata

    def take_logprobs(self, rows: np.ndarray, logits: Tensor, token_ids: Tensor, result: ModelOutput) -> None:
        """Logprobs of the sampled tokens, for the rows that asked."""
        requests = [self.batch.request(row) for row in rows]
        asked = {index: request.params.logprobs for index, request in enumerate(requests) if request.params.logprobs is not None}
        if asked:
            chosen = torch.tensor(list(asked), device=self.device)
            most = WHOLE_VOCABULARY if WHOLE_VOCABULARY in asked.values() else max(asked.values())
            entries = to_dicts(compute_logprobs(logits[chosen], token_ids[chosen], most), list(asked.values()))
            for index, entry in zip(asked, entries):
                result.logprobs[requests[index].request_id] = [entry]

    def prompt_logprobs(self, inputs: StepInputs, hidden: Tensor) -> dict[str, tuple[int, list[dict[int, Logprob]]]]:
        """For requests that asked: logprobs of the prompt tokens that this step's positions predict."""
        found: dict[str, tuple[int, list[dict[int, Logprob]]]] = {}
        if not self.batch.wants_prompt_logprobs:
            return found
        starts = np.cumsum(inputs.query_lens) - inputs.query_lens
        for index, row in enumerate(inputs.rows):
            request = self.batch.request(row)
            end = min(int(inputs.seq_lens[index]), request.num_prompt_tokens - 1)  # the prompt's last position predicts output
            first = int(inputs.seq_lens[index] - inputs.query_lens[index])
            if request.params.prompt_logprobs is None or first >= end:
                continue
            states = hidden[starts[index] : starts[index] + end - first]
            following = self.to_device(self.batch.token_ids[row, first + 1 : end + 1])
            entries = prompt_logprobs(states, following, self.model.compute_logits, request.params.prompt_logprobs)
            found[request.request_id] = (first + 1, list(entries))
        return found

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def close(self) -> None:
        """Let go of weights and KV, and hand cached GPU memory back to the device."""
        del self.model, self.kv_caches, self.graphs
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
