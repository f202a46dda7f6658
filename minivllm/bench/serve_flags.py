"""The flags of `serve`: vLLM's names, checked before the first request is sent.

Owns what may be asked and what follows from it: base URL, limits of goodput, metrics, request ids, the place of the result.
"""

from __future__ import annotations

import argparse
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from minivllm.bench.flags import OneLineParser, flag, json_or_text, parse_flags, require, require_at_least
from minivllm.bench.serve_metrics import GOODPUT_METRICS, METRICS, ServeOptions
from minivllm.bench.workload import Source, add_workload_flags, requests_from_flags
from minivllm.exceptions import ValidationError

BACKENDS = ("openai", "vllm", "openai-chat")
ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="What clients of an OpenAI server see.")
    _add_server_flags(parser.add_argument_group("server"))
    add_workload_flags(parser)
    _add_traffic_flags(parser.add_argument_group("traffic"))
    _add_result_flags(parser.add_argument_group("result"))
    group = parser.add_argument_group("sampling", "sent with every request if given; else the server's defaults hold")
    for name in SAMPLING:
        group.add_argument(flag(name), type=int if name == "top_k" else float)
    group.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="every answer as long as asked, "
                       "since both data sets have exact lengths, as vLLM's tool does for random (default: %(default)s)")
    group.add_argument("--extra-body", type=json_or_text, metavar="JSON", help="more fields of the body")
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=BACKENDS, default="openai", help="(default: %(default)s)")
    group.add_argument("--base-url", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    group.add_argument("--endpoint", help="(default: /v1/completions, or /v1/chat/completions)")
    group.add_argument("--model", help="(default: the first that the server names)")
    group.add_argument("--served-model-name", help="the name to send, if it differs from --model")
    group.add_argument("--tokenizer", help="folder or hub id (default: the model's, if this machine has it; else the embedded "
                       "model's, and a line on stderr)")
    group.add_argument("--token-ids", action="store_true", help="send prompts as token ids: exact lengths, no tokenizing")
    group.add_argument("--ready-check", "--ready-check-timeout-sec", nargs="?", type=float, const=600.0, default=0.0,
                       metavar="SECONDS", help="wait so long for the server to answer (default: 0; without a number: 600)")


def _add_traffic_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--request-rate", type=float, default=math.inf, help="requests a second (default: all at once)")
    group.add_argument("--burstiness", type=float, default=1.0, help="shape of the gaps; 1 is Poisson (default: %(default)s)")
    group.add_argument("--max-concurrency", type=int, metavar="N", help="most requests under way at once")
    group.add_argument("--num-warmups", type=int, default=0, help="requests sent before, of the same lengths and with prompts of "
                       "their own, not counted (default: %(default)s)")
    group.add_argument("--request-id-prefix", metavar="TEXT", help="in front of the request's number in its x-request-id header "
                       "(default: bench- and eight random hexadecimal digits)")
    group.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    group.add_argument("--run-id", help="mixed into the seed of the prompts' tokens, so that a second run finds nothing of the "
                       "first in a prefix cache (default: a new one each time, printed; pass it to repeat a run exactly)")


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl", help="of ttft, tpot, itl, e2el (default: %(default)s)")
    group.add_argument("--metric-percentiles", default="99", help="comma-separated (default: %(default)s)")
    group.add_argument("--goodput", nargs="+", metavar="METRIC:MS", help="limits that a good request keeps: ttft:200 tpot:50")
    group.add_argument("--save-result", action="store_true", help="write a JSON file")
    group.add_argument("--save-detailed", action="store_true", help="with an entry for each request")
    group.add_argument("--result-dir", metavar="FOLDER")
    group.add_argument("--result-filename", metavar="FILE")
    group.add_argument("--label", help="first part of the file's name (default: the backend)")


def parse(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, ServeOptions]:
    """Flags and options. Raises `ValidationError` for a value that cannot be."""
    args = parse_flags(build_parser(prog), argv)
    require(args.request_rate > 0, "request_rate", "more than 0", args.request_rate)
    require(0 < args.burstiness < math.inf, "burstiness", "more than 0 and finite", args.burstiness)
    require(args.max_concurrency is None or args.max_concurrency >= 1, "max_concurrency", "1 or more", args.max_concurrency)
    require_at_least(args, 0, "num_warmups", "ready_check")
    for name in SAMPLING:  # the server says what is in range; infinity and NaN it cannot be sent, for JSON has neither
        require(-math.inf < (getattr(args, name) or 0) < math.inf, name, "a finite number", getattr(args, name))
    require(args.extra_body is None or isinstance(args.extra_body, dict), "extra_body", "a JSON object", args.extra_body)
    args.request_id_prefix = choose_id_prefix(args.request_id_prefix)
    if args.token_ids and args.backend == "openai-chat":
        raise ValidationError("a conversation is text: use --backend openai, or leave it out", parameter="token_ids")
    if args.base_url is None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        args.base_url = f"http://{host}:{args.port}"
    require(args.base_url.startswith(("http://", "https://")), "base_url", "an http or https URL", args.base_url)
    args.base_url = args.base_url.rstrip("/").removesuffix("/v1")
    args.endpoint = args.endpoint or ENDPOINTS[args.backend]
    requests_from_flags(args, Source.of(args.seed, range(1)))  # for its errors: they are told before a server is asked
    options = ServeOptions(args.request_rate, args.max_concurrency, parse_goodput(args.goodput),
                           parse_metrics(args.percentile_metrics), parse_percentiles(args.metric_percentiles))
    return args, options


def extra_body(args: argparse.Namespace) -> dict[str, object]:
    """Sampling parameters that were given, and --extra-body over them."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return given | (args.extra_body or {})


def api_key() -> str | None:
    """OPENAI_API_KEY, as vLLM's tool reads it."""
    return os.environ.get("OPENAI_API_KEY")


def choose_id_prefix(given: str | None) -> str:
    """The prefix that was asked for, else vLLM's: another one in every run. Raises `ValidationError` for what no header holds."""
    prefix = f"bench-{uuid.uuid4().hex[:8]}-" if given is None else given
    require(prefix.isascii() and prefix.isprintable(), "request_id_prefix", "printable ASCII", prefix)
    return prefix


def result_path(args: argparse.Namespace, name: str) -> Path:
    """The file of the result, in a folder that is made here. Raises `ValidationError` that names the flag at fault.

    Asked before the run too: a measurement of an hour is not lost to a folder that cannot be.
    """
    folder = Path(args.result_dir or ".")
    path = folder / (args.result_filename or name)
    parameter = "result_dir"
    try:
        _require_writable_folder(folder)
        parameter = "result_filename" if args.result_filename else "label"
        _require_writable_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: name a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except (OSError, ValueError) as error:  # the latter for a NUL inside
        raise ValidationError(f"cannot be used: {error}", parameter=parameter) from error
    return path


def _require_writable_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")


def parse_metrics(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        require(name in METRICS, "percentile_metrics", f"some of {', '.join(METRICS)}", name)
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    require(all(0 <= value <= 100 for value in values), "metric_percentiles", "numbers from 0 to 100 and commas", text)
    return values


def parse_goodput(pairs: Sequence[str] | None) -> dict[str, float] | None:
    """{"ttft": 200.0} from ["ttft:200"], in milliseconds."""
    if pairs is None:
        return None
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        wanted = f"METRIC:MILLISECONDS with a metric of {', '.join(GOODPUT_METRICS)}"
        require(name in GOODPUT_METRICS, "goodput", wanted, pair)
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        require(0 <= limits[name] < math.inf, "goodput", wanted, pair)
    return limits
