"""The command line: from flags to one `EngineConfig` and one `ServerOptions`. Every mistake is one line that names the flag.

The flags are vLLM's. Those that minivllm lacks are accepted at the value that changes nothing and refused by name otherwise
(engine_args.py); one that nobody knows is answered with the nearest that exists.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from minivllm.config import ATTENTION_BACKENDS, DTYPES, LOAD_FORMATS, EngineConfig
from minivllm.engine_args import NEUTRAL, WITHOUT_EFFECT, engine_config_from_kwargs, nearest_name
from minivllm.exceptions import UnsupportedError, ValidationError
from minivllm.serve.connection import ConnectionOptions, add_connection_flags, take_connection_options
from minivllm.serve.limits import DEFAULT_BODY_BYTES
from minivllm.serve.service import ServerOptions
from minivllm.speculative_config import METHODS

EMBEDDED_NAME = "minivllm-tiny"
ENVIRONMENT = ("Environment: MINIVLLM_API_KEY, see --api-key; MINIVLLM_CACHE_ROOT, where compiled kernels are kept between starts "
               "(default: ~/.cache/minivllm); MINIVLLM_LOGGING_LEVEL (default: INFO); MINIVLLM_USE_MODELSCOPE=1.")
# vLLM's flags for what this server lacks -> the values at which they ask for nothing (engine_args.py has the engine's)
SERVER_NEUTRAL: dict[str, tuple[object, ...]] = {
    "lora_modules": (), "max_loras": (1,), "max_lora_rank": (16,), "override_generation_config": ({},),
    "enable_auto_tool_choice": (), "tool_call_parser": (), "trust_request_chat_template": (), "enable_log_requests": (),
    "enable_server_load_tracking": (), "enable_prompt_tokens_details": (True,),
}
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class ServeArgs:
    """Everything that the command line decides."""

    engine: EngineConfig
    server: ServerOptions
    host: str
    port: int
    uvicorn_log_level: str
    shutdown_timeout: float
    connection: ConnectionOptions

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage in front of the one line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: Sequence[str], prog: str = "minivllm serve") -> ServeArgs:
    """Exits with status 2 and one line on stderr for a wrong flag or value."""
    parser = build_parser(prog)
    flags = [_dashed(argument) for argument in argv]
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{nearest_name(unknown[0].partition('=')[0], known)}")
    values = {name: value for name, value in vars(given).items() if value is not None}
    try:
        return _to_serve_args(values)
    except ValidationError as error:
        flag = "" if error.parameter is None else f"--{error.parameter.replace('_', '-')}: "
        parser.error(f"{flag}{error}")


def _dashed(argument: str) -> str:
    """--max_model_len is --max-model-len, as in vLLM; a value after `=` stays as it is."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Serve a model over OpenAI's HTTP API.", epilog=ENVIRONMENT)
    _add_server_flags(parser.add_argument_group("server"))
    add_connection_flags(parser.add_argument_group("connections"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_engine_flags(parser.add_argument_group("engine"))
    known = {action.dest for action in parser._actions}
    for name in (*NEUTRAL, *WITHOUT_EFFECT, *SERVER_NEUTRAL):
        if name not in known:  # no help: they are here for scripts written for vLLM
            parser.add_argument(_flag(name), nargs="?", const=True, type=_json_or_text, help=argparse.SUPPRESS)
    return parser


def _add_server_flags(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: %(default)s)")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME",
                       help="names that requests may use; the first is shown in answers (default: the model as given, or "
                       f"{EMBEDDED_NAME})")
    group.add_argument("--api-key", nargs="+", metavar="KEY", action="extend",
                       help="keys that requests must carry, one of them (default: MINIVLLM_API_KEY, VLLM_API_KEY, or none)")
    group.add_argument("--ignore-unknown-fields", action="store_true", help="log unknown body fields instead of refusing them")
    group.add_argument("--metrics-prefix", default="minivllm", metavar="PREFIX",
                       help="of the names at /metrics; vllm gives vLLM's own (default: %(default)s)")
    group.add_argument("--disable-log-stats", action="store_true", help="no line about throughput and load every 10 seconds")
    group.add_argument("--max-num-queued-reqs", type=int, metavar="N",
                       help="most requests that run and wait together; more are answered 503 (default: no limit)")
    group.add_argument("--max-num-queued-tokens", type=int, metavar="TOKENS",
                       help="prompt tokens without a first answer token, at which more are answered 503 (default: no limit)")
    group.add_argument("--max-request-body-bytes", type=int, default=DEFAULT_BODY_BYTES, metavar="BYTES",
                       help="largest body; a larger one is answered 413 (default: %(default)s)")
    group.add_argument("--sse-keep-alive-interval", type=float, default=0.0, metavar="SECONDS",
                       help="a comment in streams that are silent for so long, for proxies with little patience (default: off)")
    group.add_argument("--step-control", action="store_true", help="let the live page pause, step and resume the engine")
    group.add_argument("--shutdown-timeout", type=float, default=0.0, metavar="SECONDS",
                       help="how long requests in flight may go on after Ctrl-C or SIGTERM (default: %(default)s)")
    group.add_argument("--uvicorn-log-level", choices=LOG_LEVELS, default="info", help="(default: %(default)s)")


def _add_model_flags(group: Any) -> None:
    group.add_argument("model_tag", nargs="?", metavar="MODEL",
                       help="folder or hub id (default: the toy model inside the package)")
    group.add_argument("--model", help="the same, as a flag")
    group.add_argument("--tokenizer", help="folder or hub id of the tokenizer (default: the model's)")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--load-format", choices=LOAD_FORMATS, help="where weights come from (default: auto)")
    group.add_argument("--dtype", choices=DTYPES, help="(default: auto)")
    group.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt + answer (default: the model's)")
    group.add_argument("--generation-config", help="auto, none (alias vllm) or a folder: where sampling defaults come from")
    group.add_argument("--chat-template", help="a Jinja template, or a file with one (default: the tokenizer's)")
    group.add_argument("--trust-remote-code", action="store_true", default=None,
                       help="accepted for vLLM's sake: nothing remote is ever executed")


def _add_engine_flags(group: Any) -> None:
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests that run at once")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="TOKENS", help="most tokens computed in one step")
    group.add_argument("--block-size", type=int, metavar="TOKENS", help="slots in a block of the KV cache")
    group.add_argument("--num-blocks", "--num-gpu-blocks-override", type=int, metavar="N", help="blocks in the KV cache")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="size of the KV cache, exactly")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="FRACTION",
                       help="share of the GPU's memory to use (default: 0.92)")
    for name, what in (("enable-prefix-caching", "reuse the blocks of equal prompt beginnings"),
                       ("enable-chunked-prefill", "split long prompts over steps")):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=f"{what} (default: on)")
    group.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction, default=None,
                       help="plan and launch a step while the one before it runs (default: on with CUDA, unless traced)")
    group.add_argument("--long-prefill-token-threshold", type=int, metavar="TOKENS",
                       help="most tokens of one prompt in a step while others wait")
    group.add_argument("--max-logprobs", type=int, metavar="N",
                       help="most logprobs a request may ask for, -1 for all (default: 20)")
    group.add_argument("--attention-backend", choices=ATTENTION_BACKENDS)
    group.add_argument("--enforce-eager", action="store_true", default=None,
                       help="no compiling and no CUDA graphs: a quick start, slow steps")
    group.add_argument("--speculative-config", type=_json_or_text, metavar="JSON",
                       help="guess ahead, for example {\"method\": \"ngram\", \"num_speculative_tokens\": 4}")
    group.add_argument("--spec-method", choices=METHODS, help="short for its method (default: draft_model)")
    group.add_argument("--spec-model", metavar="MODEL", help="short for its model, the draft (default: the toy model's own)")
    group.add_argument("--spec-tokens", type=int, metavar="N", help="short for its num_speculative_tokens")
    group.add_argument("--seed", type=int, help="of the engine, for requests without one (default: 0)")
    group.add_argument("--trace", metavar="FILE", help="record every step as JSON lines")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _json_or_text(text: str) -> object:
    """1 and {} as what they mean; anything else as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _to_serve_args(values: dict[str, Any]) -> ServeArgs:
    positional, model = values.pop("model_tag", None), values.pop("model", None)
    if positional and model and positional != model:
        raise ValidationError(f"{model!r} and the positional MODEL {positional!r} differ: give one", parameter="model")
    model = positional or model
    host, port, timeout = values.pop("host"), values.pop("port"), values.pop("shutdown_timeout")
    if not 0 <= port <= 65535:
        raise ValidationError(f"must be in [0, 65535], got {port}", parameter="port")
    interval = values.pop("sse_keep_alive_interval")
    for name, seconds in (("shutdown_timeout", timeout), ("sse_keep_alive_interval", interval)):
        if not 0 <= seconds < float("inf"):
            raise ValidationError(f"must be a number of seconds, 0 or more, got {seconds}", parameter=name)
    _refuse_missing(values)
    names = tuple(values.pop("served_model_name", None) or [model or EMBEDDED_NAME])
    keys = _api_keys(values.pop("api_key", None))
    limits = {name: values.pop(name, None) for name in ("max_num_queued_reqs", "max_num_queued_tokens", "max_request_body_bytes")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValidationError(f"must be 1 or more, got {value}", parameter=name)
    server = ServerOptions(names, model or EMBEDDED_NAME, keys, values.pop("ignore_unknown_fields"),
                           metrics_prefix=_metrics_prefix(values.pop("metrics_prefix")),
                           log_stats=not values.pop("disable_log_stats"), step_control=values.pop("step_control"),
                           sse_keep_alive_interval=interval, **limits)
    log_level, connection = values.pop("uvicorn_log_level"), take_connection_options(values)
    return ServeArgs(engine_config_from_kwargs(model=model, **values), server, host, port, log_level, timeout, connection)


def _refuse_missing(values: dict[str, Any]) -> None:
    for name, neutral in SERVER_NEUTRAL.items():
        value = values.pop(name, None)
        if value is not None and value not in neutral:
            raise UnsupportedError("is not implemented in minivllm: leave it out", parameter=name, value=value)


def _metrics_prefix(prefix: str) -> str:
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", prefix):
        raise ValidationError(f"must be letters, digits and underscores, got {prefix!r}", parameter="metrics_prefix")
    return prefix


def _api_keys(given: list[str] | None) -> tuple[str, ...]:
    """Flags win over the environment; empty keys are no keys."""
    keys = given or [os.environ.get("MINIVLLM_API_KEY") or os.environ.get("VLLM_API_KEY") or ""]
    return tuple(key for key in keys if key)
