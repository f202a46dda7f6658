"""What a CPU does to be fast: the same tokens as the readable rungs, with less copying."""

from __future__ import annotations

import functools
import json
import tempfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention import one_layer
from tiny_models import random_qwen2
from torch import nn

from minivllm import LLM, SamplingParams, standing_attention, threads
from minivllm import packed_linear as packed_linear_module
from minivllm.attention import AttentionMetadata, PagedAttention, gather_kv
from minivllm.bench.command import main as bench
from minivllm.config import EngineConfig
from minivllm.exceptions import ValidationError
from minivllm.packed_linear import PackedLinear, pack_linears
from minivllm.standing_attention import GROUP_POSITIONS, PADDING, ROOM, StandingAttention, group_by_padding
from minivllm.startup import decide_attention_backend

CPU = torch.device("cpu")


@functools.lru_cache(maxsize=1)
def checkpoint():
    return str(random_qwen2(tempfile.mkdtemp(), 3, dtype=torch.float32, vocab=97)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33, 300])
def test_a_packed_matrix_gives_the_product_of_the_plain_one(dtype, bias, rows):
    linear = nn.Linear(48, 72, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, 48, dtype=dtype)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


def test_every_matrix_is_packed_and_the_head_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))).requires_grad_(False)
    assert pack_linears(model, CPU, 8) == "packed by oneDNN"
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(("device", "seats", "dtype"), [
    ("cuda", 8, torch.float32), ("cpu", 1, torch.float32), ("cpu", 8, torch.float64)])
def test_where_packing_gains_nothing_the_matrices_stay(device, seats, dtype):
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype)).requires_grad_(False)
    assert pack_linears(model, torch.device(device), seats) == "as in the checkpoint"
    assert isinstance(model[0], nn.Linear)


def test_without_the_operator_the_plain_matrices_stay_and_the_report_says_so(monkeypatch):
    def missing(linear):
        raise AttributeError("no such operator")
    monkeypatch.setattr(packed_linear_module, "PackedLinear", missing)
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    assert "oneDNN does not pack here (no such operator)" in pack_linears(model, CPU, 8)
    assert isinstance(model[0], nn.Linear)


def decode_step(layer, seq_lens, keys, tables, block_size=4):
    """One token for each request: writes it, and attends with the same random numbers for every layer."""
    metadata = AttentionMetadata.build([1] * len(seq_lens), seq_lens, tables, block_size)
    metadata.request_keys = keys
    generator = torch.Generator().manual_seed(sum(seq_lens))
    q, k, v = (torch.randn(len(seq_lens), heads, 8, generator=generator) for heads in (4, 2, 2))
    q, k, v = (x.to(layer.kv_cache.dtype) for x in (q, k, v))
    layer.write(k, v, metadata.slot_mapping)
    return layer.attend(q, metadata)


def give_context(layers, table, length, block_size=4):
    """The same random keys and values for a request's first positions, in every layer."""
    slots = [table[position // block_size] * block_size + position % block_size for position in range(length)]
    k, v = torch.randn(2, length, 2, 8, dtype=torch.float64).to(layers[0].kv_cache.dtype)
    for layer in layers:
        layer.write(k, v, torch.tensor(slots))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, {}), (torch.bfloat16, {"rtol": 0.016, "atol": 0.004})])
def test_copies_follow_requests_that_come_move_and_go(dtype, tolerance):
    """Standing copies give what a gather of every step gives, while rows change places, members finish and others join. Whatever
    belongs to nobody is NaN.
    """
    torch.manual_seed(0)
    layers = [one_layer(600, 4, 2, 8, kind=kind) for kind in (PagedAttention, StandingAttention)]
    for layer in layers:
        layer.__init__(torch.full_like(layer.kv_cache, float("nan"), dtype=dtype), 4)
    tables = {key: torch.randperm(100)[:50].add(1 + 100 * key).tolist() for key in range(5)}
    lens, joining = {}, {0: {0: 5, 1: 9, 2: 60}, 7: {3: 30, 4: 2}}
    for step in range(ROOM + 20):
        for key, length in joining.get(step, {}).items():
            give_context(layers, tables[key], length)
            lens[key] = length
        if step == 15:
            del lens[1]
        if step == 40:
            del lens[2]  # the longest
        keys = sorted(lens, key=lambda key: (key * 7 + step) % 5)  # in other rows every time
        lens = {key: lens[key] + 1 for key in keys}
        plain, standing = (decode_step(layer, [lens[key] for key in keys], keys, [tables[key] for key in keys]) for layer in layers)
        torch.testing.assert_close(standing, plain, **tolerance)


def test_nothing_is_gathered_while_half_of_a_group_stays(monkeypatch):
    layer, gathered = one_layer(40, 4, 2, 8, kind=StandingAttention), []
    monkeypatch.setattr(standing_attention, "gather_kv", lambda *args: gathered.append(args[1].shape) or gather_kv(*args))
    layer.kv_cache.zero_()
    tables = {key: list(range(1 + 9 * key, 10 + 9 * key)) for key in range(4)}
    for length, keys in ((9, [0, 1, 2, 3]), (10, [3, 1, 0]), (11, [1, 3]), (12, [3]), (13, [3])):
        decode_step(layer, [length + key for key in keys], keys, [tables[key] for key in keys])
    assert gathered == [(4, 12), (4, 12), (1, 15), (1, 15)], "keys and values of the first step, and when less than half is left"


@given(st.lists(st.integers(1, 5000), max_size=40))
def test_a_group_wastes_no_more_than_it_may_and_nobody_is_left_out(lens):
    groups = group_by_padding(lens)
    assert sorted(row for group in groups for row in group) == list(range(len(lens)))
    for group in groups:
        longest = max(lens[row] for row in group)
        assert sum(longest - lens[row] for row in group) <= PADDING
        assert longest * len(group) <= GROUP_POSITIONS
    if lens and sum(max(lens) - length for length in lens) <= PADDING and max(lens) * len(lens) <= GROUP_POSITIONS:
        assert len(groups) == 1


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 80), (torch.bfloat16, 40), (torch.float64, 80)])
def test_copies_take_no_more_memory_than_the_pool(dtype, longest):
    """Two requests share 20 blocks of 4 slots. Copies are float32 at least: of half types they may hold half as many positions."""
    for length in (longest // 2, longest // 2 + 1):
        layer = StandingAttention(torch.zeros(2, 2, 80, 8, dtype=dtype), 4)
        table = [list(range(length // 4 + 1))] * 2
        decode_step(layer, [length, length], [0, 1], table)
        assert bool(layer.standing) == (2 * length <= longest)


def test_a_context_is_gathered_once_and_not_once_for_a_step():
    layer, gathers = one_layer(40, 4, 2, 8, kind=StandingAttention), []
    layer.key_cache.zero_()
    layer.value_cache.zero_()
    for length in range(10, 30):
        before = None if not layer.standing else layer.standing[0]
        decode_step(layer, [length], [0], [list(range(1, 30))])
        gathers.append(layer.standing[0] is not before)
    assert gathers == [True] + [False] * 19


def test_another_request_in_the_same_blocks_reads_no_copy_of_the_first():
    """Blocks are handed on, and a request of the very next length may get them: only its key tells them apart."""
    layer, table = one_layer(40, 4, 2, 8, kind=StandingAttention), [[1, 2, 3, 4]]
    layer.key_cache.normal_()
    layer.value_cache.normal_()
    decode_step(layer, [9], [0], table)
    layer.key_cache.normal_()  # the second request's prefill
    layer.value_cache.normal_()
    fresh = one_layer(40, 4, 2, 8)
    fresh.key_cache, fresh.value_cache = layer.key_cache.clone(), layer.value_cache.clone()
    torch.testing.assert_close(decode_step(layer, [10], [1], table), decode_step(fresh, [10], [1], table))


@pytest.mark.parametrize("num_blocks", [10, 30, 200])
def test_both_rungs_say_the_same_with_preemptions_and_without(num_blocks):
    prompts = [{"prompt_token_ids": [(7 * i + j) % 97 for j in range(3 + 5 * i)]} for i in range(6)]
    params = [SamplingParams(temperature=0, max_tokens=8 + 9 * (i % 3), ignore_eos=True, detokenize=False) for i in range(6)]
    answers = []
    for backend in ("paged_gather", "standing"):
        llm = LLM(checkpoint(), skip_tokenizer_init=True, attention_backend=backend, block_size=8, num_blocks=num_blocks,
                  max_num_seqs=4, max_num_batched_tokens=32)
        answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
        assert (llm.stats.num_preemptions > 0) == (num_blocks == 10)
        llm.close()
    assert answers[0] == answers[1]


def test_the_report_says_which_rung_and_how_the_weights_lie():
    llm = LLM(checkpoint(), skip_tokenizer_init=True, device="cpu")
    assert "packed by oneDNN" in llm.engine.report and "standing" in llm.engine.report
    llm.close()


def test_standing_copies_are_refused_off_the_cpu():
    shape = SimpleNamespace(head_dim=64)
    with pytest.raises(ValidationError, match="standing"):
        decide_attention_backend(EngineConfig(attention_backend="standing"), shape, torch.float64, torch.device("cuda"), 16)


def test_the_bench_of_the_scheduler_holds_its_queue(tmp_path, capsys):
    file = tmp_path / "out.json"
    flags = ["--num-waiting", "0", "50", "--num-steps", "20", "--max-num-seqs", "4", "--output-json", str(file)]
    assert bench(["scheduler", *flags]) == 0
    rows = json.loads(file.read_text())
    assert [row["waiting"] for row in rows] == [0, 50] and all(row["tokens_per_step"] > 3 for row in rows)
    assert "us/step" in capsys.readouterr().out


# Threads ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "quota"), [
    ({"cpu.max": "200000 100000"}, 2.0), ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
])
def test_a_containers_share_of_the_processor_is_read(tmp_path, files, quota):
    """Both versions of cgroups are understood; no file and no limit are the same."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert threads.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("mib", "quota", "variable", "expected"), [
    (100, 1.5, None, 2), (100, None, None, 8), (100, 16.0, None, 8), (100, 1.5, "OMP_NUM_THREADS", 8),
    (20, None, None, 1), (20, 1.5, None, 1), (20, None, "OMP_NUM_THREADS", 8)])
def test_threads_are_lowered_unless_somebody_has_said_how_many(monkeypatch, mib, quota, variable, expected):
    """Eight threads become two where the container may use one and a half cores, and one for a model of 20 MiB; never more, and
    never against the user.
    """
    now = [8]
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "8")
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    told = threads.set_num_threads(CPU, mib * 2**20)
    assert now[0] == expected
    assert told.startswith(str(expected)) and ("1.5 cores" in told, "so small a model" in told) == (expected == 2, expected == 1)
    now[0] = 8
    threads.set_num_threads(torch.device("cuda"), mib * 2**20)
    assert now[0] == 8, "on a GPU the processor's threads are nobody's business"
