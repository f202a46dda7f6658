"""What a number is worth without: machine, versions, dtype. The `environment` block of every JSON, and the lines below a table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from minivllm.bench.flags import own_command
from minivllm.version import __version__

PACKAGES = ("torch", "transformers", "vllm")
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_")  # on a shared CPU, OMP_WAIT_POLICY alone was seen to change speed 50-fold


def describe_environment(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Versions, device and threads. vLLM's version is left out where it is not installed."""
    found: dict[str, Any] = {"minivllm": __version__, "python": platform.python_version()}
    found |= {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    found |= {"device": device_name(device), "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
              else os.cpu_count(), "num_threads": torch.get_num_threads(), "platform": platform.platform()}
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    threading = {name: value for name, value in os.environ.items() if name.startswith(THREADING)}
    return found | {"threading": threading, "command": own_command()}


def installed_version(name: str) -> str | None:
    """None where it is not installed. Whether it can be imported is another question: a mere folder of that name can."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """"NVIDIA H200", or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()


def environment_lines(environment: dict[str, Any]) -> list[str]:
    """The block as it is printed: machine first, then versions."""
    threads = f"{environment['num_threads']} threads on {environment['num_cpus']} CPUs"
    threads += "".join(f", {name}={value}" for name, value in sorted(environment["threading"].items()))
    versions = ", ".join(f"{name} {environment[name]}" for name in ("minivllm", *PACKAGES, "python") if name in environment)
    return [f"Device:    {environment['device']}, {environment.get('dtype', 'dtype unknown')}, {threads}", f"Versions:  {versions}"]
