"""The anatomy of a step: kernels in groups, a report that adds up, a clear word without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm.bench import anatomy
from minivllm.bench.command import main
from minivllm.input_batch import RowTensors


@pytest.mark.parametrize(("kernel", "group"), [
    ("nvjet_sm90_tst_64x8_64x16_2x4_h_bz_TNT", "matrix products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matrix products"),
    ("triton_red_fused_mm_t_view_2", "matrix products"),
    ("triton_red_fused__unsafe_view_add_mm_mul_silu_split_t_4", "matrix products"),
    ("triton_tem_fused_flex_attention_0", "attention"),
    ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_1", "norms, residual additions"),
    ("triton_red_fused__to_copy_add_div_mul_rsqrt_silu_sum_2", "matrix products"),  # of one token, with norm and SiLU inside
    ("triton_red_fused__to_copy_bmm_permute_transpose_unsqueeze_view_2", "matrix products"),
    ("triton_poi_fused_mul_silu_split_1", "SiLU times up"),
    ("triton_poi_fused__to_copy_add_arange_cat_ge_index_put_lt_mul_neg_remainder_split_sub_where_3", "rotation, KV write"),
    ("triton_per_fused__to_copy_add_arange_div_expand_ge_index_put_lt_mul_pow_rsqrt_sum_view_where_4", "matrix products"),
    ("triton_red_fused___rshift____to_copy_add_amax_arange_bitwise_and_3", "sampling"),
    ("triton_per_fused__to_copy_amax_clamp_eq_exp_index_masked_fill_mul_reciprocal_sub_sum_unsqueeze_view_0", "sampling"),
    ("Memset (Device)", "rows, masks, the rest"),
])
def test_a_kernel_is_grouped_by_what_it_mainly_does(kernel, group):
    """Generated and library kernels are told apart by their names: a product with a fused activation is a product."""
    assert anatomy.group_of(kernel) == group


def test_groups_add_up_and_come_in_order_of_cost():
    """No microsecond and no launch is lost, and the costliest group is first."""
    kernels = [("nvjet_a", 10.0, 24), ("triton_x_flex_attention_1", 30.0, 24), ("nvjet_b", 5.0, 1), ("Memset", 1.0, 2)]
    groups = anatomy.group_kernels(kernels)
    assert list(groups.items()) == [("attention", (30.0, 24)), ("matrix products", (15.0, 25)), (anatomy.OTHER, (1.0, 2))]


def test_the_report_tells_every_group_and_the_gaps():
    """Each group's share is of the whole step, and what the kernels leave over is told as gaps."""
    step = anatomy.Step(2, 600, 1.0, {"attention": (300.0, 24), "matrix products": (500.0, 97)}, 0.25)
    whole = {"ready_seconds": 3.0, "steps": [vars(step)], "prompts": {"num_prompts": 4, "prompt_len": 2048, "seconds": 0.02,
             "tokens_per_second": 4e5, "flops_per_second": 4e14, "matmul": 8e14, "groups": {"SiLU times up": (12_000.0, 24)}},
             "shared_prefix": {"shared_seconds": 0.02, "alone_seconds": 0.2, "ratio": 10.0},
             "environment": {"device": "a GPU", "dtype": "bfloat16", "num_threads": 1, "num_cpus": 1, "threading": {}}}
    text = "\n".join(anatomy.report_lines(whole))
    assert "2,000 tokens/s" in text and "(25%)" in text and "10.0x" in text and "50% of a large matrix product" in text
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert "30.0%" in lines["attention"] and "50.0%" in lines["matrix products"] and "20.0%" in lines["gaps between kernels"]
    assert "60.0%" in lines["SiLU times up"] and "40.0%" in lines["gaps, and the host before and after"]


@given(st.integers(1, 300), st.integers(1, 3000), st.floats(0, 0.99))
def test_contexts_spread_evenly_around_their_mean(count, mean, ratio):
    """The longest first, none below 1 - R or above 1 + R times the mean, which they have; all alike without R."""
    lens = anatomy.spread_lens(count, mean, ratio)
    assert len(lens) == count and lens == sorted(lens, reverse=True)
    assert min(lens) >= round(mean * (1 - ratio)) and max(lens) <= round(mean * (1 + ratio))
    assert abs(sum(lens) / count - mean) <= 0.5
    assert ratio or lens == [mean] * count


def test_a_replay_starts_each_row_a_little_before_its_length(monkeypatch):
    """Half of the replays come before a row has the length that is asked for, and half after; a short row starts at 0."""
    class Event:
        def __init__(self, **_) -> None:
            pass

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 50.0

    class Graph:
        def replay(self) -> None:
            seen.append(rows.positions.clone())
            rows.positions[:2] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seen, rows = [], RowTensors(3, 600, 9, 64, torch.device("cpu"))
    assert anatomy.timed_replays(Graph(), rows, [400, 30]) == 50.0 / anatomy.NUM_REPLAYS
    assert len(seen) == anatomy.NUM_REPLAYS and seen[0].tolist() == [400 - 1 - anatomy.NUM_REPLAYS // 2, 0, 0, 0]


def test_a_range_ratio_that_is_none_is_refused(capsys):
    assert main(["anatomy", "--shape", "tiny-cpu", "--random-range-ratio", "1.5"]) == 2
    assert "--random-range-ratio: must be at least 0 and below 1, got 1.5" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    """On a CPU one line names the flag and the reason, with exit status 2, before anything is loaded."""
    assert main(["anatomy", "--shape", "tiny-cpu", "--device", "cpu"]) == 2
    assert "--device: needs CUDA" in capsys.readouterr().err
