"""How many threads a CPU's matrix products may use. torch takes one for each core of the machine, and a container is often
allowed the time of two of them: 64 threads that share two cores' time wait for each other most of it.

Owns one number. What the user says (OMP_NUM_THREADS, MKL_NUM_THREADS) stands; more than the quota is lowered to it.

    threads = min(cores that torch sees, quota rounded up)      8 cores, 200 ms of each 100 ms -> 2
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Cores' worth of time that this container may use, None for no limit. Linux's cgroups, version 2 and 1."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # "200000 100000", or "max 100000"
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def set_num_threads(device: torch.device) -> str:
    """Lower torch's threads to the quota where nobody has said how many; returns what to tell about it."""
    before, quota = torch.get_num_threads(), cpu_quota()
    given = [name for name in VARIABLES if name in os.environ]
    if device.type == "cpu" and not given and quota is not None and math.ceil(quota) < before:
        torch.set_num_threads(math.ceil(quota))
        return f"{torch.get_num_threads()}, not {before}: the container may use the time of {quota:g} cores"
    return f"{before}" + (f" ({given[0]})" if given else "")
