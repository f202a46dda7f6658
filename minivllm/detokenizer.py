"""Lesson 13. From token ids to text, one token at a time, and where a stop string ends it.

Owns one request's text. Never decides what is sampled; the engine asks it once a step. A token is bytes, not characters:
a character may need several tokens, and a token may hold the end of one and the start of the next. So text comes out
late, but never wrong and never twice:

    tokens      "Hi"   " "   e4 bd   a0      "."   "</"     "end>"        stop string "</end>"
    shown       Hi     Hi_   Hi_     Hi_你   ...   Hi_你.   Hi_你.
    held back                half a 你             "</"     cut here

Everything shown, joined, is what `tokenizer.decode` gives for all the tokens at once (trap T43).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from minivllm.sampling_params import SamplingParams

# A character is at most 4 bytes, so at most 3 tokens wait for a good reason. Beyond this many, look why the stream waits.
MAX_WAITING_TOKENS = 16


class TextStream:
    """`tokenizers`' incremental decoder, with an end and a bound on what waits in it.

    Fed token by token, a `DecodeStream` says nothing while its text ends in U+FFFD, which is how half a character looks.
    A model can say bytes that never become one, and then the stream waits, and decodes all that waits, forever.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        # transformers wraps the tokenizers library's own class
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.skip_special_tokens = skip_special_tokens
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self.waiting: list[int] = []  # what the stream has taken in since it last gave text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens at once, without any tidying of spaces: what streaming has to add up to."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that this token completes. Ids beyond the tokenizer's vocabulary (a padded embedding) have none.

        `stream.step` gives text or None. Ids without text are `waiting`, and with MAX_WAITING_TOKENS of them `_release` is asked.
        """
        text = self.stream.step(self.tokenizer, token_id)
        if text is not None:
            self.waiting.clear()
            return text
        self.waiting.append(token_id)
        return self._release() if len(self.waiting) >= MAX_WAITING_TOKENS else ""

    def flush(self) -> str:
        """The text of what still waits, half characters as U+FFFD. The stream is empty afterwards."""
        text = self.decode(self.waiting)
        self._restart([])
        return text

    def _release(self) -> str:
        """Give the text of the waiting tokens, but for the last few that may be half a character.

        A cut is safe if both sides decode to the same as the whole: no character lies across it, nor will one when more
        comes. Tokens without text (skipped special ones) would make any cut look safe, so they go first.
        """
        self.waiting = [token_id for token_id in self.waiting if self.decode([token_id])]
        whole = self.decode(self.waiting)
        for cut in reversed(range(len(self.waiting))):
            text = self.decode(self.waiting[:cut])
            if text + self.decode(self.waiting[cut:]) == whole:
                self._restart(self.waiting[cut:])
                return text
        self._restart([])
        return ""

    def _restart(self, token_ids: list[int]) -> None:
        """Forget everything but these tokens, whose text is still to come."""
        self.waiting = token_ids
        self.stream = DecodeStream(ids=token_ids, skip_special_tokens=self.skip_special_tokens)


class IncrementalDetokenizer:
    """The text of one request as it grows. `text` is what may be shown: it only ever gets longer.

    What could still become a stop string is held back, and no more than that: vLLM holds back as many characters as the
    longest stop string has, less one.

    The prompt's tokens are not read: the text is the decoded output, whatever stood before it. vLLM primes its decoder
    with the prompt, so there an output that starts with the second half of a character completes it.
    """

    def __init__(self, tokenizer: Any | None, params: SamplingParams) -> None:
        is_wanted = tokenizer is not None and params.detokenize
        self.stream = TextStream(tokenizer, params.skip_special_tokens) if is_wanted else None
        self.stops = params.stop_strings
        self.includes_stop = params.include_stop_str_in_output
        self.min_tokens = params.min_tokens
        self.num_tokens_kept = 0  # output tokens up to the end, the one that completed a stop string included
        self.is_finished = False
        self._text = ""
        self._num_held = 0  # characters at the end of _text that may be the beginning of a stop string

    @property
    def text(self) -> str:
        """All text that is certain; after `finish` all text, without the stop string (unless it was to be included)."""
        return self._text[: len(self._text) - self._num_held]

    def update(self, new_token_ids: Sequence[int], *, stop_terminated: bool) -> str | None:
        """Take in a step's tokens; returns the stop string that they complete, which ends the text, or None.

        `stop_terminated`: the last id is the EOS or a stop token. Such a token has no text, unless stop strings have.
        """
        assert not self.is_finished, "a request's text has ended, and tokens still come"
        hidden = int(stop_terminated and not self.includes_stop)  # its text, "<|im_end|>" say, is no part of the answer
        for token_id in new_token_ids[: len(new_token_ids) - hidden]:
            stop = self._append(token_id)
            if stop is not None:
                return stop
        self.num_tokens_kept += hidden
        return None

    def take_all(self, token_ids: Sequence[int], *, stop_terminated: bool) -> None:
        """`update` for each token of an answer and `finish`, in one go, four to nine times as fast. Not for stop strings."""
        assert not self.stops and not self.num_tokens_kept, "an answer that is followed token by token has its text already"
        hidden = int(stop_terminated and not self.includes_stop)
        self._text = "" if self.stream is None else self.stream.decode(token_ids[: len(token_ids) - hidden])
        self.num_tokens_kept, self.is_finished = len(token_ids), True

    def finish(self) -> None:
        """The request has ended: show what was held back. Harmless if a stop string has ended the text before."""
        if not self.is_finished and self.stream is not None:
            self._text += self.stream.flush()
        self.is_finished, self._num_held = True, 0

    def _append(self, token_id: int) -> str | None:
        """Add one token's text. A stop string counts if it is complete, and more than min_tokens tokens are there.

        As in vLLM a stop string may begin within the first min_tokens tokens, but not end there.
        """
        self.num_tokens_kept += 1
        piece = "" if self.stream is None else self.stream.push(token_id)
        if not piece:
            return None
        self._text += piece
        if not self.stops:
            return None
        found = find_stop(self._text, len(piece), self.stops) if self.num_tokens_kept > self.min_tokens else None
        if found is not None:
            start, stop = found
            self._text = self._text[: start + len(stop) if self.includes_stop else start]
            # What still waits in the stream lies behind the stop string: it is dropped, not flushed.
            self.is_finished, self._num_held = True, 0
            return stop
        self._num_held = 0 if self.includes_stop else num_held_back(self._text, self.stops)
        return None


def find_stop(text: str, num_new: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the earliest stop string to end within the last `num_new` characters of the text, or None.

    Of several that end at the same character the longest counts, so that no part of a stop string is left before it.
    """
    found = []
    for stop in stops:
        # From here on a stop string can't end in what an earlier call has searched: each character is looked at once.
        start = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), start, stop))
    return min(found)[1:] if found else None


def num_held_back(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of the text that a stop string, longer than it, begins with: "a</s" and "</stop>" give 3.

    No stop string that ends later can begin before these characters, so all text in front of them is certain.
    """
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
