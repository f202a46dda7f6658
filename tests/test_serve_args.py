"""The command line: vLLM's flags, one line for every mistake."""

from __future__ import annotations

import dataclasses
import socket

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from minivllm.cli import main as minivllm
from minivllm.config import EngineConfig
from minivllm.serve.args import build_parser, parse_args
from minivllm.serve.server import banner, bind, main


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch):
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_without_arguments_the_toy_model_is_served_at_home():
    """127.0.0.1:8000, no key, the embedded checkpoint under its own name."""
    args = parse_args([])
    assert (args.host, args.port, args.is_loopback) == ("127.0.0.1", 8000, True)
    assert args.server.served_model_names == ("minivllm-tiny",)
    assert args.server.api_keys == ()
    assert args.engine.model is None


def test_the_model_may_be_positional_or_a_flag():
    """`serve M` and `serve --model M`, also both if they agree; the served name is the model as given."""
    for argv in (["M"], ["--model", "M"], ["M", "--model", "M"]):
        args = parse_args(argv)
        assert (args.engine.model, args.server.served_model_names, args.server.model_root) == ("M", ("M",), "M")
    assert parse_args(["M", "--served-model-name", "a", "b"]).server.served_model_names == ("a", "b")


def test_engine_flags_reach_the_engine():
    """By vLLM's names, with its alias for the number of blocks, and with underscores as vLLM takes them."""
    argv = ["--max-model-len", "512", "--max_num_seqs", "8", "--max-num-batched-tokens=1024", "--block-size", "4",
            "--dtype", "float32", "--num-gpu-blocks-override", "99", "--generation-config", "none", "--seed", "7",
            "--no-enable-prefix-caching", "--long-prefill-token-threshold", "64",
            "--max-logprobs", "5", "--enforce-eager", "--gpu-memory-utilization", "0.5", "--trace", "t.jsonl",
            "--device", "cpu", "--chat-template", "{{ x }}"]
    engine = parse_args(argv).engine
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size) == (512, 8, 1024, 4)
    assert (engine.num_blocks, engine.generation_config, engine.seed, engine.dtype) == (99, "none", 7, "float32")
    assert (engine.enable_prefix_caching, engine.enable_chunked_prefill, engine.enforce_eager) == (False, True, True)
    assert not parse_args(["--no-enable-chunked-prefill"]).engine.enable_chunked_prefill
    assert (engine.long_prefill_token_threshold, engine.max_logprobs, engine.gpu_memory_utilization) == (64, 5, 0.5)
    assert (engine.trace, engine.device, engine.chat_template) == ("t.jsonl", "cpu", "{{ x }}")


def test_every_knob_of_the_engine_has_a_flag():
    """A field that is added to EngineConfig gets a flag here, or a reason why not."""
    flags = {action.dest for action in build_parser("x")._actions}
    without_text = {"skip_tokenizer_init"}  # the server speaks text
    missing = {field.name for field in dataclasses.fields(EngineConfig)} - flags - without_text
    assert not missing, f"no flag for {missing}"


def test_keys_come_from_flags_or_else_from_the_environment(monkeypatch):
    """Several by flag; MINIVLLM_API_KEY, then VLLM_API_KEY; an empty one is none."""
    assert parse_args(["--api-key", "a", "b", "--api-key", "c"]).server.api_keys == ("a", "b", "c")
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert parse_args([]).server.api_keys == ("theirs",)
    monkeypatch.setenv("MINIVLLM_API_KEY", "ours")
    assert parse_args([]).server.api_keys == ("ours",)
    assert parse_args(["--api-key", "a"]).server.api_keys == ("a",)
    assert parse_args(["--api-key", ""]).server.api_keys == ()


MISTAKES = {
    "not a number": (["--port", "http"], "--port: invalid int value: 'http'"),
    "port out of range": (["--port", "70000"], "--port: must be in [0, 65535], got 70000"),
    "block size": (["--block-size", "0"], "--block-size: block_size must be an integer >= 1"),
    "dtype": (["--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
    "no value": (["--model"], "--model: expected one argument"),
    "near miss": (["--max-model-length", "5"], "unknown argument --max-model-length: did you mean `--max-model-len`?"),
    "nonsense": (["--zzz"], "unknown argument --zzz"),
    "abbreviation": (["--max-model", "5"], "unknown argument --max-model"),
    "two models": (["a", "--model", "b"], "--model: 'b' and the positional MODEL 'a' differ"),
    "tensor parallel": (["--tensor-parallel-size", "2"], "--tensor-parallel-size: tensor_parallel_size=2 is not implemented"),
    "quantization": (["--quantization", "awq"], "--quantization: quantization='awq' is not implemented"),
    "lora": (["--enable-lora"], "--enable-lora: enable_lora=True is not implemented"),
    "lora modules": (["--lora-modules", "a=b"], "--lora-modules: is not implemented in minivllm: leave it out"),
    "tool calls": (["--enable-auto-tool-choice"], "--enable-auto-tool-choice: is not implemented"),
    "logging of prompts": (["--enable-log-requests"], "--enable-log-requests: is not implemented"),
    "budget": (["--max-num-batched-tokens", "5", "--max-model-len", "9", "--no-enable-chunked-prefill"],
               "--max-num-batched-tokens: max_num_batched_tokens=5 is smaller than max_model_len=9"),
    "patience": (["--shutdown-timeout", "nan"], "--shutdown-timeout: must be a number of seconds"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_flag_is_one_line_and_exit_2(argv, message, capsys):
    """The line names the flag and says what would be right; nothing else is printed."""
    with pytest.raises(SystemExit) as exit_:
        parse_args(argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert message in err
    assert (out, err.count("\n")) == ("", 1), "one line"


def test_vllms_other_flags_are_accepted_where_they_ask_for_nothing():
    """A start line written for vLLM works as long as it asks for what there is."""
    parse_args(["--tensor-parallel-size", "1", "--trust-remote-code", "--disable-log-stats", "--load-format", "auto",
                "--pipeline-parallel-size=1", "--kv-cache-dtype", "auto", "--max-loras", "1", "--override-generation-config", "{}",
                "--enable-prompt-tokens-details"])


def test_a_port_in_use_is_one_line_before_anything_is_loaded(capsys):
    """The message names the port; torch has not been asked for anything."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert f"--port: 127.0.0.1:{port} is in use: stop the other server or pass another --port" in err
    assert err.count("\n") == 1


def test_a_host_that_does_not_exist_is_one_line(capsys):
    """So is an address that is not ours."""
    assert main(["--host", "no.such.host.invalid"]) == 1
    assert "--host: cannot listen on 'no.such.host.invalid'" in capsys.readouterr().err


def test_a_bound_socket_does_not_listen_yet():
    """Until the model is there, clients are refused, and no second server can take the port."""
    with bind("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())


def test_the_banner_is_a_command_that_can_be_pasted():
    """URL and curl; a wildcard address becomes one that can be opened; a key is mentioned when there is one."""
    assert "http://127.0.0.1:8001/v1/chat/completions" in banner(parse_args(["--host", "0.0.0.0"]), 8001)
    assert "http://[::1]:80/v1" in banner(parse_args(["--host", "::1"]), 80)
    assert "MINIVLLM_API_KEY" in banner(parse_args(["--api-key", "k"]), 80)


def test_which_addresses_only_this_machine_reaches():
    """The warning about a missing key is for all others."""
    for host, is_ours in (("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False)):
        assert parse_args(["--host", host]).is_loopback is is_ours, host


def test_the_minivllm_command_names_its_subcommands(capsys):
    """--help and --version answer; a wrong or missing subcommand is one line and exit 2."""
    assert minivllm(["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert minivllm(["--version"]) == 0
    for argv in ([], ["sevre"]):
        assert minivllm(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        minivllm(["serve", "--port", "x"])
    assert "minivllm serve: error" in capsys.readouterr().err
