"""Hypothesis profiles, who runs the tests, and one promise: no test needs the network, a GPU, or another test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test models are so small that a second thread only costs

import pytest  # the environment comes first
from hypothesis import HealthCheck, Phase, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", derandomize=True, database=None, max_examples=100, **COMMON)
settings.register_profile("deep", max_examples=2000, **COMMON)
# An exercise's tests: the same mistake tells the same story until it is mended, and one story at a time.
settings.register_profile("learn", derandomize=True, database=None, max_examples=100, report_multiple_bugs=False,
                          phases=[Phase.explicit, Phase.generate, Phase.shrink], **COMMON)
settings.load_profile("default")
MOST_WORKERS = 4  # each of them holds torch, and for a while a server or two


def num_workers(is_whole_suite: bool, num_cores: int) -> int:
    """How many processes share the tests. What somebody asked for by name starts sooner in this one."""
    return min(num_cores, MOST_WORKERS) if is_whole_suite and num_cores > 1 else 0


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let pytest-xdist run the whole suite on all cores, unless -n, or a debugger, says otherwise. Without it nothing changes."""
    options, is_worker = config.option, "PYTEST_XDIST_WORKER" in os.environ  # a worker reads this file too, and must not have any
    if getattr(options, "numprocesses", 0) is None and not (is_worker or options.usepdb or options.collectonly):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.numprocesses = num_workers(config.args_source == pytest.Config.ArgsSource.TESTPATHS, cores) or None
