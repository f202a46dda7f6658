"""`scheduler`: microseconds that the scheduler takes for a step, with few requests waiting and with many.

Owns a model that takes no time: every request that is due gets token 7. So what is left is the host's own bookkeeping, queues
and blocks, and it must not grow with the queue. No torch.

    python -m minivllm.bench scheduler --num-waiting 0 100 10000
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minivllm.bench.flags import OneLineParser, parse_flags, require, require_at_least
from minivllm.config import EngineConfig
from minivllm.kv_cache import KVCacheManager
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import ModelOutput

PROMPT, ANSWER, BLOCK = 64, 64, 16  # tokens


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Microseconds of scheduling a step.")
    parser.add_argument("--num-waiting", type=int, nargs="+", default=[0, 100, 1000, 10_000], help="(default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="requests that run (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=1000, help="timed steps (default: %(default)s)")
    parser.add_argument("--output-json", metavar="FILE")
    return parser


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args = parse_flags(build_parser(prog), argv)
    require_at_least(args, 1, "max_num_seqs", "num_steps")
    for number in args.num_waiting:
        require(number >= 0, "num_waiting", "0 or more", number)
    rows = [measure(number, args.max_num_seqs, args.num_steps, clock) for number in args.num_waiting]
    print(f"{args.max_num_seqs} requests run; each step that ends one admits one and adds one to the queue")
    print(f"{'waiting':>9}{'us/step':>10}{'p99':>9}{'tokens/step':>13}{'us/token':>10}")
    for row in rows:
        print(f"{row['waiting']:>9,}{row['median_us']:>10.1f}{row['p99_us']:>9.1f}{row['tokens_per_step']:>13.1f}"
              f"{row['us_per_token']:>10.2f}")
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return 0


def measure(num_waiting: int, num_running: int, num_steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Times of `schedule` and `update_from_output` together, with the queue held at its length."""
    scheduler = make_scheduler(num_running)
    num_added, seconds, num_tokens = 0, [], 0
    for step in range(-2 * ANSWER, num_steps):  # the first answers bring the requests out of step with each other
        while len(scheduler.requests) < num_running + num_waiting:
            length = PROMPT + num_added % PROMPT
            scheduler.add_request(Request(str(num_added), [num_added % 50_000 + 100] * length, SamplingParams(), max_tokens=ANSWER))
            num_added += 1
        start = clock()
        output = scheduler.schedule()
        due = [request.request_id for request in scheduler.running if request.num_computed_tokens == request.num_tokens]
        scheduler.update_from_output(output, ModelOutput({request_id: [7] for request_id in due}))
        if step >= 0:
            seconds.append(clock() - start)
            num_tokens += len(due)
    ordered = sorted(seconds)
    return {"waiting": num_waiting, "running": num_running, "median_us": statistics.median(seconds) * 1e6,
            "p99_us": ordered[len(ordered) * 99 // 100] * 1e6, "tokens_per_step": num_tokens / num_steps,
            "us_per_token": sum(seconds) / max(num_tokens, 1) * 1e6}


def make_scheduler(num_running: int) -> Scheduler:
    longest = 4 * PROMPT
    num_blocks = num_running * (longest // BLOCK) + 1
    config = EngineConfig(num_blocks=num_blocks, block_size=BLOCK, max_num_batched_tokens=2048, max_num_seqs=num_running,
                          max_model_len=longest)
    return Scheduler(config, KVCacheManager(num_blocks, BLOCK, True, longest))
