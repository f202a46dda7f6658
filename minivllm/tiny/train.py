"""Train the embedded model and its draft from nothing: python -m minivllm.tiny.train --out DIR

On one H200 this takes minutes. `--small --steps 20` makes a useless model of the same form on a CPU in seconds, for the tests.
The text is written while the model trains: every batch is new, and none is seen twice.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from . import corpus
from .tokenizer import save_tokenizer, train_tokenizer

MODEL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
}
DRAFT = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}
CONTEXT = 2048
# Rows of these lengths in turn. Short rows put many documents at position 0, where every prompt starts; long ones reach the
# end of the context.
LENGTHS = (256, 256, 2048)
QUESTION_WEIGHT = 0.2  # of the loss on what the user says: it is often random, and the model need not learn to say it


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    steps: int
    batch_tokens: int
    learning_rate: float
    seed: int
    device: str
    workers: int
    lengths: tuple[int, ...] = LENGTHS


def build(tokenizer: Tokenizer, shape: dict[str, int], seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights for this tokenizer."""
    end, stop = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=end, eos_token_id=stop, pad_token_id=end,
        attn_implementation="sdpa", **shape,
    ))
    # Like Qwen2.5-Instruct: two end tokens, and mild sampling. No repetition penalty, because it would punish copying.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.0, bos_token_id=end, pad_token_id=end,
        eos_token_id=[stop, end],
    )
    return model


_worker: dict[str, Tokenizer] = {}


def _start_worker(path: str) -> None:
    _worker["tokenizer"] = Tokenizer.from_file(path)


def _work(job: tuple[int, int, int, int]) -> numpy.ndarray:
    seed, step, num_tokens, length = job
    return corpus.batch(seed, step, _worker["tokenizer"], num_tokens, length)


def batches(plan: Plan, tokenizer_file: Path) -> Iterator[Tensor]:
    """The rows of each step, written ahead of time by `workers` processes, or here if there are none."""
    jobs = [(plan.seed, step, plan.batch_tokens, plan.lengths[step % len(plan.lengths)]) for step in range(plan.steps)]
    if not plan.workers:
        _start_worker(str(tokenizer_file))
        yield from (torch.from_numpy(_work(job).astype(numpy.int64)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(plan.workers, _start_worker, (str(tokenizer_file),)) as pool:
        for rows in pool.imap(_work, jobs):  # in the order of the steps, whoever is ready first
            yield torch.from_numpy(rows.astype(numpy.int64))


def token_weights(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The weight of each token (B, T) in the loss: less inside system and user messages."""
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|endoftext|>")
    answer = tokenizer.encode("assistant").ids[0]
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = (places * ((ids == start) | (ids == end))).cummax(dim=1).values  # where this message or document began
    role = ids.gather(1, (last + 1).clamp(max=ids.shape[1] - 1))
    asked = (ids.gather(1, last) == start) & (role != answer)
    return torch.where(asked, QUESTION_WEIGHT, 1.0)


def loss_of(logits: Tensor, ids: Tensor, weights: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weighted loss to descend, and the plain loss on the tokens of full weight to report.

    With a teacher's logits the target is the teacher's whole distribution instead of the one next token.
    """
    logits, ids, weights = logits[:, :-1].float(), ids[:, 1:], weights[:, 1:]
    plain = functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    full = weights == 1.0
    report = (plain * full).sum() / full.sum()
    if teacher is not None:
        target = teacher[:, :-1].float().softmax(-1)
        plain = -(target * logits.log_softmax(-1)).sum(-1)
    return (plain * weights).sum() / weights.sum(), report


def learning_rate(plan: Plan, step: int) -> float:
    """A short linear rise, then half a cosine down to nothing."""
    warmup = max(1, min(200, plan.steps // 10))
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (plan.steps - warmup)))


def optimizer_for(model: Qwen2ForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.97), fused=plan.device == "cuda")


def train(model: Qwen2ForCausalLM, tokenizer_file: Path, plan: Plan, teacher: Qwen2ForCausalLM | None = None) -> float:
    """Train the model in place and return its last loss, a mean over the last hundredth of the steps."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    model.to(plan.device).train()
    compute_loss = loss_of
    if plan.device == "cuda" and teacher is None:  # a draft is so small that compiling it costs more than it saves
        compute_loss = torch.compile(loss_of, dynamic=False)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = optimizer_for(model, plan)
    recent: list[Tensor] = []
    began = time.monotonic()
    for step, rows in enumerate(batches(plan, tokenizer_file)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        ids = rows.to(plan.device)
        with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
            with torch.no_grad():
                taught = teacher(ids, use_cache=False).logits if teacher else None
            loss, report = compute_loss(model(ids, use_cache=False).logits, ids, token_weights(ids, tokenizer), taught)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-max(1, plan.steps // 100):], report.detach()]
        if step % max(1, plan.steps // 25) == 0 or step == plan.steps - 1:
            print(f"step {step} of {plan.steps}: loss {torch.stack(recent).mean():.4f}, {time.monotonic() - began:.0f} s",
                  flush=True)
    return float(torch.stack(recent).mean())


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that transformers and minivllm load: weights in bfloat16, configs, tokenizer."""
    model.to("cpu", torch.bfloat16).eval().save_pretrained(folder)
    save_tokenizer(tokenizer, folder, CONTEXT)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minivllm.tiny.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model/ and draft/")
    parser.add_argument("--steps", type=int, default=9000, help="training steps of the model; the draft gets a third")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes that write text; default: all cores but one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes and batches, to test the program itself")
    return parser.parse_args()


def main() -> None:
    options = parse()
    workers = max(1, multiprocessing.cpu_count() - 1) if options.workers is None else options.workers
    if options.small:
        options.batch_tokens, workers = 1024, 0
    tokenizer = train_tokenizer(options.seed, 500 if options.small else 60000, 1024 if options.small else 4096)
    model_folder, draft_folder = options.out / "model", options.out / "draft"
    save_tokenizer(tokenizer, model_folder, CONTEXT)
    lengths = (128, 256) if options.small else LENGTHS
    plan = Plan(options.steps, options.batch_tokens, options.learning_rate, options.seed, options.device, workers, lengths)
    model = build(tokenizer, SMALL if options.small else MODEL, options.seed)
    train(model, model_folder / "tokenizer.json", plan)
    save(model, tokenizer, model_folder)
    teacher = Qwen2ForCausalLM.from_pretrained(model_folder).to(options.device)
    draft = build(tokenizer, SMALL if options.small else DRAFT, options.seed + 1)
    plan = Plan(max(1, options.steps // 3), options.batch_tokens, options.learning_rate, options.seed + 1, options.device,
                workers, lengths)
    train(draft, model_folder / "tokenizer.json", plan, teacher)
    save(draft, tokenizer, draft_folder)


if __name__ == "__main__":
    main()
