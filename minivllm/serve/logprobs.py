"""Log-probabilities in the two forms of OpenAI's API: parallel lists for completions, a list of objects for chat.

Owns how a token is shown: its text, its bytes, where it starts in the answer. A token can be half a character: its text is
then U+FFFD, and only its bytes tell what it holds. The bytes of all tokens joined are the answer's UTF-8; vLLM encodes the
shown text instead, so there a split emoji comes back as replacement characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minivllm.detokenizer import IncrementalDetokenizer
from minivllm.request import Logprob
from minivllm.sampling_params import SamplingParams

LOWEST = -9999.0  # JSON has no -inf; vLLM's stand-in
Entries = Sequence[Mapping[int, Logprob] | None]  # one per token; None for a prompt's first, which nothing predicts


def clamp(logprob: float) -> float:
    """NaN compares false with everything, so it becomes the lowest too."""
    return logprob if logprob > LOWEST else LOWEST


class TokenNames:
    """How tokens are shown; shared by all requests of a server."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_of = _byte_level_alphabet() if type(decoder).__name__ == "ByteLevel" else None
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def text(self, token_id: int, entry: Logprob | None, *, as_id: bool = False) -> str:
        if as_id:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        if token_id not in self._texts:
            self._texts[token_id] = self.tokenizer.decode([token_id])
        return self._texts[token_id]

    def utf8(self, token_id: int, text: str) -> list[int]:
        """The bytes that a token stands for. A byte-level vocabulary spells each byte as one printable character."""
        spelled = None if self._byte_of is None or token_id in self._added else self.tokenizer.convert_ids_to_tokens(token_id)
        if spelled is None or any(char not in self._byte_of for char in spelled):  # type: ignore[operator]
            return list(text.encode("utf-8", "replace"))
        return [self._byte_of[char] for char in spelled]  # type: ignore[index]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def ranked(entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    """The tokens of one position, most likely first."""
    return sorted(entry.items(), key=lambda item: item[1].rank)


class TextOffsets:
    """Where each token starts in the text, counted in characters. A token that completes a character starts where it does."""

    def __init__(self, tokenizer: Any, start: int, *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(skip_special_tokens=skip_special_tokens))
        self._start = start

    def take(self, token_id: int) -> int:
        offset = self._start + len(self._detokenizer.text)
        self._detokenizer.update([token_id], stop_terminated=False)
        return offset


class CompletionLogprobs:
    """Writes the form of completions, chunk by chunk: `text_offset` goes on where the last chunk ended."""

    def __init__(self, names: TokenNames, offsets: TextOffsets, *, as_ids: bool = False) -> None:
        self.names = names
        self.offsets = offsets
        self.as_ids = as_ids

    def write(self, token_ids: Sequence[int], entries: Entries) -> dict[str, list[Any]]:
        """Four lists of equal length, with null for an entry of None."""
        tokens, values, tops = [], [], []
        for token_id, entry in zip(token_ids, entries):
            own = None if entry is None else entry[token_id]
            tokens.append(self.names.text(token_id, own, as_id=self.as_ids))
            values.append(None if own is None else clamp(own.logprob))
            tops.append(None if entry is None else self._top(entry))
        offsets = [self.offsets.take(token_id) for token_id in token_ids]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _top(self, entry: Mapping[int, Logprob]) -> dict[str, float]:
        """The sampled token is always among them, so k asked for can be k + 1. Of equal texts the likelier one is kept."""
        top: dict[str, float] = {}
        for token_id, logprob in ranked(entry):
            top.setdefault(self.names.text(token_id, logprob, as_id=self.as_ids), clamp(logprob.logprob))
        return top


def chat_logprobs(names: TokenNames, token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]], num_top: int, *,
                  as_ids: bool = False) -> dict[str, Any]:
    """The form of chat: one object per token, with its bytes and the `num_top` likeliest (-1: all that there are)."""

    def show(token_id: int, logprob: Logprob) -> dict[str, Any]:
        utf8 = names.utf8(token_id, names.text(token_id, logprob))
        return {"token": names.text(token_id, logprob, as_id=as_ids), "logprob": clamp(logprob.logprob), "bytes": utf8}

    content = []
    for token_id, entry in zip(token_ids, entries):
        top = ranked(entry) if num_top == -1 else ranked(entry)[:num_top]
        content.append(show(token_id, entry[token_id]) | {"top_logprobs": [show(*item) for item in top]})
    return {"content": content, "refusal": None}


def prompt_logprobs_json(names: TokenNames, entries: Entries | None) -> list[Any] | None:
    """vLLM's extra: for every prompt token null or {token id: {logprob, rank, decoded_token}}."""

    def show(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {"logprob": clamp(logprob.logprob), "rank": logprob.rank, "decoded_token": names.text(token_id, logprob)}

    if entries is None:
        return None
    return [None if entry is None else {str(token_id): show(token_id, logprob) for token_id, logprob in entry.items()}
            for entry in entries]
