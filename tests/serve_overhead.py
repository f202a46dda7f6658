"""What serving costs on top of the engine: 64 streams of 128 tokens over HTTP and the same requests by `LLM.generate`, in turns.

    OMP_NUM_THREADS=1 python tests/serve_overhead.py --rounds 7 --output-json overhead.json

A program and no test: it reads clocks. Wall time and the processes' own CPU time (Linux: /proc), medians over the rounds. The
client is a raw socket loop, since a library would use the second core for itself.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from serve_process import ServeProcess

from minivllm.bench.environment import describe_environment

FLAGS = ("--num-blocks", "3000", "--no-enable-prefix-caching", "--uvicorn-log-level", "warning")
OFFLINE = """
import json, sys, time
from minivllm import LLM, SamplingParams
llm = LLM(num_blocks=3000, enable_prefix_caching=False)
prompts, num_tokens = json.loads(sys.argv[1]), int(sys.argv[2])
params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def request(token_ids: list[int], num_tokens: int) -> bytes:
    body = json.dumps({"prompt": token_ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def serve_once(server: ServeProcess, prompts: list[list[int]], num_tokens: int) -> tuple[float, float, int]:
    """(wall, CPU) seconds until every stream has had its [DONE], and how many chunks came: one a token, if no reader was slow."""
    selector, ends, num_chunks = selectors.DefaultSelector(), dict.fromkeys(range(len(prompts)), b""), 0
    for index in ends:
        connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        selector.register(connection, selectors.EVENT_READ, index)
    time.sleep(0.1)
    cpu, began = cpu_seconds(server.process.pid), time.perf_counter()
    for key in list(selector.get_map().values()):
        key.fileobj.send(request(prompts[key.data], num_tokens))
    while selector.get_map():
        for key, _ in selector.select():
            piece = key.fileobj.recv(1 << 18)
            num_chunks += piece.count(b"data: {")
            ends[key.data] = (ends[key.data] + piece)[-40:]
            if b"data: [DONE]" in ends[key.data]:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return time.perf_counter() - began, cpu_seconds(server.process.pid) - cpu, num_chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    prompts = [[(7 * row + 13 * column) % 900 + 50 for column in range(16)] for row in range(args.streams)]
    command = [sys.executable, "-c", OFFLINE, json.dumps(prompts), str(args.output_len)]
    rows = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as offline, ServeProcess(*FLAGS) as server:
        assert offline.stdin is not None and offline.stdout is not None
        for number in range(args.rounds + 2):  # two to warm up
            print("go", file=offline.stdin, flush=True)
            row = [*json.loads(offline.stdout.readline()), *serve_once(server, prompts, args.output_len)]
            rows += [row] if number >= 2 else []
        offline.stdin.close()
    per_token = 1e6 / (args.streams * args.output_len)
    names = ("offline_wall", "offline_cpu", "server_wall", "server_cpu")
    result = {f"{name}_us_per_token": statistics.median(row[i] for row in rows) * per_token for i, name in enumerate(names)}
    result |= {"wall_ratio": statistics.median(row[2] / row[0] for row in rows),
               "cpu_ratio": statistics.median(row[3] / row[1] for row in rows),
               "chunks_per_token": min(row[4] for row in rows) / (args.streams * args.output_len), "rounds": rows}
    print("\n".join(f"{name:<28} {value:.3f}" for name, value in result.items() if isinstance(value, float)))
    if args.output_json:
        told = describe_environment(torch.device("cpu"), torch.float32) | {"command": "python tests/serve_overhead.py"}
        told |= {"streams": args.streams, "output_len": args.output_len}
        Path(args.output_json).write_text(json.dumps(told | result, indent=4) + "\n")


if __name__ == "__main__":
    main()
