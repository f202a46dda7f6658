"""Guesses that are right as often as was asked for: what speculation brings at a known acceptance, without a draft model.

Owns the proposer of `bench speculation`. It knows the answer of every request from an earlier run, and says its next tokens, but
for a set share of each answer, where it says a wrong one. Which positions of request i these are is drawn from (seed, i): the
same in every run, at every batch size. The share is exact, so that an answer of 500 tokens is no matter of luck.

    answer      8  3  3  7  5  2  9 ...        guesses of the request that has said 8 3      [3, 7, 6]    k = 3
    told        8  4  3  7  6  2  9 ...        the model says 3 7 5: two are right, 5 comes on top, the next guess is for 2
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from minivllm.request import Request
from minivllm.speculative import DraftRoom


class ReplayProposer:
    """Up to `num_tokens` guesses a request; `learn` tells it the answers. A request that it does not know gets none."""

    def __init__(self, num_tokens: int, vocab_size: int, seed: int = 0) -> None:
        self.num_tokens = num_tokens
        self.vocab_size = vocab_size
        self.seed = seed
        self.told: dict[tuple[int, ...], list[int]] = {}  # prompt -> what to say of its answer
        self.told_to: dict[str, list[int]] = {}  # the same by request, so that a prompt is hashed once
        self.last: dict[str, int] = {}  # how many guesses a request got last

    def learn(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], acceptance: float) -> None:
        """From now on say these answers, the share `acceptance` of each one's tokens right. Prompts must differ."""
        assert len(set(map(tuple, prompts))) == len(prompts), "two equal prompts would have one answer"
        self.told_to.clear()
        self.last.clear()
        self.told = {tuple(prompt): self._tell(number, answer, acceptance)
                     for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))}

    def _tell(self, number: int, answer: Sequence[int], acceptance: float) -> list[int]:
        places = range(len(answer))
        wrong = set(random.Random(self.seed * 1_000_003 + number).sample(places, round(len(answer) * (1 - acceptance))))
        return [(token + 1) % self.vocab_size if place in wrong else token for place, token in zip(places, answer)]

    def propose(self, requests: Sequence[Request], room: DraftRoom) -> dict[str, list[int]]:
        drafts = {}
        for request in requests:
            told = self.told_to.get(request.request_id)
            if told is None:
                told = self.told_to[request.request_id] = self.told.get(tuple(request.prompt_token_ids), [])
            coming = told[request.num_output_tokens : request.num_output_tokens + self.num_tokens]
            drafts[request.request_id] = coming[: room.reserve(request, len(coming))] if coming else coming
            self.last[request.request_id] = len(drafts[request.request_id])
        return drafts

    @property
    def num_short_ends(self) -> int:
        """How many requests since `learn` have ended with fewer guesses than k, all of them right: ends are by length here, so a
        wrong one among the last would have been followed by another step.
        """
        return sum(0 < number < self.num_tokens for number in self.last.values())

    def close(self) -> None:
        pass
