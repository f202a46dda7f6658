"""Every kernel of a step with its time: `python tests/gpu_kernels.py qwen2.5-0.5b 25x140 256x600~0.6 prompts`. Not a test.

`bench anatomy` sums kernels in groups; this names each, as the profiler does, with microseconds a step, launches, and microseconds
a launch. `25x140` is the decode graph of 25 requests of 140 tokens, `~0.6` spreads them, `prompts` a step of 8,192 tokens in
prompts as those of the bench's preset B.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from pathlib import Path

import torch

from minivllm import LLM, SamplingParams
from minivllm.bench.anatomy import NUM_PROFILED, profiled, profiled_replays, spread_lens, timed_replays
from minivllm.bench.shapes import write_shape

MOST_LINES, BUDGET = 22, 8192


def prompt_step(llm: LLM) -> list[tuple[str, float, int]]:
    rng, prompts = random.Random(0), []
    while (left := BUDGET - sum(map(len, prompts))) > 0:
        prompts.append([rng.randrange(1000) for _ in range(min(left, rng.randint(100, 1024)))])
    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)
    return profiled(lambda: llm.generate(prompts, params, use_tqdm=False))


@torch.inference_mode()
def decode_step(llm: LLM, count: int, mean: int, ratio: float) -> list[tuple[str, float, int]]:
    graphs, rows = llm.engine.runner.graphs, llm.engine.runner.rows
    shape = rows.block_table[:count].shape
    with torch.cuda.stream(llm.engine.runner.stream):
        rows.block_table[:count] = torch.randint(1, llm.engine.config.num_blocks, shape, dtype=torch.int32, device=rows.device)
        graphs.index[:count] = torch.arange(count, device=rows.device)
        graphs.index[count:] = rows.padding_row
        graphs.host_index[:] = -1  # what it says of `index` is not true any more
        graph = graphs.graphs[min(size for size in graphs.graphs if size >= count)]
        print(f"{1e3 * timed_replays(graph, rows, spread_lens(count, mean, ratio)):.1f} microseconds a replay")
        return profiled_replays(graph)


def main() -> None:
    shape, *steps = sys.argv[1:]
    llm = LLM(str(write_shape(shape, Path(tempfile.mkdtemp()))), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
              max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=BUDGET, gpu_memory_utilization=0.85,
              enable_prefix_caching=False)
    for step in steps:
        print(f"\n{shape} {step}, the mean of {NUM_PROFILED}")
        found = re.fullmatch(r"(\d+)x(\d+)(?:~([\d.]+))?", step)
        kernels = decode_step(llm, int(found[1]), int(found[2]), float(found[3] or 0)) if found else prompt_step(llm)
        for name, microseconds, launches in sorted(kernels, key=lambda kernel: -kernel[1])[:MOST_LINES]:
            print(f"{microseconds:9.1f} {launches:4} {microseconds / max(1, launches):8.2f}  {name[:110]}")
        print(f"{sum(kernel[1] for kernel in kernels):9.1f} {sum(kernel[2] for kernel in kernels):4}           in all")


if __name__ == "__main__":
    main()
