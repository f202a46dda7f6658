"""A real server process: started on a free port, awaited, and stopped by a signal.

    with ServeProcess(folder, "--num-blocks", "64") as server:
        httpx.get(server.url + "/health")
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from serve_doubles import CHATML, make_tokenizer

START_SECONDS = 120
LONG = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def make_model_folder(path: Path) -> Path:
    """A random Qwen2 of 320 tokens and 4,096 positions with tokenizer and chat template: it speaks nonsense, quickly."""
    from tiny_models import random_qwen2

    tokenizer = make_tokenizer()
    _, folder = random_qwen2(path, seed=1, vocab=len(tokenizer), max_position_embeddings=4096, eos_token_id=2)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.9, "top_k": 50}')
    return folder


# Serves with an engine that fails, or hangs, in the first step after a file of that name appears in the folder.
FAULTY = """
import os, sys, time
from minivllm.model_runner import ModelRunner
from minivllm.serve.server import main
run = ModelRunner.execute_model
def execute_model(self, output):
    if os.path.exists(sys.argv[1] + "/fail"):
        raise RuntimeError("CUDA error: out of luck")
    if os.path.exists(sys.argv[1] + "/hang"):
        time.sleep(60)
    time.sleep(0.005)
    return run(self, output)
ModelRunner.execute_model = execute_model
main()
"""


# Serves with an engine whose steps fail whenever a request with token 13 in its prompt is in them.
POISONED = """
from minivllm.model_runner import ModelRunner
from minivllm.serve.server import main
run, poisoned = ModelRunner.execute_model, set()
def execute_model(self, output):
    poisoned.update(new.request_id for new in output.new_requests if 13 in new.token_ids[:new.num_prompt_tokens])
    if poisoned & output.num_scheduled_tokens.keys():
        raise IndexError("list index out of range")
    return run(self, output)
ModelRunner.execute_model = execute_model
main()
"""


class ServeProcess:
    """`python -m minivllm.serve ARGUMENTS` as a child process; with `program`, that Python code in its place."""

    def __init__(self, *arguments: object, wait: bool = True, program: str | None = None, **environment: str) -> None:
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        what = ["-m", "minivllm.serve"] if program is None else ["-c", program]
        command = [sys.executable, *what, *map(str, arguments)]
        if "--port" not in command:
            command += ["--port", "0"]
        clean = {name: value for name, value in os.environ.items() if not name.endswith("LLM_API_KEY")}
        self.process = subprocess.Popen(command, stdout=self.out, stderr=self.err, env=clean | environment,
                                        cwd=Path(__file__).parent.parent)
        self.url = self._wait_for_banner() if wait else ""

    def _wait_for_banner(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"curl -s (https?://\S+?)/v1", self.read(self.out)):
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{self.read(self.err)}")

    @staticmethod
    def read(stream) -> str:
        """All that the process has written so far."""
        return os.pread(stream.fileno(), 1 << 20, 0).decode()

    @property
    def stdout(self) -> str:
        return self.read(self.out)

    @property
    def stderr(self) -> str:
        return self.read(self.err)

    def stop(self, number: int = signal.SIGINT) -> tuple[int, float]:
        """Send the signal; returns (exit status, seconds until the process had ended)."""
        sent = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(30)
        return status, time.monotonic() - sent

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.out.close()
        self.err.close()


class InFlight:
    """A long request on a thread of its own. A streamed one is known to run when it has its first chunk."""

    def __init__(self, server, **body):
        self.lines, self.status, self.body = [], None, {}
        self.has_begun = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(server.url, LONG | body))
        self.thread.start()

    def _run(self, url, body):
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            self.status = response.status_code
            if body.get("stream"):
                for line in response.iter_lines():
                    self.has_begun.set()
                    self.lines += [line.removeprefix("data: ")] if line else []
            else:
                self.body = json.loads(response.read())

    def result(self):
        self.thread.join(10)
        assert not self.thread.is_alive(), "the connection was closed"
        return self
