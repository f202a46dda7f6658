"""How long the gaps between the kernels of a CUDA graph are, and what changes that: `python tests/gpu_gaps.py`. Not a test: the
clock is in it.

Graphs of decode steps are replayed alone, after one thing after the other that a process, or another one, may do. Some make the
same graphs a tenth faster or slower for as long as nothing else happens (docs/ledger.md): PyTorch's issue 161104 has kernels of
graphs that are slower once two streams have had work.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from minivllm import LLM, SamplingParams
from minivllm.bench.anatomy import NUM_REPEATS, spread_lens, timed_replays
from minivllm.bench.shapes import write_shape

STEPS = ((25, 140), (1, 192), (256, 600))  # requests, tokens of each
OTHER_PROCESS = "import torch; torch.zeros(1).cuda(); torch.cuda.synchronize()"


@torch.inference_mode()
def microseconds(llm: LLM, batch_size: int, context_len: int) -> float:
    """Of one replay, the median of several rounds."""
    graphs, rows = llm.engine.runner.graphs, llm.engine.runner.rows
    shape = rows.block_table[:batch_size].shape
    rows.block_table[:batch_size] = torch.randint(1, llm.engine.config.num_blocks, shape, device=rows.device, dtype=torch.int32)
    graphs.index[:batch_size] = torch.arange(batch_size, device=rows.device)
    graphs.index[batch_size:] = rows.padding_row
    graphs.host_index[:] = -1  # what it says of `index` is not true any more
    graph = graphs.graphs[min(size for size in graphs.graphs if size >= batch_size)]
    lens = spread_lens(batch_size, context_len, 0.0)
    return statistics.median(timed_replays(graph, rows, lens) for _ in range(NUM_REPEATS)) * 1e3


def tell(llm: LLM, what: str, stream: torch.cuda.Stream | None = None) -> None:
    torch.cuda.synchronize()
    with torch.cuda.stream(stream or llm.engine.runner.stream):
        print(f"{what:52s}" + "".join(f"{microseconds(llm, *step):10.1f}" for step in STEPS), flush=True)


def other_process() -> None:
    """It makes a context on this GPU, and ends."""
    subprocess.run([sys.executable, "-c", OTHER_PROCESS], check=True)


def other_context() -> None:
    """This process makes a second one, and gives it back."""
    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    status = cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0)
    if status:
        print(f"  (cuCtxCreate: error {status})")
        return
    pointer = ctypes.c_uint64()
    cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(1 << 20))
    cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(1), ctypes.c_size_t(1 << 20))
    cuda.cuCtxSynchronize()
    cuda.cuCtxDestroy_v2(context)


def copies() -> None:
    up = torch.zeros(1000).pin_memory().to("cuda", non_blocking=True)
    up.to("cpu", non_blocking=True)


def answers(llm: LLM) -> None:
    prompts = [[7] * 64 for _ in range(25)]
    llm.generate(prompts, SamplingParams(temperature=1, max_tokens=128, ignore_eos=True, detokenize=False), use_tqdm=False)


def main() -> None:
    folder = write_shape("qwen2.5-0.5b", Path(tempfile.mkdtemp()))
    llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, max_num_seqs=256,
              gpu_memory_utilization=0.85)
    print("microseconds of a replay".ljust(52) + "".join(f"{batch_size:4} x {length:3}" for batch_size, length in STEPS))
    tell(llm, "at first")
    things: dict[str, Callable[[], None]] = {
        "copies up and down": copies, "25 answers": lambda: answers(llm), "a second context of this process": other_context,
        "another process made a context": other_process, "copies up and down ": copies, "25 answers ": lambda: answers(llm)}
    for what, do in things.items():
        do()
        tell(llm, what.strip())
    tell(llm, "graphs on the default stream", torch.cuda.default_stream())
    tell(llm, "on the engine's own again")
    other_context()
    tell(llm, "a second context of this process")
    other_process()
    tell(llm, "another process made a context")


if __name__ == "__main__":
    main()
