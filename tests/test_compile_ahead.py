"""Processes that compile parts of an engine while it compiles its model: what is needed, and nothing depends on them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
from tiny_models import random_qwen2

from minivllm import compile_ahead, cuda_graphs, flex_attention, graph_sampler
from minivllm.attention import allocate_kv_cache
from minivllm.compile_ahead import (
    PARTS,
    Shapes,
    compile_attention,
    compile_sampler,
    compiled_ahead,
    launch,
    most_processes,
    worthwhile,
)
from minivllm.compile_cache import VARIABLE, WORKERS
from minivllm.compiled_model import CompiledModel
from minivllm.config import EngineConfig, ModelConfig
from minivllm.course_launches import BLOCK_SIZE, BLOCKS_PER_ROW, DecodeStep
from minivllm.cuda_graphs import bucket_sizes
from minivllm.flex_attention import FlexPagedAttention, num_splits
from minivllm.graph_sampler import SamplerGraphs
from minivllm.input_batch import RowTensors
from minivllm.mailbox import Mailbox
from minivllm.profile_run import GIB, MemorySum

ROOM = MemorySum(total=100 * GIB, usable=90 * GIB, weights=GIB, others=GIB, activations=GIB, graphs=GIB)
CONFIG = EngineConfig(max_num_seqs=4, max_model_len=64, num_blocks=9, block_size=16, dtype="float32", device="cpu",
                      attention_backend="flex_attention")
MODEL = ModelConfig(97, 64, 96, 2, 4, 2, 16, 1e-6, 1e6, 256, True)
SHAPES = Shapes.of(CONFIG, MODEL)
SAMPLERS = {cuda_graphs: ("sample_into_rows",), graph_sampler: ("penalize", "sample_by_cuts", "weigh_all", "narrow")}


@pytest.fixture(autouse=True)
def own_machine(monkeypatch, tmp_path):
    """Cores enough, and a cache root of this test alone; variables that importing the compiler sets are restored."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(compile_ahead, "cpu_quota", lambda: None)
    for name in (VARIABLE, WORKERS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINIVLLM_CACHE_ROOT", str(tmp_path))


def like(value: object) -> object:
    """What torch.compile sees of an argument: shape, strides and dtype of a tensor, and those of all rows."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, RowTensors | Mailbox):
        return {name: like(entry) for name, entry in vars(value).items()}
    return value


def record_calls(monkeypatch) -> list[tuple]:
    """Every call of a function of the sampler that a GPU would compile, from now on."""
    calls: list[tuple] = []

    def recorded(name, function):
        def call(*args):
            calls.append((name, *map(like, args)))
            return function(*args)
        return call

    for module, names in SAMPLERS.items():
        for name in names:
            monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8])
def test_the_sampler_is_compiled_as_a_warm_up_asks_for_it_first(monkeypatch, max_num_seqs):
    """The same functions on the same shapes, strides and dtypes: else torch would find none of it in its cache."""
    calls = record_calls(monkeypatch)
    step = DecodeStep(layers=1, num_requests=1, max_num_seqs=max_num_seqs)
    samplers = SamplerGraphs(step.graphs)
    with torch.inference_mode():
        step.graphs.results[max_num_seqs] = step.graphs.compute(max_num_seqs)
        for by_mass in (False, True):
            samplers.compute(max_num_seqs, by_mass)
    of_warm_up = calls.copy()
    calls.clear()
    compile_sampler(shapes_of(step))
    assert {name for name, *_ in calls} == {name for names in SAMPLERS.values() for name in names}
    assert calls == of_warm_up


def shapes_of(step: DecodeStep) -> Shapes:
    size = step.graphs.max_num_seqs
    return Shapes(step.model.config, size, BLOCKS_PER_ROW * BLOCK_SIZE, 1 + size * BLOCKS_PER_ROW, BLOCK_SIZE, "float32", "cpu")


@pytest.mark.parametrize("max_num_seqs", [1, 5, 150])
def test_attention_is_compiled_as_a_warm_up_asks_for_it(monkeypatch, max_num_seqs):
    """For every bucket that has a kernel of its own the same queries, cache, tables and options, strides included."""
    calls: list[tuple] = []

    def compiled(*, dynamic, for_one=False):
        def attend(q, keys, values, *, block_mask, kernel_options):
            tensors = (q, keys, values, block_mask.kv_num_blocks, block_mask.kv_indices)
            if not dynamic:
                calls.append((*map(like, tensors), block_mask.full_kv_indices, block_mask.BLOCK_SIZE, block_mask.seq_lengths,
                              kernel_options, for_one))
            return torch.zeros(q.shape)
        return attend

    monkeypatch.setattr(flex_attention, "compiled", compiled)
    step = DecodeStep(layers=1, num_requests=1, max_num_seqs=max_num_seqs)
    sizes = bucket_sizes(max_num_seqs)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        step.graphs.kv_caches = [FlexPagedAttention(layer, BLOCK_SIZE) for layer in step.kv]
        step.graphs.forward = CompiledModel(step.model)
        for size in sizes:
            step.graphs.compute_step_logits(size)
    of_warm_up = calls.copy()
    calls.clear()
    compile_attention(shapes_of(step))
    assert len(calls) == sum(num_splits(size, step.model.config.num_key_value_heads) > 1 for size in sizes) > 0
    assert calls == of_warm_up


def test_it_is_done_once_for_each_shape_and_where_there_is_room(monkeypatch, tmp_path):
    """Not for an engine that compiles nothing, nor without a sum of memory or a folder, nor a second time."""
    assert worthwhile(CONFIG, SHAPES, ROOM) == list(PARTS) == ["sampler", "attention"]
    eager = EngineConfig(attention_backend="flex_attention", enforce_eager=True)
    for config, memory in ((EngineConfig(attention_backend="paged_gather"), ROOM), (eager, ROOM), (CONFIG, None)):
        assert worthwhile(config, SHAPES, memory) == []
    for room, parts in ((1.9, ["sampler"]), (0.9, [])):
        tight = MemorySum(total=10 * GIB, usable=int((10 - room) * GIB), weights=0, others=0, activations=0, graphs=0)
        assert worthwhile(CONFIG, SHAPES, tight) == parts, f"{room} GiB beside what the engine may fill"
    SHAPES.done_file("sampler").touch()
    assert worthwhile(CONFIG, SHAPES, ROOM) == ["attention"]
    assert len(worthwhile(CONFIG, Shapes.of(CONFIG, replace(MODEL, vocab_size=98)), ROOM)) == 2, "that is another model"
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIVLLM_CACHE_ROOT", str(tmp_path / "file"))
    assert worthwhile(CONFIG, SHAPES, ROOM) == []


@pytest.mark.parametrize(("cores", "quota", "most"), [(16, None, 3), (12, None, 2), (8, None, 1), (7, None, 0), (64, 8.5, 1)])
def test_few_cores_are_left_to_this_process(monkeypatch, cores, quota, most):
    """Four cores for each process, of those that the container may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(compile_ahead, "cpu_quota", lambda: quota)
    assert most_processes() == most
    assert worthwhile(CONFIG, SHAPES, ROOM) == list(PARTS)[:most]


def test_a_layers_kv_is_counted(monkeypatch):
    """What a process takes beside CUDA itself: logits and their copies, or the KV cache of one layer."""
    layer = FlexPagedAttention(allocate_kv_cache(1, CONFIG.num_blocks, CONFIG.block_size, 2, 16)[0], CONFIG.block_size)
    assert SHAPES.num_bytes("attention") - GIB == layer.kv_cache.numel() * 4
    assert SHAPES.num_bytes("sampler") - GIB >= 4 * 97 * 4 * 6


def test_it_finds_the_folder_and_says_that_it_is_done(monkeypatch, tmp_path):
    """Started from anywhere it imports this minivllm, ends well, and leaves its mark where torch's compiled kernels go."""
    monkeypatch.chdir(tmp_path)
    process = launch("sampler", SHAPES)
    assert process is not None and process.wait(120) == 0
    done_file = SHAPES.done_file("sampler")
    assert done_file.parent == tmp_path / "torch_compile" and done_file.exists()
    assert worthwhile(CONFIG, SHAPES, ROOM) == ["attention"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "not" / "there"))
    process = launch("sampler", SHAPES)
    assert process is not None and process.wait(120) == 0 and SHAPES.done_file("sampler").exists()


def test_torchs_own_folder_is_not_where_marks_go(monkeypatch, tmp_path):
    """A program that imported torch.compile has torch's default in its environment, and kernels go elsewhere all the same: a mark
    left there would keep every other folder from being filled ahead.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv(VARIABLE, default_cache_dir())
    assert SHAPES.done_file("sampler").parent == tmp_path / "torch_compile"
    process = launch("sampler", SHAPES)
    assert process is not None and process.wait(120) == 0 and SHAPES.done_file("sampler").exists()


def test_a_process_that_fails_is_only_mentioned(monkeypatch, caplog):
    """Its exit status is logged, it leaves no mark, and the start goes on."""
    config = EngineConfig(**vars(CONFIG) | {"device": "no such"})
    with caplog.at_level(logging.INFO, "minivllm"), compiled_ahead(config, MODEL, ROOM) as wait_for:
        for part in PARTS:
            wait_for(part)
    for part in PARTS:
        assert f"{part} was not compiled ahead (exit status 1): it is compiled here" in caplog.text
        assert not Shapes.of(config, MODEL).done_file(part).exists()
    caplog.clear()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with caplog.at_level(logging.INFO, "minivllm"), compiled_ahead(CONFIG, MODEL, ROOM) as wait_for:
        for part in PARTS:
            wait_for(part)
    assert "is not compiled ahead" in caplog.text and "/no/such/python" in caplog.text


def test_nobody_waits_for_ever_and_nothing_is_left_running(monkeypatch, caplog):
    """Beyond its time a process is given up; when a start ends, well or not, all of them end with it."""
    launched = []

    def sleep(*_):
        launched.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return launched[-1]

    monkeypatch.setattr(compile_ahead, "launch", sleep)
    monkeypatch.setattr(compile_ahead, "PATIENCE_SECONDS", 0.1)
    with caplog.at_level(logging.INFO, "minivllm"), compiled_ahead(CONFIG, MODEL, ROOM) as wait_for:
        for part in PARTS:
            wait_for(part)
        assert "it is compiled here" in caplog.text and all(process.poll() is None for process in launched)
    with pytest.raises(MemoryError), compiled_ahead(CONFIG, MODEL, ROOM):
        raise MemoryError
    assert len(launched) == 4 and all(process.poll() is not None for process in launched)


COLD_START = """
import sys, torch
from minivllm import LLM
llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=64, max_num_seqs=9, dtype="float32", gpu_memory_utilization=0.1)
counted = torch._dynamo.utils.counters["inductor"]
print("report", "(cold" in llm.engine.report, counted["fxgraph_cache_hit"], counted["fxgraph_cache_miss"])
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_a_first_start_finds_what_was_compiled_ahead():
    """From an empty cache: the five functions of the sampler and the attention of 4 and 8 decodes are found. (That of 1 and of 9
    comes early, and may be compiled twice at the same time.)
    """
    _, folder = random_qwen2(tempfile.mkdtemp(), 5, layers=2, hidden=64, heads=4, kv_heads=2, vocab=97, head_dim=16)
    done = subprocess.run([sys.executable, "-c", COLD_START, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not compiled ahead" not in done.stderr
    cold, found, made = done.stdout.split()[-3:]
    assert cold == "True" and 7 <= int(found) <= 9 and int(made) > 0, done.stdout


TIMED = """
import torch
from minivllm.compile_ahead import Shapes, compile_sampler
from minivllm.compile_cache import CompileCache
from minivllm.compiled_model import OneAndMany, compiling
from minivllm.config import ModelConfig
from minivllm.model import RMSNorm
CompileCache()
norms = OneAndMany(lambda norm, x: norm(x))
with torch.inference_mode(), compiling():
    model = ModelConfig(1280, 3584, 96, 2, 4, 2, 16, 1e-6, 1e6, 256, True)
    compile_sampler(Shapes(model, 256, 64, 9, 64, "float32", "cuda"))
    for num_tokens in (256, 1):
        norms(num_tokens, RMSNorm(model, torch.bfloat16, "cuda"), torch.ones(num_tokens, 3584, dtype=torch.bfloat16, device="cuda"))
counted = torch._dynamo.utils.counters["inductor"]
print(counted["fxgraph_cache_miss"], sum(count for name, count in counted.items() if name.startswith("benchmarking")))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_no_kernel_is_chosen_by_timing():
    """Sampler and norms, whose sums torch would time in two or three forms: by the clock another form may win after every cold
    start, and with it other last bits and other tokens.
    """
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    made, timed = map(int, done.stdout.split()[-2:])
    assert made == 7, f"{made} functions were compiled: five of the sampler, and two norms"
    assert timed == 0, f"{timed} timings"
