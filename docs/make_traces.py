"""Records the traces that the site shows: the embedded model, and a clock that counts its readings, 10 ms each.

    python docs/make_traces.py [FOLDER]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from minivllm import SamplingParams
from minivllm.engine import LLMEngine
from minivllm.engine_args import engine_config_from_kwargs

FOLDER = Path(__file__).parent / "trace"
QUESTIONS = ("What is a block?", "Tell me a story about a fox.", "What is a KV cache?", "What is preemption?",
             "Tell me a story about a girl.", "What is the scheduler?", "What is a slot?", "Tell me a story about a boat.")
SYSTEM = "You are a friendly helper. You answer in short and plain sentences, and you tell a story when somebody asks for one. " * 2
LONG = "Once upon a time there was a small cat. " * 28


def record(path: Path, prompts: list[str], lengths: list[int], **knobs: int) -> None:
    """Generate greedily for all prompts, which arrive together, and write every step to `path`."""
    ticks = itertools.count()
    config = engine_config_from_kwargs(model=None, trace=str(path), max_model_len=512, **knobs)
    engine = LLMEngine(config, clock=lambda: next(ticks) / 100)
    for number, (prompt, length) in enumerate(zip(prompts, lengths), start=1):
        engine.add_request(f"request-{number}", prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()


def main(folder: Path) -> None:
    lengths = [24, 96, 40, 30, 120, 50, 20, 64]
    record(folder / "continuous.jsonl", list(QUESTIONS), lengths, num_blocks=65, max_num_batched_tokens=32)
    record(folder / "preemption.jsonl", list(QUESTIONS), lengths, num_blocks=17, max_num_batched_tokens=64)
    shared = [SYSTEM + question for question in QUESTIONS[:6]]
    record(folder / "prefix.jsonl", [*shared[:3], LONG, *shared[3:]], [30, 40, 50, 20, 30, 40, 50], num_blocks=65,
           max_num_batched_tokens=64)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
