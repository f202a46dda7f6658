"""Throughput and latency: every backend gives exactly what was asked, and the arithmetic runs on a scripted clock."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_qwen2

from minivllm.bench import backends, latency, report, throughput
from minivllm.bench.backends import Counters, ModelSpec, open_backend, require_installed, sampling_kwargs
from minivllm.bench.command import main
from minivllm.bench.environment import describe_environment, installed_version
from minivllm.bench.flags import ENGINE_FIELDS, BenchError
from minivllm.bench.hf_backends import blocks_for, generation_config, left_padded, static_batches
from minivllm.bench.measure import Measured, agreement, measure_all
from minivllm.bench.workload import BenchRequest, Source, Workload, random_requests
from minivllm.config import ModelConfig
from minivllm.exceptions import ValidationError
from minivllm.sampling_params import SamplingParams

ENGINE = ("--num-blocks", "64", "--dtype", "float32", "--device", "cpu")
MIXED = Workload("mixed", random_requests(Source.of(0, range(128)), 6, 12, 9, 0.8), temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(random_qwen2(tmp_path_factory.mktemp("bench"))[1])


def spec_of(folder: str, **kwargs) -> ModelSpec:
    engine_kwargs = {"model": folder, "dtype": "float32", "device": "cpu", "num_blocks": 64} | kwargs
    return ModelSpec(folder, torch.float32, torch.device("cpu"), engine_kwargs)


def outputs_of(name: str, spec: ModelSpec, workload: Workload, size: int | None) -> list[list[int]]:
    backend = open_backend(name, spec)
    try:
        backend.prepare(workload, size)
        return backend.generate(workload)
    finally:
        backend.close()


# ---- The engines ----


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_all_backends_do_the_same_work(folder, load_format):
    """In float32, greedy, minivllm, HF batches of 1 and 4 and HF continuous batching give equal ids of the asked lengths."""
    spec = spec_of(folder, load_format=load_format)
    expected = outputs_of("minivllm", spec, MIXED, None)
    assert [len(ids) for ids in expected] == [one.max_tokens for one in MIXED.requests], "lengths are not what was asked"
    assert len({tuple(ids) for ids in expected}) > 1, "all answers are equal: this test could not fail"
    for name, size in (("hf", 1), ("hf", 4), ("hf-continuous", 3)):
        outputs = outputs_of(name, spec, MIXED, size)
        equal = sum(one == other for one, other in zip(expected, outputs))
        assert outputs == expected, f"{name} with batch {size} agrees with minivllm on {equal} of {len(expected)} requests"


@pytest.mark.parametrize("name", ["minivllm", "hf", "hf-continuous"])
def test_sampled_answers_have_exact_lengths(folder, name):
    """At temperature 1 nothing ends early: no EOS, no lost token."""
    workload = Workload("sampled", MIXED.requests, temperature=1.0)
    lengths = [len(ids) for ids in outputs_of(name, spec_of(folder), workload, 6)]
    assert lengths == [one.max_tokens for one in MIXED.requests], f"{name} gave {lengths}"


def test_static_batches_hold_like_with_like():
    """Sorted by answer, then by prompt; every request in exactly one batch."""
    requests = [BenchRequest([0] * inputs, outputs) for inputs, outputs in ((3, 9), (1, 2), (2, 9), (5, 1), (1, 1))]
    batches = list(static_batches(requests, 2))
    assert batches == [[4, 3], [1, 2], [0]], f"batches: {batches}"


def test_padding_is_on_the_left_and_masked():
    """Every prompt ends in the last column; what stands before it is masked."""
    ids, mask = left_padded([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_continuous_batching_gets_room_for_all():
    """256 tokens fill one page, 257 two; one page is to spare."""
    assert blocks_for([BenchRequest([0] * 200, 56), BenchRequest([0] * 200, 57)]) == 4


# ---- The arithmetic ----


class ScriptedBackend:
    """Runs last as long as the script says, on a clock that it moves; a list of sizes is swept."""

    name = "scripted"

    def __init__(self, seconds: dict[int | None, list[float]], short: int = 0) -> None:
        self.seconds = {size: iter(times) for size, times in seconds.items()}
        self.now, self.size, self.num_runs, self.short, self.is_closed = 0.0, None, 0, short, False
        self.too_large: set[int] = set()

    def sizes(self, workload):
        return list(self.seconds)

    def prepare(self, workload, size):
        self.now += 1000  # nobody may time this
        self.size = size

    def generate(self, workload):
        if self.size in self.too_large:
            raise MemoryError
        self.num_runs += 1
        self.now += next(self.seconds[self.size])
        return [[0] * (one.max_tokens - self.short) for one in workload.requests]

    def counters(self):
        return Counters(10 * self.num_runs, 4 * self.num_runs, self.num_runs, 5 * self.num_runs)

    def close(self):
        self.is_closed = True


WORK = Workload("two", [BenchRequest([1, 2, 3], 4), BenchRequest([1], 2)], 0.0)


def measure(backend, **kwargs) -> Measured:
    options = {"repeats": 3, "num_warmups": 0, "clock": lambda: backend.now} | kwargs
    return measure_all([lambda: backend], WORK, **options)[0]


def test_the_median_of_the_repeats_counts():
    """Runs of 4, 2 and 3 s: 3 s, 2 output tokens a second; warm-up and preparing are not timed; counters are the repeats' own."""
    backend = ScriptedBackend({None: [50.0, 4.0, 2.0, 3.0]})
    measured = measure(backend, num_warmups=1)
    assert measured.seconds == pytest.approx([4, 2, 3]) and measured.output_tokens_per_second == pytest.approx(2)
    assert (measured.cache_hit_rate, measured.num_preemptions) == (0.4, 3), f"{measured.counters}"
    assert backend.is_closed, "a measured backend gives its memory back"


def test_the_fastest_batch_size_is_repeated():
    """One run for each size, then the repeats with the best."""
    measured = measure(ScriptedBackend({1: [9.0], 2: [5.0, 6.0, 7.0, 8.0], 4: [6.0]}))
    assert measured.swept == pytest.approx({1: 9, 2: 5, 4: 6}) and measured.size == 2
    assert measured.elapsed_time == pytest.approx(7), f"repeats took {measured.seconds}"


def test_work_that_was_not_done_has_no_speed():
    """A backend that gives a token less than asked ends the bench with an error, and is closed."""
    backend = ScriptedBackend({None: [1.0]}, short=1)
    with pytest.raises(BenchError, match="request 0 with 3 tokens, asked for 4"):
        measure(backend)
    assert backend.is_closed


def test_a_batch_size_beyond_memory_is_left_out():
    """A size that does not fit costs the sweep nothing but itself; if none fits, the bench says what to do."""
    backend = ScriptedBackend({1: [9.0] * 4, 2: []})
    backend.too_large = {2}
    assert measure(backend).swept == pytest.approx({1: 9})
    backend.too_large = {1, 2}
    with pytest.raises(BenchError, match="--hf-batch-sizes"):
        measure(backend)


def test_interleaved_backends_take_turns():
    """With interleave all are loaded first and each repeat runs every backend once."""
    order, clock = [], itertools.count()
    backends = [ScriptedBackend({None: [0.0] * 9}) for _ in range(2)]
    for index, backend in enumerate(backends):
        run = backend.generate
        backend.generate = lambda workload, index=index, run=run: order.append(index) or run(workload)
    openers = [lambda: backends[0], lambda: backends[1]]
    measure_all(openers, WORK, repeats=2, num_warmups=0, clock=lambda: next(clock), interleave=True)
    assert order == [0, 1, 0, 1], f"order of runs: {order}"


def test_the_report_compares_with_the_baseline():
    """Twice as fast is 2.00x; the floor's share is its seconds over the median; equal outputs are counted."""
    slow, fast = (Measured(name, WORK, seconds=[seconds], counters=[Counters()], outputs=[[1], outputs])
                  for name, seconds, outputs in (("hf", 4.0, [2]), ("minivllm", 2.0, [3])))
    result = report.result_json(fast, slow, report.Floor(10**9, 1e9, True), "m")
    wanted = {"ratio": 2.0, "share_of_bandwidth_floor": 0.5, "gigabytes_per_second": 0.5, "equal_outputs": 0.5, "elapsed_time": 2.0,
              "requests_per_second": 1.0, "tokens_per_second": 5.0, "total_num_tokens": 10, "num_requests": 2}
    assert {name: result[name] for name in wanted} == wanted
    assert agreement(slow, slow) == 1.0
    assert report.vllm_lines(fast) == ["Throughput: 1.00 requests/s, 5.00 total tokens/s, 3.00 output tokens/s",
                                       "Total num prompt tokens:  4", "Total num output tokens:  6"]


# ---- The commands ----


def test_throughput_tells_vllms_lines_a_table_and_a_json(folder, tmp_path, capsys):
    """Two backends in one call: vLLM's three lines each, a table with ratios, and vLLM's keys in the JSON beside environment."""
    file = tmp_path / "out.json"
    flags = "--backend minivllm hf --num-prompts 3 --input-len 8 --output-len 4 --repeats 1 --num-warmups 0 --temperature 0"
    status = main(["throughput", "--model", folder, *flags.split(), "--bandwidth", "10", *ENGINE, "--output-json", str(file)])
    page, whole = capsys.readouterr().out, json.loads(file.read_text())
    assert status == 0, f"the bench ended with {status}"
    assert len(re.findall(r"^Throughput: \S+ requests/s, \S+ total tokens/s, \S+ output tokens/s$", page, re.MULTILINE)) == 2
    assert re.search(r"^minivllm .* 1\.00x +0\.0% +0 ", page, re.MULTILINE), f"no row of minivllm:\n{page}"
    assert re.search(r"^hf \(batch \d\) .* 100\.0%$", page, re.MULTILINE), f"no row of hf that agrees:\n{page}"
    keys = set("model_id elapsed_time num_requests total_num_tokens requests_per_second tokens_per_second environment".split())
    assert keys <= set(whole) and (whole["num_requests"], whole["total_num_tokens"]) == (3, 36), f"keys: {sorted(whole)}"
    assert {"torch", "transformers", "python", "minivllm", "device", "dtype"} <= set(whole["environment"])


def test_what_the_sampler_does_is_asked_of_every_engine(folder, tmp_path):
    """With a repetition penalty too, minivllm's and Hugging Face's greedy tokens are equal; and the JSON says what was asked."""
    file, answers = tmp_path / "out.json", []
    flags = "--backend minivllm hf --num-prompts 3 --input-len 8 --output-len 9 --repeats 1 --num-warmups 0 --temperature 0".split()
    for more in ([], ["--repetition-penalty", "1.5", "--top-k", "5", "--top-p", "0.9"]):
        assert main(["throughput", "--model", folder, *flags, "--bandwidth", "10", *more, *ENGINE, "--output-json", str(file)]) == 0
        answers.append(json.loads(file.read_text()))
    assert "top_k 5, top_p 0.9, repetition_penalty 1.5" in answers[1]["workload"]["name"]
    for answer in answers:
        assert [one["equal_outputs"] for one in answer["backends"]][1:] == [1.0], "the engines were asked for different things"


def test_every_engine_has_its_own_way_to_be_asked():
    """Names and neutral values: top_k is off at 0 in transformers, and a penalty holds where nothing is drawn too."""
    for temperature, sampled in ((0.0, False), (0.7, True)):
        workload = replace(MIXED, temperature=temperature, cuts={"top_k": 20, "repetition_penalty": 1.1})
        theirs = generation_config(workload)
        assert (theirs.do_sample, theirs.repetition_penalty) == (sampled, 1.1)
        assert not sampled or (theirs.top_k, theirs.top_p, theirs.temperature) == (20, 1.0, 0.7)
        assert not sampled or generation_config(replace(workload, cuts={"top_k": -1})).top_k == 0, "transformers' word for off"
        asked = sampling_kwargs(workload, MIXED.requests[0])
        assert (asked["top_k"], asked["repetition_penalty"], asked["temperature"]) == (20, 1.1, temperature)


def test_a_temperature_that_overflows_is_greedy_in_hugging_face():
    """transformers divides by it as it is: below 1e-5 the largest logit wins anyway, and nothing is infinite."""
    for temperature, sampled in ((1e-300, False), (9e-6, False), (1e-4, True)):
        assert generation_config(replace(MIXED, temperature=temperature)).do_sample == sampled


def test_hugging_face_has_the_threads_that_minivllm_has(folder, monkeypatch):
    """Whoever is loaded first: a small model gets as many threads from both backends."""
    told = []
    monkeypatch.setattr("minivllm.bench.hf_backends.set_num_threads", lambda *args: told.append(args))
    open_backend("hf", spec_of(folder)).close()
    ((device, num_bytes),) = told
    shape = ModelConfig.from_folder(Path(folder))
    assert device.type == "cpu"
    assert num_bytes >= 4 * shape.vocab_size * shape.hidden_size, f"{num_bytes} bytes are less than the embedding's"


def test_each_engine_has_the_floor_of_its_own_seats(folder, tmp_path):
    """One request at a time reads the weights more often than a batch of four: neither is told to be faster than memory."""
    file = tmp_path / "out.json"
    flags = "--backend minivllm hf --num-prompts 4 --input-len 4 --output-len 6 --repeats 1 --num-warmups 0 --hf-batch-sizes 4"
    assert main(["throughput", "--model", folder, *flags.split(), "--max-num-seqs", "1", "--bandwidth", "10", *ENGINE,
                 "--output-json", str(file)]) == 0
    ours, theirs = json.loads(file.read_text())["backends"]
    moved = [one["gigabytes_per_second"] * one["elapsed_time"] for one in (ours, theirs)]
    assert moved[0] > 3 * moved[1], f"gigabytes of one seat and of four: {moved}"


def test_a_folder_named_vllm_is_no_vllm(tmp_path, monkeypatch):
    """In a folder that holds one of that name it can be imported, and is not installed."""
    (tmp_path / "vllm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("vllm") is not None
    if installed_version("vllm") is None:
        assert "vllm" not in describe_environment(torch.device("cpu"))
        with pytest.raises(ValidationError, match="vllm is not installed"):
            require_installed(["vllm"])


class VllmOfTheTest:
    """What the bench calls of vLLM's `LLM`. Answers each prompt with its length, max_tokens times, and notes what it is told."""

    def __init__(self, **kwargs):
        self.told, self.start_method, self.calls = kwargs, os.environ["VLLM_WORKER_MULTIPROC_METHOD"], []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, params, use_tqdm):
        answers = [(len(prompt["prompt_token_ids"]),) * one.max_tokens for prompt, one in zip(prompts, params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for answer in answers]


def test_vllm_is_told_what_both_engines_know_and_else_keeps_its_defaults(monkeypatch):
    """Nothing that only we have, no statistics that cost it time, and a spawned engine: a forked one cannot use a CUDA that was
    asked about before.
    """
    monkeypatch.setattr(backends, "installed_version", lambda name: "0.0.1")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=VllmOfTheTest, SamplingParams=SamplingParams))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "to be removed, and put back to nothing afterwards")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    backend = open_backend("vllm", spec_of("/shape", max_num_seqs=8, enable_prefix_caching=False))
    llm = backend.llm
    backend.prepare(MIXED, None)
    ids = backend.generate(MIXED)
    backend.close()
    assert llm.told == {"model": "/shape", "dtype": "float32", "max_num_seqs": 8, "enable_prefix_caching": False,
                        "skip_tokenizer_init": True}
    assert llm.start_method == "spawn", "its engine would be forked"
    assert ids == [[len(one.prompt_token_ids)] * one.max_tokens for one in MIXED.requests], "answers are not in order"
    assert llm.calls == ["reset", "shutdown"], "its cache was not emptied, or its process lives on"


def test_a_model_that_transformers_cannot_load_is_told_in_one_line(folder, tmp_path, capsys):
    """A folder with a config and no weights, for a backend of transformers'."""
    home = tmp_path / "no weights"
    home.mkdir()
    (home / "config.json").write_text((Path(folder) / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    flags = "--backend hf --num-prompts 1 --input-len 4 --output-len 2 --device cpu --bandwidth 10"
    assert main(["throughput", "--model", str(home), *flags.split()]) == 2
    assert capsys.readouterr().err.startswith("python -m minivllm.bench throughput: error: --model: transformers cannot load it")


def test_nobody_who_stops_reading_sees_a_traceback(folder):
    """`| head -1`, which closes its end: an exit status, and nothing on stderr but the runs."""
    command = [sys.executable, "-m", "minivllm.bench", "throughput", "--model", folder, "--num-prompts", "1", "--input-len", "4",
               "--output-len", "2", "--repeats", "1", "--num-warmups", "0", "--bandwidth", "10", *ENGINE]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    assert "Traceback" not in running.stderr.read()
    running.stderr.close()
    assert running.wait(timeout=60) == 1


def test_repeats_find_no_prefix_of_each_other_and_shared_prefixes_are_told(folder, tmp_path):
    """Random prompts hit nothing though they run again and again; a shared prefix of 2 blocks is found by all but the first."""
    file = tmp_path / "out.json"
    common = f"--model {folder} --num-prompts 4 --output-len 2 --repeats 2 --bandwidth 10 --max-num-seqs 1 --output-json {file}"
    for flags, rate in (("--input-len 40", 0.0), ("--dataset-name prefix_repetition --prefix-repetition-prefix-len 32 "
                         "--prefix-repetition-suffix-len 8 --prefix-repetition-num-prefixes 1", 3 * 32 / (4 * 40))):
        assert main(["throughput", *common.split(), *flags.split(), *ENGINE]) == 0
        found = json.loads(file.read_text())["prefix_cache_hit_rate"]
        assert found == pytest.approx(rate), f"{flags}: a hit rate of {found}, expected {rate}"


def test_a_shape_needs_no_download(tmp_path):
    """--shape runs random weights in its true shape, without tokenizer or network."""
    file = tmp_path / "out.json"
    flags = "--shape tiny-cpu --num-prompts 1 --input-len 4 --output-len 2 --repeats 1 --num-warmups 0 --num-blocks 8"
    assert main(["throughput", *flags.split(), "--bandwidth", "10", "--device", "cpu", "--output-json", str(file)]) == 0
    assert json.loads(file.read_text())["model_id"] == "tiny-cpu"


def test_latency_is_told_as_vllm_tells_it():
    """Iterations of 1 to 5 s: their mean and the interpolated percentiles, in vLLM's words and keys."""
    backend = ScriptedBackend({None: [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]})
    seconds = latency.measure(backend, WORK, 1, 5, lambda: backend.now)
    results = latency.summarize([round(one, 6) for one in seconds])
    assert list(results) == ["avg_latency", "latencies", "percentiles"] and results["latencies"] == [1, 2, 3, 4, 5]
    assert latency.latency_lines(results)[:4] == [
        "Avg latency: 3.0 seconds", "10% percentile latency: 1.4 seconds", "25% percentile latency: 2.0 seconds",
        "50% percentile latency: 3.0 seconds"]
    assert list(results["percentiles"]) == ["10", "25", "50", "75", "90", "99"]


def test_the_latency_command_runs(folder, tmp_path, capsys):
    """From flags to print and JSON, with the prefix cache off."""
    file = tmp_path / "out.json"
    flags = "--input-len 4 --output-len 3 --batch-size 2 --num-iters-warmup 1 --num-iters 2"
    assert main(["latency", "--model", folder, *flags.split(), *ENGINE, "--output-json", str(file)]) == 0
    assert capsys.readouterr().out.startswith("Avg latency: ")
    assert len(json.loads(file.read_text())["latencies"]) == 2


# ---- What can be wrong ----


@pytest.mark.parametrize(("flags", "told"), [
    pytest.param("throughput --backend vllm", "--backend: vllm is not installed",
                 marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")),
    ("throughput --backend tgi", "--backend: invalid choice: 'tgi'"),
    ("throughput --backend hf hf", "--backend: must be each backend once"),
    ("throughput --baseline hf", "--baseline: must be one of the backends that run (minivllm)"),
    ("throughput --preset A --input-len 4", "--preset: --input-len was given"),
    ("throughput --input-len 0", "--random-input-len: must be 1 or more, got 0"),
    ("throughput --random-range-ratio 1", "--random-range-ratio: must be in [0, 1), got 1.0"),
    ("throughput --top-p 2", "--top-p: top_p must be"),
    ("throughput --repetition-penalty 0", "--repetition-penalty: repetition_penalty must be"),
    ("throughput --prefix-repetition-num-prefixes 3", "--dataset-name: --prefix-repetition-num-prefixes was given"),
    ("throughput --dataset-name prefix_repetition --num-prompts 3", "--num-prompts: must be at least the 10 prefixes, got 3"),
    ("throughput --repeats 0", "--repeats: must be 1 or more, got 0"),
    ("throughput --shape tiny-cpu --model x", "--shape: tiny-cpu has random weights"),
    ("throughput --model /nowhere", "--model: '/nowhere' does not exist"),
    ("throughput --max-num-seqs 0", "--max-num-seqs: max_num_seqs must be an integer >= 1, got 0"),
    ("throughput --backend hf --hf-static-cache --device cpu", "--hf-static-cache: needs CUDA"),
    ("throughput --hf-max-batch-size 2", "--hf-max-batch-size: is for the backends hf and hf-continuous, and none of them runs"),
    ("throughput --backend hf --hf-max-batch-size 0", "--hf-max-batch-size: must be 1 or more, got 0"),
    ("throughput --backend minivllm hf-continuous --repetition-penalty 1.1", "--repetition-penalty: must be left out"),
    ("throughput --temperature 3", "--temperature: temperature must be a finite number in [0, 2], got 3.0"),
    ("throughput --bandwidth inf", "--bandwidth: must be gigabytes a second, more than 0 and finite, got inf"),
    ("throughput --num-prompts 1 --input-len 8 --output-len 8 --max-model-len 12", "--max-model-len: is 12, and the"),
    ("throughput --num-prompts 1 --input-len 2048 --output-len 8 --backend hf", "--max-model-len: is 2048, and the longest"),
    ("latency --input-len 2048", "--max-model-len: is 2048, and the longest request has 2176 tokens with its answer"),
    ("throughput --async-engine", "--async-engine: is not implemented: the offline engine is measured"),
    ("throughput --dataset-path x.json", "--dataset-path: is not implemented: prompts are drawn"),
    ("throughput --output-json .", "--output-json: '.' is a folder: name a file in it"),
    ("latency --output-json /nowhere/x.json", "--output-json: '/nowhere/x.json' lies in a folder that does not exist"),
    ("latency --n 2", "--n: invalid choice: 2"),
    ("throughput --tensor-parallel-size 2", "--tensor-parallel-size: tensor_parallel_size=2 is not implemented"),
    ("throughput --num-promts 3", "unknown argument --num-promts: did you mean `--num-prompts`?"),
    ("latency --batch-size 0", "--batch-size: must be 1 or more, got 0"),
    ("serve --goodput tpot", "--goodput: must be METRIC:MILLISECONDS"),
    ("serve --goodput itl:3", "--goodput: must be METRIC:MILLISECONDS with a metric of ttft, tpot, e2el, got 'itl:3'"),
    ("serve --request-rate 0", "--request-rate: must be more than 0, got 0.0"),
    ("serve --metric-percentiles 50,101", "--metric-percentiles: must be numbers from 0 to 100"),
    ("serve --percentile-metrics ttft,tbt", "--percentile-metrics: must be some of ttft, tpot, itl, e2el, got 'tbt'"),
    ("serve --backend openai-chat --token-ids", "--token-ids: a conversation is text"),
    ("serve --base-url localhost:8000", "--base-url: must be an http or https URL"),
    ("serve --extra-body 3", "--extra-body: must be a JSON object, got 3"),
    ("serv", "unknown bench 'serv': use throughput, latency, anatomy, serve, speculation, scheduler"),
    ("", "the name of a bench is missing"),
])
def test_a_wrong_flag_is_told_in_one_line(capsys, flags, told):
    """One line on stderr that names the flag, and exit status 2, before anything is loaded."""
    try:
        status = main(flags.split())
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2, f"{flags!r} ended with {status}: {err}"
    assert told in err and err.count("\n") == 1, f"{flags!r} was answered with {err!r}"


def test_every_knob_of_the_engine_is_a_flag():
    """Every field of EngineConfig but those of text is a flag of its name; vLLM's neutral arguments are accepted."""
    known = {action.dest for action in throughput.build_parser("p")._actions}
    text = {"skip_tokenizer_init", "tokenizer", "chat_template", "generation_config"}
    assert set(ENGINE_FIELDS) - known == text, f"no flags: {set(ENGINE_FIELDS) - known}"
    argv = "--max_model_len=64 --no-enable-prefix-caching --tensor-parallel-size 1".split()
    args = throughput.parse_flags(throughput.build_parser("p"), argv)
    given = throughput.engine_kwargs(args)
    assert given == {"max_model_len": 64, "enable_prefix_caching": False, "tensor_parallel_size": 1}, f"{given}"
