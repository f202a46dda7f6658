"""Lesson 14. Who gets how much of a GPU: one step is made before there is a KV cache, and the cache gets what that leaves.

Owns the sum, and the step that belongs to nobody. The engine may fill `gpu_memory_utilization` of the whole:

    KV cache = utilization x total - in use - a step's activations - CUDA graphs

In use is whatever the device says: the weights, which are loaded by then, CUDA itself, other processes. Not in the sum, and left
to the share that the engine may not fill: the copies of the readable attention, fragments, what the driver keeps for each graph.
vLLM: determine_available_memory in vllm/v1/worker/gpu_worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from minivllm.config import EngineConfig
from minivllm.cuda_graphs import bucket_sizes
from minivllm.model import Qwen2ForCausalLM
from minivllm.prompt_graphs import token_buckets
from minivllm.sampler import sample
from minivllm.sampling_metadata import RowParams, SamplingMetadata
from minivllm.sampling_params import SamplingParams

GIB = 2**30
SAMPLER_COPIES = 2 * 3  # of a bucket's logits in float32: counts, penalized, cut off, in each of the samplers' two pools


@dataclass(frozen=True)
class MemorySum:
    """The bytes of a GPU, and what they are for."""

    total: int
    usable: int  # gpu_memory_utilization of them
    weights: int
    others: int  # other processes, other engines in this one, CUDA itself
    activations: int
    graphs: int

    @property
    def for_kv(self) -> int:
        return bytes_for_kv(self.usable, self.weights + self.others, self.activations, self.graphs)

    def describe(self, kv_bytes: int) -> str:
        """The sum in GiB. Where the cache takes less than it could, because requests can't fill more, the rest is `unused`."""
        parts = {"weights": self.weights, "others": self.others, "a step's activations": self.activations,
                 "CUDA graphs": self.graphs, "KV cache": kv_bytes}
        unused = self.usable - sum(parts.values())
        parts |= {"unused": unused} if unused >= GIB / 20 else {}
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return f"{self.total / GIB:.1f} GiB x {self.usable / self.total:.4g} = {self.usable / GIB:.1f}: {listed}"


def bytes_for_kv(usable: int, in_use: int, activations: int, graphs: int) -> int:
    """What is left for the KV cache, and never less than nothing."""
    return max(0, usable - in_use - activations - graphs)


class NoAttention:
    """Attention that keeps nothing and looks at nothing, for a step without a KV cache."""

    def write(self, k: Tensor, v: Tensor, slot_mapping: Any) -> None:
        """Forget k and v."""

    def write_heads(self, heads: Tensor, slot_mapping: Any) -> None:
        """Forget all heads."""

    def write_halves(self, first: Tensor, second: Tensor, slot_mapping: Any) -> None:
        """Forget both halves."""

    def attend(self, q: Tensor, metadata: Any) -> Tensor:
        return q


@torch.inference_mode()
def dummy_step(model: Qwen2ForCausalLM, num_tokens: int, num_rows: int, max_model_len: int, device: torch.device) -> None:
    """Compute tokens that belong to nobody and sample for the first `num_rows` of them. Leaves nothing behind.

    Every other row is greedy; the others draw with a top_p alone, which puts the whole vocabulary in order and is the dearest
    thing to ask of the sampler.
    """
    positions = torch.arange(num_tokens, device=device) % max_model_len
    caches = [NoAttention() for _ in model.model.layers]
    hidden = model(torch.zeros_like(positions), positions, caches, SimpleNamespace(slot_mapping=None))  # (T, E)
    if num_rows := min(num_rows, num_tokens):
        rows = [RowParams(SamplingParams(temperature=index % 2, top_p=0.9), index, 0) for index in range(num_rows)]
        metadata = SamplingMetadata.from_requests(rows, model.config.vocab_size, device)
        sample(model.compute_logits(hidden[:num_rows]), metadata)


def peak_bytes(model: Qwen2ForCausalLM, num_tokens: int, num_rows: int, max_model_len: int, device: torch.device) -> int:
    """Bytes that such a step takes while it runs. What it leaves allocated, a library's workspace, is in use from now on."""
    torch.cuda.reset_peak_memory_stats(device)
    dummy_step(model, num_tokens, num_rows, max_model_len, device)
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    return peak


def graph_output_bytes(max_num_seqs: int, prompt_buckets: list[int], vocab_size: int, hidden_size: int, itemsize: int) -> int:
    """The results of CUDA graphs, which stay where they are: logits of every decode bucket, hidden states of every prompt bucket.

    256 requests of Qwen2.5-0.5B in bfloat16: 1,949 rows x 151,936 logits and 39,776 tokens x 896, 2 bytes each: 664 MB.
    """
    return (sum(bucket_sizes(max_num_seqs)) * vocab_size + sum(prompt_buckets) * hidden_size) * itemsize


def graph_bytes(model: Qwen2ForCausalLM, num_seqs: int, num_drafts: int, budget: int, max_model_len: int,
                device: torch.device) -> int:
    """What the graphs of one model keep: decodes, samplers, prompts and verifications have a pool of graph memory each, where
    buckets share their activations. Each pool takes its largest bucket's, beside all results.
    """
    shape, parameters = model.config, list(model.parameters())
    itemsize, buckets = parameters[0].itemsize, token_buckets(budget, sum(parameter.numel() for parameter in parameters))
    total = graph_output_bytes(num_seqs, buckets, shape.vocab_size, shape.hidden_size, itemsize)
    total += (SAMPLER_COPIES * 4 + itemsize) * num_seqs * shape.vocab_size  # and logits of the head behind other steps
    pools = [num_seqs, *buckets[-1:]]
    if num_drafts:  # hidden states stay, and logits are gone when the next bucket is computed
        num_queries = num_seqs * (1 + num_drafts)
        total += sum(bucket_sizes(num_seqs)) * (1 + num_drafts) * shape.hidden_size * itemsize
        total += num_queries * shape.vocab_size * itemsize
        pools.append(num_queries)
    return total + sum(peak_bytes(model, size, 0, max_model_len, device) for size in pools)


def measure_memory(model: Qwen2ForCausalLM, config: EngineConfig, backend: str, max_model_len: int, budget: int,
                   device: torch.device, draft: Qwen2ForCausalLM | None = None, num_drafts: int = 0) -> MemorySum:
    """The sum of a GPU that holds the weights and nothing else of this engine. A profile run: one step of the largest size, in
    which every request samples behind `num_drafts` guesses too, and one of the draft model.

    The rows of requests (`RowTensors`: 4 bytes a token) count as activations.
    """
    models, num_seqs, graphs = [(model, num_drafts), *([(draft, 0)] if draft else [])], config.max_num_seqs, 0
    step = max(peak_bytes(one, budget, num_seqs * (1 + guesses), max_model_len, device) for one, guesses in models)
    step += len(models) * 4 * (num_seqs + 1) * max_model_len
    if backend == "flex_attention" and not config.enforce_eager:
        graphs = sum(graph_bytes(one, num_seqs, guesses, budget, max_model_len, device) for one, guesses in models)
    weights = sum(parameter.numel() * parameter.itemsize for one, _ in models for parameter in one.parameters())
    free, total = torch.cuda.mem_get_info(device)
    usable = int(config.gpu_memory_utilization * total)
    return MemorySum(total, usable, weights, total - free - weights, step, graphs)
