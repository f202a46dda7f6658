"""`bench speculation`: guesses as often right as asked for, tables whose numbers follow from the counters, equal answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from test_engine import greedy, make_llm, prompts_of, tokens_of

from minivllm.bench.command import main
from minivllm.bench.replay import ReplayProposer
from minivllm.bench.speculation import combine
from minivllm.speculative_config import tokens_per_step

ENGINE = ["--block-size", "16", "--device", "cpu"]


def test_a_replay_is_right_as_often_as_asked_and_in_the_same_places_every_time():
    """Of each 1,000 tokens exactly the share, wrong ones never by chance right, in places drawn from seed and request."""
    answers = [[index * 7 % 90 + number for index in range(1000)] for number in range(4)]
    prompts = [[number] for number in range(4)]
    room = SimpleNamespace(reserve=lambda request, number: number)
    for share in (0.0, 0.5, 0.9, 1.0):
        told = []
        for _ in range(2):
            proposer = ReplayProposer(1000, 97, seed=3)
            proposer.learn(prompts, answers, share)
            requests = [SimpleNamespace(request_id=str(n), prompt_token_ids=[n], num_output_tokens=0) for n in range(4)]
            told.append(list(proposer.propose(requests, room).values()))
        assert told[0] == told[1], "the same seed draws the same places"
        wrong = [[place for place in range(1000) if line[place] != answer[place]] for line, answer in zip(told[0], answers)]
        assert [1000 - len(places) for places in wrong] == [1000 * share] * 4, f"{[len(places) for places in wrong]} are wrong"
        assert share in (0, 1) or wrong[0] != wrong[1], "each request has places of its own"
    stranger = SimpleNamespace(request_id="9", prompt_token_ids=[9], num_output_tokens=0)
    assert proposer.propose([stranger], room) == {"9": []}, "who is not known gets no guess"


def test_the_engine_says_the_same_with_a_replay_and_counts_what_was_right():
    """Answers are those without guesses, and where all guesses are right every verification brings k + 1 tokens."""
    prompts, llm = prompts_of(9, 5, 14), make_llm(speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    answers = tokens_of(make_llm().generate(prompts, greedy(17), use_tqdm=False))
    proposer = llm.engine.proposer = llm.engine.scheduler.proposer = ReplayProposer(3, 97)
    for share in (1.0, 0.6, 0.0):
        before = (llm.stats.num_drafts, llm.stats.num_accepted_tokens)
        proposer.learn(prompts, answers, share)
        assert tokens_of(llm.generate(prompts, greedy(17), use_tqdm=False)) == answers, f"guesses that are right to {share:.0%}"
        drafts, accepted = llm.stats.num_drafts - before[0], llm.stats.num_accepted_tokens - before[1]
        assert share != 1 or (drafts, accepted) == (12, 36), f"17 tokens: one with the prompt, then four times four, not {drafts}"
        assert share or accepted == 0
    proposer.learn(prompts, answers, 1.0)
    llm.generate(prompts, greedy(16), use_tqdm=False)  # the last verification has two guesses
    assert proposer.num_short_ends == 3


def test_the_command_compares_and_writes_what_it_printed(tmp_path, capsys):
    """Random weights on a CPU: equal answers, the shares that were asked for, and a table of the same numbers as the JSON."""
    file = tmp_path / "out.json"
    argv = ["speculation", "--shape", "tiny-cpu", "--batch-size", "1", "2", "--acceptance", "0", "1", "--input-len", "6",
            "--output-len", "14", "--num-speculative-tokens", "3", "--repeats", "1", "--num-warmups", "0"]
    assert main([*argv, "--output-json", str(file), *ENGINE]) == 0
    whole, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [(row["batch_size"], row["acceptance"]) for row in whole["rows"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for row in whole["rows"]:
        assert row["num_differing_answers"] == 0 and row["measured_acceptance"] == row["acceptance"], f"{row}"
        assert row["num_preemptions"] == 0 and row["num_steps"] == (14 if row["acceptance"] == 0 else 5), f"{row}"
        assert row["speedup"] == row["output_tokens_per_second"] / row["plain_output_tokens_per_second"]
        assert f"{row['speedup']:.2f}x" in printed
    assert whole["environment"]["torch"] and "command" in whole["environment"] and whole["model_id"] == "tiny-cpu"
    assert "1 + a + ... + a^3 > cost" in printed


def test_what_a_row_says_follows_from_its_counters():
    """Of 10 verifications with 4 guesses, 3 complete and 26 right: each other one ended at a wrong guess."""
    row = {"milliseconds_per_step": 1.5, "num_drafts": 10, "num_accepted_tokens": 26, "num_complete": 3, "acceptance": 0.8,
           "output_tokens_per_second": 300.0}
    found = combine(row, {"milliseconds_per_step": 1.0, "output_tokens_per_second": 150.0}, 4)
    assert found["measured_acceptance"] == 26 / 33 and found["tokens_per_verification"] == 3.6 and found["speedup"] == 2
    assert tokens_per_step(found["break_even_acceptance"], 4) == pytest.approx(1.5, rel=1e-6), "there it brings what it costs"
    assert combine(row | {"milliseconds_per_step": 9.0}, {"milliseconds_per_step": 1.0, "output_tokens_per_second": 150.0},
                   4)["break_even_acceptance"] > 1, "what costs nine steps never pays with four guesses"


@pytest.mark.parametrize(("flags", "named"), [
    (["--acceptance", "1.5"], "--acceptance"), (["--batch-size", "0"], "--batch-size"),
    (["--num-speculative-tokens", "0"], "--num-speculative-tokens"), (["--speculative-config", "{}"], "--speculative-config")])
def test_a_wrong_flag_is_one_line(flags, named, capsys):
    """Status 2 and the flag's name, before anything is loaded."""
    try:
        status = main(["speculation", "--shape", "tiny-cpu", *flags])
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and named in error and error.count("\n") == 1
