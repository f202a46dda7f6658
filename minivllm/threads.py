"""How many threads a CPU's matrix products may use. torch takes one for each core of the machine, and a container is often
allowed the time of two of them: 64 threads that share two cores' time wait for each other most of it. And a model like the
embedded one, whose products take some 20 microseconds, loses by every thread that has to be woken for them.

Owns one number, which is the whole process's. What the user says (OMP_NUM_THREADS, MKL_NUM_THREADS) stands; more than the quota
is lowered to it, and a small model gets one.

    threads = min(cores that torch sees, quota rounded up)      8 cores, 200 ms of each 100 ms -> 2
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SMALL_BYTES = 32 * 2**20  # of weights. 23 MB: one thread is faster than two; 111 MB: slower at 64 requests (docs/ledger_cpu.md)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that this container may use, None for no limit. Linux's cgroups, version 2 and 1."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # "200000 100000", or "max 100000"
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def set_num_threads(device: torch.device, weight_bytes: int) -> str:
    """Lower torch's threads to the quota, or to one for a small model, where nobody has said how many; returns what to tell."""
    before, quota, given = torch.get_num_threads(), cpu_quota(), [name for name in VARIABLES if name in os.environ]
    few = math.ceil(quota or before), f"the container may use the time of {quota or before:g} cores"
    wanted, reason = (1, "in so small a model a second one costs more than it brings") if weight_bytes < SMALL_BYTES else few
    if device.type == "cpu" and not given and wanted < before:
        torch.set_num_threads(wanted)
        return f"{torch.get_num_threads()}, not {before}: {reason}"
    return f"{before}" + (f" ({given[0]})" if given else "")
