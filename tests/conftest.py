"""Hypothesis profiles and one promise: no test needs the network, a GPU, or another test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test models are so small that a second thread only costs

from hypothesis import HealthCheck, Phase, settings  # the environment comes first

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", derandomize=True, database=None, max_examples=100, **COMMON)
settings.register_profile("deep", max_examples=2000, **COMMON)
# An exercise's tests: the same mistake tells the same story until it is mended, and one story at a time.
settings.register_profile("learn", derandomize=True, database=None, max_examples=100, report_multiple_bugs=False,
                          phases=[Phase.explicit, Phase.generate, Phase.shrink], **COMMON)
settings.load_profile("default")
