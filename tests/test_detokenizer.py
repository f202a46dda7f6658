"""Lesson 13: streamed text equals the text decoded at once, and stop strings end it where they should."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minivllm import detokenizer
from minivllm.detokenizer import MAX_WAITING_TOKENS, IncrementalDetokenizer, TextStream, find_stop, num_held_back
from minivllm.sampling_params import SamplingParams

QWEN2_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"  # one picture: four people and three joiners
FLAG = "\U0001f1f2\U0001f1f2"
TEXTS = {
    "English": "The quick brown fox can't jump over 13 lazy dogs. The end.",
    "Chinese": "你好，世界！今天天气很好。",  # noqa: RUF001
    "Burmese": "မင်္ဂလာပါ ကမ္ဘာကြီး။",
    "emoji": f"hi {FAMILY} and {FLAG} ok \U0001f44d\U0001f3fd",
    "combining": "e\u0301 n\u0303 o\u0308\u0304 Z\u0351\u036b\u0343 \u0e01\u0e33",
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PADDED_VOCABULARY = 30  # so many ids beyond the last token, as in an embedding with more rows than the tokenizer has tokens


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen2's, small: half of the emoji and of the Burmese letters stay split over several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=list(SPECIALS))
    bpe.train_from_iterator([TEXTS["English"], TEXTS["Chinese"], TEXTS["Burmese"][:12]] * 20, trainer)
    bpe.add_tokens([AddedToken("<tool_call>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=list(SPECIALS))


def byte_token(byte: int) -> int:
    """The id of the token that is this one byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return make_tokenizer().convert_tokens_to_ids(chr(byte) if byte in printable else chr(256 + others.index(byte)))


def one_shot(token_ids, skip_special_tokens=True):
    return make_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def pieces(token_ids, sizes):
    """The ids in runs of these sizes (used in turn), as the steps of an engine bring them."""
    start, turn = 0, 0
    while start < len(token_ids):
        size = sizes[turn % len(sizes)]
        yield token_ids[start : start + size]
        start, turn = start + size, turn + 1


def stream(token_ids, sizes=(1,), stop_terminated=False, **params):
    """Feed the ids; returns the texts shown after each update, the final text, the stop string, and the detokenizer."""
    streamed = IncrementalDetokenizer(make_tokenizer(), SamplingParams(max_tokens=None, **params))
    shown, stop = [], None
    for run in pieces(token_ids, sizes):
        stop = streamed.update(run, stop_terminated=stop_terminated and run[-1:] == token_ids[-1:])
        shown.append(streamed.text)
        if stop is not None:
            break
    streamed.finish()
    return shown, streamed.text, stop, streamed


def check_stream(token_ids, sizes, skip_special_tokens=True):
    """The final text is the one-shot text, and every text shown on the way is a beginning of the next."""
    shown, text, _, _ = stream(token_ids, sizes, skip_special_tokens=skip_special_tokens)
    whole = one_shot(token_ids, skip_special_tokens)
    assert text == whole, f"streamed {text!r}, decoded at once {whole!r}, for ids {token_ids}"
    for index, (earlier, later) in enumerate(zip(shown, [*shown[1:], text])):
        assert later.startswith(earlier), f"update {index} showed {earlier!r}, which is no beginning of {later!r}"


def ids_strategy():
    vocabulary = len(make_tokenizer())
    any_id = st.integers(0, vocabulary - 1 + PADDED_VOCABULARY)
    not_ascii = st.sampled_from([byte_token(byte) for byte in range(128, 256)])
    return st.lists(st.one_of(any_id, not_ascii), max_size=60)


sizes_strategy = st.lists(st.integers(1, 5), min_size=1, max_size=4)


# Streaming


@pytest.mark.parametrize("language", TEXTS)
def test_t43_streamed_text_joins_to_the_whole_text_in_every_language(language):
    """Streamed pieces put together are the text decoded at once, and no half character is ever shown."""
    token_ids = make_tokenizer().encode(TEXTS[language] * 2)
    check_stream(token_ids, [1])
    shown = stream(token_ids)[0]
    assert not any("\ufffd" in text for text in shown), f"a replacement character was shown on the way: {shown}"


@given(text=st.text(max_size=40), sizes=sizes_strategy)
def test_t43_any_text_streams_without_half_characters(text, sizes):
    """Whatever the text, nothing is shown that is not a beginning of it."""
    token_ids = make_tokenizer().encode(text.replace("\ufffd", ""))
    check_stream(token_ids, sizes)
    for shown in stream(token_ids, sizes)[0]:
        assert "\ufffd" not in shown, f"{shown!r} was shown for {text!r}"


@given(token_ids=ids_strategy(), sizes=sizes_strategy, skip=st.booleans())
@example(token_ids=[byte_token(0xE4), 0, *map(byte_token, (0xBD, 0xA0))], sizes=[1], skip=True)  # a special token inside 你
@example(token_ids=[byte_token(0xE4), 0, *map(byte_token, (0xBD, 0xA0))], sizes=[1], skip=False)
@example(token_ids=[byte_token(0xE4), *[0] * 40, *map(byte_token, (0xBD, 0xA0))], sizes=[1], skip=True)
@example(token_ids=[byte_token(0xFF)] * 40 + [byte_token(65)], sizes=[1], skip=True)
def test_t43_random_tokens_stream_like_they_decode(token_ids, sizes, skip):
    """Random tokens, bytes that are no text, special tokens and ids beyond the vocabulary stream as they decode at once."""
    check_stream(token_ids, sizes, skip)


def test_t43_half_a_character_at_the_end_comes_with_the_end():
    """An answer cut off inside a character ends as the one-shot decode ends it, and not before it is over."""
    token_ids = [*make_tokenizer().encode("ok "), byte_token(0xF0), byte_token(0x9F)]
    shown, text, _, _ = stream(token_ids)
    assert shown[-1] == "ok ", f"before the end {shown[-1]!r} was shown instead of 'ok '"
    assert text == one_shot(token_ids) == "ok \ufffd", f"at the end the text is {text!r} instead of {one_shot(token_ids)!r}"


@given(kind=st.integers(0, 3), seed=st.integers(0, 999))
def test_no_run_of_tokens_makes_the_stream_wait_longer_and_longer(kind, seed):
    """However long a run of tokens gives no text, a new token costs no more than the last one."""
    generator = random.Random(seed)
    special, beyond = 0, len(make_tokenizer()) + 5
    kinds = [byte_token(0xFF)], [byte_token(0xE4), special], [beyond, special], [byte_token(b) for b in (0x80, 0xF0, 0xE4)]
    token_ids = [generator.choice(kinds[kind]) for _ in range(200)]
    text_stream = TextStream(make_tokenizer(), skip_special_tokens=True)
    text = ""
    for index, token_id in enumerate(token_ids):
        text += text_stream.push(token_id)
        waiting = len(text_stream.waiting)
        assert waiting < MAX_WAITING_TOKENS, f"after token {index} of the run, {waiting} tokens wait to be decoded again"
    assert text + text_stream.flush() == one_shot(token_ids), "the run's text is not the one-shot text"


def test_ids_beyond_the_vocabulary_have_no_text():
    """A model's embedding may have more rows than the tokenizer has tokens: such an id is an empty text, not a crash."""
    beyond = len(make_tokenizer()) + 7
    token_ids = [beyond, *make_tokenizer().encode("ab"), beyond]
    assert stream(token_ids)[1] == "ab", f"the text is {stream(token_ids)[1]!r}"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_kept_or_left_out(skip):
    """Special tokens are text only if asked for; tokens that were added without being special always are."""
    token_ids = make_tokenizer().encode("a<|im_end|>b<tool_call>c")
    wanted = "ab<tool_call>c" if skip else "a<|im_end|>b<tool_call>c"
    assert stream(token_ids, skip_special_tokens=skip)[1] == wanted, f"got {stream(token_ids, skip_special_tokens=skip)[1]!r}"


def test_t41_the_eos_token_is_not_in_the_text():
    """The token that ends a request has no text, unless stop strings are to be included; then it has what decoding gives it."""
    token_ids = make_tokenizer().encode("bye<|im_end|>")
    for include, wanted in ((False, "bye"), (True, "bye<|im_end|>")):
        _, text, stop, streamed = stream(token_ids, [2], stop_terminated=True, skip_special_tokens=False,
                                         include_stop_str_in_output=include)
        assert (text, stop) == (wanted, None), f"include={include} gave {text!r}, stop {stop!r}"
        assert streamed.num_tokens_kept == len(token_ids), f"{streamed.num_tokens_kept} of {len(token_ids)} tokens are counted"


@given(ids_strategy(), sizes_strategy, st.booleans(), st.booleans(), st.booleans())
@example([byte_token(228), byte_token(189)], [1], True, False, False)  # half a character is all there is
@example([byte_token(228), byte_token(189)], [1], True, True, False)  # its second half is the token that ended the request
def test_an_answer_taken_at_once_has_the_text_that_it_would_have_streamed(token_ids, sizes, skip, stop_terminated, include):
    """Whoever waits for the end gets the same text and count, whatever the tokens, and whether or not the last one is shown."""
    knobs = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    stop_terminated = stop_terminated and bool(token_ids)
    streamed = IncrementalDetokenizer(make_tokenizer(), SamplingParams(max_tokens=None, **knobs))
    runs = list(pieces(token_ids, sizes))
    for run in runs:
        streamed.update(run, stop_terminated=stop_terminated and run is runs[-1])
    streamed.finish()
    whole = IncrementalDetokenizer(make_tokenizer(), SamplingParams(max_tokens=None, **knobs))
    whole.take_all(token_ids, stop_terminated=stop_terminated)
    assert whole.text == streamed.text, f"at once {whole.text!r}, streamed {streamed.text!r}"
    assert whole.num_tokens_kept == streamed.num_tokens_kept == len(token_ids)
    whole.finish()
    assert whole.text == streamed.text, "to finish it once more changes nothing"


@pytest.mark.parametrize("missing", ["tokenizer", "detokenize"])
def test_without_a_tokenizer_there_is_no_text(missing):
    """An engine without a tokenizer, or a request that wants none of it, gets tokens and an empty text."""
    tokenizer = None if missing == "tokenizer" else make_tokenizer()
    streamed = IncrementalDetokenizer(tokenizer, SamplingParams(detokenize=missing != "detokenize"))
    assert streamed.update([3, 4, 5], stop_terminated=False) is None
    streamed.finish()
    assert (streamed.text, streamed.num_tokens_kept) == ("", 3), f"got {streamed.text!r}, {streamed.num_tokens_kept} tokens"
    whole = IncrementalDetokenizer(tokenizer, SamplingParams(detokenize=missing != "detokenize"))
    whole.take_all([3, 4, 5], stop_terminated=False)
    assert (whole.text, whole.num_tokens_kept) == ("", 3), f"at once {whole.text!r}, {whole.num_tokens_kept} tokens"


# Stop strings


def slow_find_stop(text, stops, num_safe=0):
    """The earliest end, then the earliest start, of a stop string that ends beyond the first `num_safe` characters."""
    hits = [(start + len(stop), start, stop) for stop in stops for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > num_safe]
    return min(hits, default=None)


def check_stops(token_ids, stops, sizes, include=False, min_tokens=0):
    """The streamed text ends where the slow spec ends the whole text, and what was shown before was right."""
    whole = one_shot(token_ids)
    num_safe = len(one_shot(token_ids[:min_tokens]).rstrip("\ufffd"))
    hit = slow_find_stop(whole, stops, num_safe)
    end, start, stop = hit or (len(whole), len(whole), None)
    shown, text, found, streamed = stream(token_ids, sizes, stop=stops, min_tokens=min_tokens,
                                          include_stop_str_in_output=include)
    assert found == stop, f"stopped at {found!r}, the first of {stops} to end in {whole!r} is {stop!r}"
    wanted = whole[: end if include else start]
    assert text == wanted, f"the text is {text!r} and should be {wanted!r}"
    for earlier in shown:
        assert text.startswith(earlier), f"{earlier!r} was shown, and the text turned out to be {text!r}"
    enough = one_shot(token_ids[: streamed.num_tokens_kept])
    assert stop is None or stop in enough, f"{streamed.num_tokens_kept} tokens are kept, and {stop!r} is not in them"


@given(seed=st.integers(0, 9999), num_stops=st.integers(1, 4), sizes=sizes_strategy, include=st.booleans(),
       min_tokens=st.integers(0, 12))
def test_t43_stop_strings_end_the_text_like_the_slow_spec(seed, num_stops, sizes, include, min_tokens):
    """The stop string that is complete first ends the text, wherever tokens begin and end."""
    generator = random.Random(seed)
    text = "".join(generator.choice(["a", "ab", "b", "你", FLAG, "é", " the", "."]) for _ in range(generator.randrange(1, 25)))
    cuts = [(start := generator.randrange(len(text)), start + generator.randrange(1, 6)) for _ in range(num_stops)]
    stops = [text[a:b] + generator.choice(["", "", "x"]) for a, b in cuts]
    token_ids = make_tokenizer().encode(text)
    check_stops(token_ids, stops, sizes, include, min(min_tokens, len(token_ids)))


def test_t43_a_stop_string_over_several_tokens_cuts_before_itself():
    """A stop string that arrives in pieces is never shown, not even its first piece."""
    token_ids = make_tokenizer().encode("Hello</stop>more")
    shown, text, stop, streamed = stream(token_ids, stop="</stop>")
    assert (text, stop) == ("Hello", "</stop>"), f"got {text!r}, stopped at {stop!r}, instead of 'Hello' and '</stop>'"
    assert max(shown, key=len) == "Hello", f"{max(shown, key=len)!r} was shown instead of 'Hello'"
    assert streamed.num_tokens_kept < len(token_ids), "tokens after the stop string are counted"


def test_of_two_that_end_together_the_longest_counts():
    """Where two stop strings end at the same character, the one that starts first is cut off."""
    found = find_stop("xab", 1, ["b", "ab"])
    assert found == (1, "ab"), f"of 'b' and 'ab' in 'xab' {found} is found instead of (1, 'ab')"


def test_only_what_can_become_a_stop_string_is_held_back():
    """Text is held back exactly as long as a stop string may still begin in it."""
    wanted = [("a", 0), ("a<", 1), ("a</s", 3), ("a</sx", 0), ("a</stop>", 0), ("a</<", 1), ("", 0)]
    for text, held in wanted:
        waiting = num_held_back(text, ["</stop>"])
        assert waiting == held, f"{waiting} characters of {text!r} wait, not {held}"


def test_held_back_text_comes_with_the_end():
    """If the request ends while a stop string could still come, the waiting characters are shown after all."""
    shown, text, stop, _ = stream(make_tokenizer().encode("wait</st"), stop="</stop>")
    assert shown[-1] == "wait", f"before the end {shown[-1]!r} was shown"
    assert (text, stop) == ("wait</st", None), f"at the end the text is {text!r}"


def test_stop_strings_wait_for_min_tokens():
    """A stop string that is complete within the first min_tokens tokens does not count; the next one does."""
    token_ids = [byte_token(ord(char)) for char in "a.b.c."]
    texts = {n: stream(token_ids, stop=".", min_tokens=n)[1] for n in range(6)}
    wanted = {0: "a", 1: "a", 2: "a.b", 3: "a.b", 4: "a.b.c", 5: "a.b.c"}
    assert texts == wanted, f"texts by min_tokens: {texts}"


# These checks can fail


class PerTokenStream(TextStream):
    def push(self, token_id):
        return self.decode([token_id])


class ForgetfulStream(TextStream):
    def flush(self):
        return ""


def first_in_list(text, num_new, stops):
    return next(((text.find(stop), stop) for stop in stops if stop in text), None)


def only_in_new_text(text, num_new, stops):
    found = find_stop(text[len(text) - num_new :], num_new, stops)
    return found and (found[0] + len(text) - num_new, found[1])


def check_everything():
    token_ids = [*make_tokenizer().encode("x a b你好 stop over " + FAMILY), byte_token(0xF0)]
    check_stream(token_ids, [1])
    check_stops(token_ids, ["er", "v"], [1])  # both in one token, " over"
    check_stops(token_ids, [" stop ", "b你"], [1])


@pytest.mark.parametrize(("name", "mistake"), [
    ("TextStream", PerTokenStream), ("TextStream", ForgetfulStream), ("find_stop", first_in_list),
    ("find_stop", only_in_new_text), ("num_held_back", lambda text, stops: 0),
])
def test_a_planted_mistake_is_caught(monkeypatch, name, mistake):
    """Decoding token by token, losing the end, taking the wrong stop string, missing one, showing too early: each is seen."""
    check_everything()
    monkeypatch.setattr(detokenizer, name, mistake)
    with pytest.raises(AssertionError):
        check_everything()
