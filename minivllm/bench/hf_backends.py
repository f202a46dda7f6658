"""Hugging Face in its best fair form: `generate` on padded batches, and transformers' own continuous batching.

Owns what makes the comparison fair, because vLLM's own `--backend hf` is not (no mask, EOS may end a row early while the
asked length is counted). Here: left padding with its mask, no EOS, so every row gives exactly what is asked; sdpa; mixed
lengths sorted, so that a batch holds like with like; batch size swept and the best one reported. Only asked tokens count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from minivllm.bench.backends import Counters, ModelSpec, release_memory
from minivllm.bench.cost_floor import wait_for
from minivllm.bench.flags import BenchError
from minivllm.bench.workload import BenchRequest, Workload
from minivllm.config import ModelConfig
from minivllm.exceptions import ValidationError
from minivllm.threads import set_num_threads
from minivllm.weights import load_dummy_model, load_map

MOST_SIZES = 4  # in a sweep: the whole workload as one batch, a half, a quarter, an eighth
GREEDY_BELOW = 1e-5
NO_EOS = -1  # transformers' spelling in continuous batching; `generate` takes None


def load_hf_model(spec: ModelSpec) -> Any:
    """The model by transformers, in the same dtype; with dummy weights, with the very weights that minivllm draws.

    On a CPU it gets as many threads as minivllm takes for a model of its size, whoever of the two is loaded first.
    """
    if spec.is_dummy:
        config = AutoConfig.from_pretrained(spec.folder)
        with torch.device(spec.device):
            model = AutoModelForCausalLM.from_config(config, dtype=spec.dtype, attn_implementation="sdpa")
        _copy_dummy_weights(spec, model)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=spec.dtype, attn_implementation="sdpa").to(spec.device)
        except OSError as error:
            raise ValidationError(f"transformers cannot load it: {error}", parameter="model") from error
    set_num_threads(spec.device, sum(weight.numel() * weight.itemsize for weight in model.parameters()))
    model.generation_config = GenerationConfig()  # no sampling default of the checkpoint, no EOS
    wait_for(spec.device)  # continuous batching computes in a thread of its own, whose stream may be another one
    return model.eval().requires_grad_(False)


def _copy_dummy_weights(spec: ModelSpec, model: Any) -> None:
    """Equal weights make greedy outputs comparable token by token, which shows that both did the same work."""
    ours = load_dummy_model(ModelConfig.from_folder(spec.folder), spec.dtype, spec.device, spec.engine_kwargs.get("seed", 0))
    with torch.no_grad():
        for name, target in load_map(ours).items():
            model.get_parameter(name).copy_(target.view)


def sweep_sizes(spec: ModelSpec, num_requests: int) -> list[int]:
    """The batch sizes to try: those asked for, else the whole workload, its half, its quarter and its eighth."""
    if spec.hf_batch_sizes:
        return sorted({min(size, num_requests) for size in spec.hf_batch_sizes})
    return sorted({-(-num_requests // 2**halvings) for halvings in range(MOST_SIZES)})


def generation_config(workload: Workload, **fields: Any) -> GenerationConfig:
    """Greedy, or sampling by what the workload names: transformers' hidden top_k=50 is off, as in the other engines.

    Its way to say "off" is 0, and it divides by a temperature as it is: the tiny ones that overflow are greedy, as in vLLM.
    """
    if workload.temperature < GREEDY_BELOW:
        penalties = {name: value for name, value in workload.cuts.items() if name == "repetition_penalty"}
        return GenerationConfig(do_sample=False, **penalties, **fields)
    asked = {"temperature": workload.temperature, "top_p": 1.0, **workload.cuts, "top_k": max(0, workload.cuts.get("top_k", 0))}
    return GenerationConfig(do_sample=True, **asked, **fields)


class StaticBackend:
    """`model.generate` on one left-padded batch after the other."""

    name = "hf"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.model = load_hf_model(spec)
        self.batch_size = 1

    def sizes(self, workload: Workload) -> Sequence[int | None]:
        return sweep_sizes(self.spec, len(workload.requests))

    def prepare(self, workload: Workload, size: int | None) -> None:
        assert size is not None, "a static batch has a size"
        self.batch_size = size

    def generate(self, workload: Workload) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in workload.requests]
        for batch in static_batches(workload.requests, self.batch_size):
            rows = self._generate_batch([workload.requests[index] for index in batch], workload)
            for index, row in zip(batch, rows):
                outputs[index] = row
        return outputs

    def _generate_batch(self, batch: Sequence[BenchRequest], workload: Workload) -> list[list[int]]:
        """Every row runs as long as the longest answer, and what was not asked for is thrown away."""
        input_ids, mask = left_padded([request.prompt_token_ids for request in batch])
        longest = max(request.max_tokens for request in batch)
        config = generation_config(workload, min_new_tokens=longest, max_new_tokens=longest, pad_token_id=0,
                                   cache_implementation="static" if self.spec.hf_static_cache else None)
        device = self.spec.device
        try:
            with torch.inference_mode(mode=not self.spec.hf_static_cache):  # a compiled step cannot use inference tensors
                rows = self.model.generate(input_ids.to(device), attention_mask=mask.to(device), generation_config=config)
        except torch.OutOfMemoryError as error:
            release_memory()
            raise MemoryError(str(error)) from error
        new = rows[:, input_ids.shape[1]:].tolist()
        return [row[:request.max_tokens] for row, request in zip(new, batch)]

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        del self.model
        release_memory()


def static_batches(requests: Sequence[BenchRequest], size: int) -> Iterator[list[int]]:
    """Indices, batch by batch, sorted by answer and then by prompt: a batch takes as long as its longest answer."""
    order = sorted(range(len(requests)), key=lambda index: (requests[index].max_tokens, len(requests[index].prompt_token_ids)))
    for start in range(0, len(order), size):
        yield order[start:start + size]


def left_padded(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, longest prompt): the last token of every row stands in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class ContinuousBackend:
    """`model.generate_batch`'s manager (transformers >= 5): paged cache, continuous batching, each request its own length.

    The manager is used as generate_batch uses it, and directly only because that takes one length for all. It is made anew
    before each run, outside the clock: its prefix cache is empty then, and its warm-up is done. Its batch size is swept as
    well: with sdpa every query of a step meets the keys of all requests of the step, so more is not always faster.
    """

    name = "hf-continuous"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.model = load_hf_model(spec)
        self.manager: Any = None

    def sizes(self, workload: Workload) -> Sequence[int | None]:
        return sweep_sizes(self.spec, len(workload.requests))

    def prepare(self, workload: Workload, size: int | None) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self._stop()
        fields: dict[str, Any] = {"max_requests_per_batch": size}
        if self.spec.device.type == "cpu":  # there it cannot tell how much memory is free
            fields |= {"num_blocks": blocks_for(workload.requests), "max_batch_tokens": 2048}
        config = generation_config(workload, eos_token_id=NO_EOS)
        self.manager = self.model.init_continuous_batching(config, ContinuousBatchingConfig(**fields))
        self.manager.warmup()
        self.manager.start()

    def generate(self, workload: Workload) -> list[list[int]]:
        ids = [self.manager.add_request(request.prompt_token_ids, max_new_tokens=request.max_tokens, eos_token_id=NO_EOS)
               for request in workload.requests]
        results: dict[str, list[int]] = {}
        while len(results) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise BenchError(f"hf-continuous: request {result.request_id} failed: {result.error}")
            if result is not None and result.is_finished():
                results[result.request_id] = result.generated_tokens
            elif result is None and not self.manager.is_running():
                raise BenchError("hf-continuous: its generation thread has ended (its log says why)")
        return [results[request_id] for request_id in ids]

    def counters(self) -> Counters:
        return Counters()

    def _stop(self) -> None:
        if self.manager is not None:
            self.manager.stop(block=True)
            self.manager.destroy()
            self.manager = None

    def close(self) -> None:
        self._stop()
        del self.model
        release_memory()


def blocks_for(requests: Sequence[BenchRequest], page_size: int = 256) -> int:
    """Pages that hold every request from start to end, so that nothing is ever preempted or offloaded."""
    return sum(-(-(len(request.prompt_token_ids) + request.max_tokens) // page_size) for request in requests) + 1
