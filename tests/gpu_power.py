"""What reading and arithmetic cost an NVIDIA GPU in joules: `python tests/gpu_power.py`. Not a test: the clock is in it.

Each operation runs alone for some seconds while nvidia-smi is asked for watts and MHz; the second half of that time counts.
A GPU that has reached its power limit lowers its clock, so there an operation is as fast as it is frugal.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

HIDDEN, GATE_UP, INNER = 3584, 37_888, 18_944  # Qwen2.5-7B
READ_NUMBERS = 1 << 31  # 4.3 GB of bfloat16, far more than any cache holds
QUERY = ["nvidia-smi", "--query-gpu=power.draw.instant,clocks.sm", "--format=csv,noheader,nounits", "-lms", "50"]


class PowerMeter:
    """What nvidia-smi says, twenty times a second: (time, watts, MHz)."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float, float]] = []
        self.process = subprocess.Popen(QUERY, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            watts, mhz = line.split(",")
            self.readings.append((time.perf_counter(), float(watts), float(mhz)))

    def means(self, start: float, end: float) -> tuple[float, float]:
        """Watts and MHz between two times."""
        inside = [reading for reading in self.readings if start <= reading[0] <= end]
        return statistics.fmean(watts for _, watts, _ in inside), statistics.fmean(mhz for *_, mhz in inside)


def measure(meter: PowerMeter, name: str, operation: Callable[[], object], num_bytes: int, flops: int, seconds: float) -> dict:
    """Microseconds, watts, MHz and joules of one `operation`, which moves `num_bytes` and computes `flops`."""
    begin, times = time.perf_counter(), []
    while (now := time.perf_counter()) - begin < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(10):
            operation()
        last.record()
        last.synchronize()
        times.append((now, first.elapsed_time(last) * 100))
    half = begin + seconds / 2
    microseconds = statistics.median(elapsed for at, elapsed in times if at >= half)
    watts, mhz = meter.means(half, time.perf_counter())
    return {"name": name, "us": microseconds, "watts": watts, "mhz": mhz, "joules": microseconds * 1e-6 * watts,
            "bytes": num_bytes, "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[192, 256, 8192], help="rows of the products")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each operation runs (default: %(default)s)")
    parser.add_argument("--output-json", metavar="FILE", type=Path)
    args = parser.parse_args()
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    meter, results = PowerMeter(), []
    numbers = torch.randn(READ_NUMBERS, **kind).view(-1, 1 << 20)
    results.append(measure(meter, "read", functools.partial(numbers.sum, 1), 2 * READ_NUMBERS, READ_NUMBERS, args.seconds))
    for matrix, out, width in (("gate_up", GATE_UP, HIDDEN), ("down", HIDDEN, INNER)):
        weights = {"random": torch.randn(out, width, **kind), "zeros": torch.zeros(out, width, **kind)}
        for (values, weight), count in itertools.product(weights.items(), args.num_tokens):
            product = functools.partial(F.linear, torch.randn(count, width, **kind), weight)
            moved, flops = 2 * (weight.numel() + count * (out + width)), 2 * count * out * width
            results.append(measure(meter, f"{matrix}, {count} tokens, {values}", product, moved, flops, args.seconds))
    meter.process.kill()
    for one in results:
        print(f"{one['name']:28} {one['us']:8.1f} us {one['watts']:4.0f} W {one['mhz']:5.0f} MHz {1e3 * one['joules']:8.2f} mJ "
              f"{one['flops'] / one['us'] * 1e-6:4.0f} TFLOP/s {one['bytes'] / one['us'] * 1e-6:5.2f} TB/s")
    if args.output_json:
        args.output_json.write_text(json.dumps(results, indent=4), encoding="utf-8")


if __name__ == "__main__":
    main()
