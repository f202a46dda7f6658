"""Who gets how much memory at a start, what is said when it runs out, and what is kept for the next start."""

from __future__ import annotations

import copy
import gc
import logging
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import greedy, model_and_folder
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from minivllm import LLM, profile_run, prompt_graphs, startup
from minivllm.compile_cache import NUM_WORKERS, VARIABLE, WORKERS, CompileCache, writable_folder
from minivllm.config import EngineConfig, ModelConfig
from minivllm.cuda_graphs import bucket_sizes
from minivllm.exceptions import NotEnoughMemoryError, ValidationError
from minivllm.memory import decide_num_blocks, is_out_of_memory, kv_bytes_per_block
from minivllm.profile_run import GIB, MemorySum, bytes_for_kv, dummy_step, graph_output_bytes, measure_memory
from minivllm.startup import decide_attention_backend, decide_sizes, describe_seconds
from minivllm.weights import load_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MADE_UP = MemorySum(total=100 * GIB, usable=90 * GIB, weights=10 * GIB, others=5 * GIB, activations=3 * GIB, graphs=2 * GIB)
sizes = st.integers(0, 2**40)


def model_config() -> ModelConfig:
    return ModelConfig.from_folder(model_and_folder()[1])


def parts_of(line: str) -> dict[str, float]:
    """The numbers of a line of the report by their names."""
    return {name.strip(): float(number) for name, number in re.findall(r"([A-Za-z' ]+) (\d+\.\d)", line.split(":", 1)[1])}


# ---- The sum ----


@given(sizes, sizes, sizes, sizes)
def test_the_cache_gets_what_is_left_and_never_less_than_nothing(usable, in_use, activations, graphs):
    """All parts together never pass what is usable, and where something is left not a byte of it is lost."""
    left = bytes_for_kv(usable, in_use, activations, graphs)
    taken = in_use + activations + graphs
    assert left == 0 if taken >= usable else left + taken == usable


@given(st.integers(1, 300), st.integers(1, 10_000), st.integers(1, 2**20), sizes)
def test_blocks_fill_what_is_left_up_to_what_requests_can_use(max_num_seqs, max_model_len, block_bytes, usable):
    """One block more would not fit or could not be used; fewer than two are refused."""
    memory = MemorySum(2**41, usable, 0, 0, 0, 0)
    config = EngineConfig(max_num_seqs=max_num_seqs)
    most = max_num_seqs * -(-max_model_len // 16) + 1
    if usable // block_bytes < 2:
        with pytest.raises(NotEnoughMemoryError, match="no room for the KV cache"):
            decide_num_blocks(config, block_bytes, 16, max_model_len, memory)
        return
    num_blocks = decide_num_blocks(config, block_bytes, 16, max_model_len, memory)
    assert num_blocks * block_bytes <= usable
    assert num_blocks == most or (num_blocks < most and (num_blocks + 1) * block_bytes > usable)


def test_the_report_s_sum_adds_up_as_printed():
    """What the cache takes and what stays unused make up the rest of the share, in the numbers that a reader sees."""
    line = MADE_UP.describe(40 * GIB)
    assert line == ("100.0 GiB x 0.9 = 90.0: weights 10.0, others 5.0, a step's activations 3.0, CUDA graphs 2.0, KV cache 40.0, "
                    "unused 30.0")
    full = MADE_UP.describe(MADE_UP.for_kv)
    assert "unused" not in full
    assert sum(parts_of(full).values()) == pytest.approx(90, abs=0.25), "six numbers, each rounded to 0.1"


def test_results_of_graphs_are_counted_as_documented():
    """Qwen2.5-0.5B with 256 requests: the docstring's 664 MB."""
    assert sum(bucket_sizes(256)) == 1949
    buckets = list(prompt_graphs.TOKEN_BUCKETS)
    assert graph_output_bytes(256, buckets, 151_936, 896, 2) == (1949 * 151_936 + 39_776 * 896) * 2 == 663_525_120


class MadeUpDevice:
    """torch.cuda's counters: a GPU of 1,000,000 bytes of which `in_use` are taken. A step takes 1,000 bytes a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, in_use: int) -> None:
        self.calls: list[str] = []
        self.num_tokens = 0
        monkeypatch.setattr(profile_run, "dummy_step", self.step)
        for name, value in {"reset_peak_memory_stats": None, "memory_allocated": 500, "empty_cache": None,
                            "mem_get_info": (1_000_000 - in_use, 1_000_000)}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: (self.calls.append(name), value)[1])
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 500 + 1000 * self.num_tokens)

    def step(self, model, num_tokens, num_rows, max_model_len, device):
        self.calls.append(f"step {num_tokens} {num_rows}")
        self.num_tokens = num_tokens


def test_a_gpu_that_others_use_leaves_less(monkeypatch):
    """nano-vllm#59: what the device says is in use counts, whoever uses it, and it is asked after the profile run."""
    model = load_model(model_and_folder()[1], "float32")
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    config = EngineConfig(max_num_seqs=3, gpu_memory_utilization=0.5)
    device = MadeUpDevice(monkeypatch, weights + 20_000)
    memory = measure_memory(model, config, "paged_gather", 64, 40, CPU)
    rows = 4 * 4 * 64
    assert memory == MemorySum(1_000_000, 500_000, weights, 20_000, 40_000 + rows, 0)
    assert memory.for_kv == 500_000 - weights - 20_000 - 40_000 - rows
    assert device.calls == ["reset_peak_memory_stats", "step 40 3", "memory_allocated", "empty_cache", "mem_get_info"]


def test_graphs_are_reserved_for_only_where_they_are_captured(monkeypatch):
    """Results of every bucket and the activations of the largest decode and prompt bucket; nothing with enforce_eager."""
    model = load_model(model_and_folder()[1], "float32")
    device = MadeUpDevice(monkeypatch, 0)
    memory = measure_memory(model, EngineConfig(max_num_seqs=3), "flex_attention", 64, 100, CPU)
    shape = model.config
    results = ((1 + 3) * shape.vocab_size + (32 + 64 + 96 + 100) * shape.hidden_size) * 4
    assert memory.graphs == results + (profile_run.SAMPLER_COPIES + 1) * 3 * shape.vocab_size * 4 + 3_000 + 100_000
    assert [call for call in device.calls if call.startswith("step")] == ["step 100 3", "step 3 0", "step 100 0"]
    eager = EngineConfig(max_num_seqs=3, enforce_eager=True)
    assert measure_memory(model, eager, "flex_attention", 64, 100, CPU).graphs == 0


def test_guesses_and_a_draft_model_have_their_share_of_the_sum(monkeypatch):
    """With k = 4 a step samples five times a request, verifications have graphs, and the draft its weights, rows and graphs."""
    model = load_model(model_and_folder()[1], "float32")
    device = MadeUpDevice(monkeypatch, 0)
    memory = measure_memory(model, EngineConfig(max_num_seqs=3), "flex_attention", 64, 100, CPU, model, 4)
    shape, weights = model.config, sum(weight.numel() * 4 for weight in model.parameters())
    assert memory.weights == 2 * weights and memory.activations == 100_000 + 2 * 4 * 4 * 64
    of_each = ((1 + 3) * shape.vocab_size + (32 + 64 + 96 + 100) * shape.hidden_size) * 4 + 3_000 + 100_000
    of_each += (profile_run.SAMPLER_COPIES + 1) * 3 * shape.vocab_size * 4
    of_guesses = ((1 + 3) * 5 * shape.hidden_size + 15 * shape.vocab_size) * 4 + 15_000
    assert memory.graphs == 2 * of_each + of_guesses, f"{memory.graphs:,} bytes, not {2 * of_each + of_guesses:,}"
    steps = [call for call in device.calls if call.startswith("step")]
    assert steps == ["step 100 15", "step 100 3", "step 3 0", "step 100 0", "step 15 0", "step 3 0", "step 100 0"]


# ---- The profile run ----


def test_t36_a_profile_run_leaves_nothing_behind():
    """No weight, no attribute and no random state changes; nothing is returned; dummy positions obey max_model_len."""
    model = load_model(model_and_folder()[1], "float32")
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    seen = []
    hook = model.model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(int(args[0].max())))
    assert dummy_step(model, 70, 9, 16, CPU) is None
    hook.remove()
    assert seen == [15], "70 tokens of requests of at most 16"
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), state)


def test_t36_an_engine_that_was_profiled_starts_from_zero(monkeypatch):
    """With a profile run at its start an engine has counted, cached and queued nothing, and its tokens are the same."""
    plain = LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64)
    expected = plain.generate([[1, 2, 3]], greedy(4), use_tqdm=False)

    def decide(config, shape, dtype, device, model, *more):
        dummy_step(model, 128, 4, 64, device)
        return decide_sizes(config, shape, dtype, device, model, *more)

    monkeypatch.setattr(startup, "decide_sizes", decide)
    llm = LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64)
    stats = llm.stats
    assert (stats.num_steps, stats.num_blocks_allocated, stats.prefix_cache_queries) == (0, 0, 0)
    assert llm.engine.kv_cache_manager.usage == 0 and not llm.engine.has_unfinished_requests()
    outputs = llm.generate([[1, 2, 3]], greedy(4), use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_more_rows_than_tokens_and_no_rows_at_all():
    """A step has at most one row a token, and a step for its activations alone samples nothing."""
    model = load_model(model_and_folder()[1], "float32")
    for num_tokens, num_rows in ((1, 8), (5, 0)):
        dummy_step(model, num_tokens, num_rows, 64, CPU)


@pytest.mark.parametrize("knobs", [{"num_blocks": 9}, {"kv_cache_memory_bytes": 2**20}])
def test_a_pool_of_a_given_size_needs_no_profile_run(monkeypatch, knobs):
    """num_blocks and kv_cache_memory_bytes decide alone; without them a GPU is measured."""
    def measure(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(startup, "measure_memory", measure)
    arguments = (model_config(), torch.float32, CUDA, object())
    config, memory = decide_sizes(EngineConfig(**knobs), *arguments)
    assert memory is None and config.num_blocks
    with pytest.raises(AssertionError, match="measured"):
        decide_sizes(EngineConfig(), *arguments)


def test_on_a_gpu_the_pool_takes_what_was_measured(monkeypatch):
    """The sum decides the pool, which lowers a max_model_len that nobody asked for; the profile run is of the full length."""
    block = kv_bytes_per_block(model_config(), 64, torch.float32)
    asked = []
    monkeypatch.setattr(startup, "measure_memory", lambda *args: asked.append(args[2:5]) or MemorySum(9, 4 * block + 7, 0, 0, 7, 0))
    config, memory = decide_sizes(EngineConfig(enable_chunked_prefill=False), model_config(), torch.float32, CUDA, object())
    assert (config.num_blocks, config.max_model_len, memory.for_kv) == (4, 3 * 64 + 1, 4 * block)
    assert [args[1:] for args in asked] == [(512, 8192)]


def test_no_room_on_a_gpu_shows_the_sum(monkeypatch):
    """The error says who has the memory and which knobs give more."""
    full = MemorySum(10 * GIB, 9 * GIB, 2 * GIB, 7 * GIB, GIB, 0)
    with pytest.raises(NotEnoughMemoryError, match=r"weights 2\.0, others 7\.0.*raise gpu_memory_utilization") as error:
        decide_num_blocks(EngineConfig(), 2**20, 64, 512, full)
    assert error.value.parameter == "gpu_memory_utilization"


# ---- When it runs out ----

PHASES = {"weights": ("load_model", "dtype"), "profile run": ("decide_sizes", "max_num_batched_tokens"),
          "KV pool": ("ModelRunner", "gpu_memory_utilization"), "compiling": ("ModelRunner.warm_up", "gpu_memory_utilization")}


def run_out(monkeypatch, target: str, error: BaseException | None = None) -> None:
    """Make a part of the start raise as torch does."""
    def fail(*_, **__):
        raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    owner, name = (startup.ModelRunner, "warm_up") if "." in target else (startup, target)
    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("phase", PHASES)
def test_out_of_memory_at_start_says_when_and_what_to_change(monkeypatch, phase):
    """In every phase the error is a ValidationError that names the phase and a knob, with no other error behind it."""
    target, parameter = PHASES[phase]
    run_out(monkeypatch, target)
    with pytest.raises(ValidationError, match=f"in phase '{phase}'.*To get by with less, .*{parameter.split('_')[0]}") as failed:
        LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64)
    assert isinstance(failed.value, NotEnoughMemoryError)
    assert failed.value.parameter == parameter
    assert failed.value.__context__ is None and failed.value.__cause__ is None


@pytest.mark.parametrize("target", ["warm_up", "sizes"])
def test_a_failed_start_gives_its_memory_back(monkeypatch, target):
    """The weights are gone when the device is asked to take its memory back, and while somebody still holds the error."""
    alive, when_emptied = [], []

    def load(*args):
        model = load_model(*args)
        alive.append(weakref.ref(model.model.embed_tokens.weight))
        return model

    monkeypatch.setattr(startup, "load_model", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: when_emptied.append(alive[0]()))
    knobs = {"kv_cache_memory_bytes": 1} if target == "sizes" else {}
    if not knobs:
        run_out(monkeypatch, "ModelRunner.warm_up")
    with pytest.raises(NotEnoughMemoryError) as failed:
        LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64, **knobs)
    gc.collect()
    assert failed.value is not None and len(alive) == 1
    assert when_emptied == [None] and alive[0]() is None, "a traceback keeps the weights"


def test_only_memory_is_taken_for_memory(monkeypatch):
    """A compiler's error around an out-of-memory counts, and so does a CPU's; any other error goes on up as it is."""
    outer = RuntimeError("backend failed")
    outer.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(outer) and is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory"))
    run_out(monkeypatch, "ModelRunner", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64)


def test_the_server_tells_in_one_line(monkeypatch, capsys):
    """`serve` ends with status 2 and one line: flag, phase, way out; no traceback."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from minivllm.serve.server import main

    run_out(monkeypatch, "ModelRunner")
    assert main(["--model", model_and_folder()[1], "--port", "0"]) == 2
    *_, last = (lines := capsys.readouterr().err.splitlines())
    assert "error: --gpu-memory-utilization: out of memory at start, in phase 'KV pool'" in last
    assert not any("Traceback" in line for line in lines)


# ---- What is kept for the next start ----


@pytest.fixture
def no_cache_variables(monkeypatch):
    """An environment that names no cache, restored afterwards."""
    for name in (VARIABLE, WORKERS, "TRITON_CACHE_DIR", "MINIVLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # remembered by monkeypatch, also where it was not set
        monkeypatch.delenv(name)


def test_the_folder_of_compiled_kernels_is_found_in_the_environment(no_cache_variables, monkeypatch, tmp_path):
    """~/.cache, then XDG_CACHE_HOME, then MINIVLLM_CACHE_ROOT; torch's own variable is left alone."""
    for name, value, found in (("HOME", tmp_path, ".cache/minivllm"), ("XDG_CACHE_HOME", tmp_path / "xdg", "xdg/minivllm"),
                               ("MINIVLLM_CACHE_ROOT", tmp_path / "root", "root")):
        monkeypatch.setenv(name, str(value))
        assert writable_folder() == tmp_path / found / "torch_compile"
        assert writable_folder().is_dir() and not list(writable_folder().iterdir())
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert CompileCache().folder == tmp_path / "mine"


def test_torch_compiles_into_the_folder_and_finds_it_there_again(no_cache_variables, monkeypatch, tmp_path):
    """Also when importing torch.compile has set the variable to its default: torch's and Triton's folders follow."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    monkeypatch.setenv("MINIVLLM_CACHE_ROOT", str(tmp_path))
    assert cache_dir() == os.environ[VARIABLE] != str(tmp_path), "importing did this"
    cache = CompileCache()
    assert cache.folder == tmp_path / "torch_compile"
    assert cache_dir() == str(cache.folder) and triton_cache_dir(0).startswith(str(cache.folder))
    assert "(cold" in cache.describe()
    (cache.folder / "fxgraph" / "ab" / "key").mkdir(parents=True)
    assert cache.describe().endswith("(cold: 1 functions added)")
    assert CompileCache().describe() == f"{cache.folder} (warm)"


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(no_cache_variables, monkeypatch, tmp_path, caplog):
    """torch's default is used, and a warning says how to keep what is compiled."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIVLLM_CACHE_ROOT", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "minivllm"):
        cache = CompileCache()
    assert str(cache.folder) == default_cache_dir()
    assert "MINIVLLM_CACHE_ROOT" in caplog.text


def test_few_workers_compile_unless_somebody_asked_for_others(no_cache_variables, monkeypatch, tmp_path):
    """torch has read their number by the time the cache is open: nothing may import the compiler before."""
    code = ("from minivllm import LLM, startup; startup.CompileCache()\n"
            "from torch._inductor import config; print(config.compile_threads)")
    monkeypatch.setenv("MINIVLLM_CACHE_ROOT", str(tmp_path))
    for asked, expected in ((None, NUM_WORKERS), ("2", "2")):
        if asked:
            monkeypatch.setenv(WORKERS, asked)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr


def test_eager_on_a_gpu_reads_readably_and_compiles_nothing(monkeypatch):
    """enforce_eager: the readable attention, no warm-up, no graph; without it the compiled rung."""
    shape = model_config()
    shape = SimpleNamespace(head_dim=64, **{name: value for name, value in vars(shape).items() if name != "head_dim"})
    backends = [decide_attention_backend(EngineConfig(enforce_eager=eager), shape, torch.bfloat16, CUDA, 64)
                for eager in (False, True)]
    assert backends == ["flex_attention", "paged_gather"]
    monkeypatch.setattr(startup, "CompileCache", lambda: pytest.fail("a cache was set up"))
    llm = LLM(model_and_folder()[1], skip_tokenizer_init=True, max_model_len=64, enforce_eager=True)
    runner = llm.engine.runner
    assert runner.warm_up() == 0.0 and (runner.graphs, runner.prompt_graphs, runner.forward_model) == (None, None, runner.model)


def test_the_report_of_a_gpu_has_its_sum_its_cache_and_its_phases(monkeypatch):
    """What a CPU has not stands in the report where it was given."""
    llm = LLM(model_and_folder()[1], skip_tokenizer_init=True, num_blocks=9, max_model_len=64)
    assert "memory   " not in llm.engine.report and "compile cache" not in llm.engine.report
    defaults = SimpleNamespace(describe=lambda: "none", eos_token_ids=())
    cache = SimpleNamespace(describe=lambda: "~/.cache (warm)")
    told = {"weights": "7 bytes", "threads": "1"}
    report = startup.write_report(llm.engine.config, llm.engine.runner.model, told, defaults, None, Path("m"), MADE_UP,
                                      cache, {"x": 0})
    assert "memory             100.0 GiB x 0.9 = 90.0: weights 10.0" in report
    assert "compile cache      ~/.cache (warm)" in report


def test_ready_in_shows_every_phase_that_took_time():
    """A phase lasts until the next begins; those below 0.05 s are left out; together they are the whole."""
    began = {"tokenizer": 10.0, "weights": 10.5, "profile run": 12.0, "KV pool": 12.01, "compiling": 12.5, "capturing": 20.0}
    assert describe_seconds(began, 21.0) == (
        "11.0 s: tokenizer 0.5, weights 1.5, KV pool 0.5, compiling 7.5, capturing 1.0")
