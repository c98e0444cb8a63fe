"""Text so far, token by token, against what the tokenizer decodes in one go."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as tk
from tokenizers import decoders

from textgym.mdp import Reply, Task, TokenMDP
from textgym.rewards import Reward, TextBatch, as_reward, dense
from textgym.tokens import Tokenizer, load_tokenizer, symbol_tokenizer

TEXTS = [
    "The cat's café — naïve, 12.5 % off!",
    "  two leading spaces\n\n\tand a tab ",
    "雪だるま ☃ and 🎉🎊 party 👩‍🚀 \u0301",
    "x ' y n't . , ! I 'm",
    "Ünïcödé ß \u2028 \x00 \ufffd!",
]
WORDS = ["▁", "▁▁", "▁the", "▁a", "cat", "s", "é", "雪", "▁x▁y", "<0x", "."]


def wrapped(backend: tk.Tokenizer, name: str) -> Tokenizer:
    return Tokenizer(backend, name=name, bos_id=None, stop_ids=(), recipe=(wrapped, ()))


def byte_level() -> Tokenizer:
    """A byte-level BPE with tokens that end inside characters, and added tokens of both kinds."""
    backend = tk.Tokenizer(tk.models.BPE())
    backend.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens(["<eos>"])
    backend.add_tokens(["<think>", "two words", "snow ☃", "été"])
    return wrapped(backend, "byte-level")


def sentencepiece(decoder: Any) -> Tokenizer:
    """Pieces with `▁` for spaces, and a token for every byte."""
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = tk.Tokenizer(
        tk.models.BPE({w: i for i, w in enumerate(vocabulary)}, [], unk_token="<unk>")
    )
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.add_tokens(["two words"])
    return wrapped(backend, "sentencepiece")


def fallback(*more: Any) -> Any:
    first = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*first, *more])


MAKERS = {
    "embedded": lambda: load_tokenizer("embedded"),
    "byte_level": byte_level,
    "llama": lambda: sentencepiece(fallback(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: sentencepiece(fallback()),
    "metaspace": lambda: sentencepiece(decoders.Metaspace()),
    "metaspace_never": lambda: sentencepiece(decoders.Metaspace(prepend_scheme="never")),
    "symbols": lambda: symbol_tokenizer(["a", "b", "▁"]),
    "word_piece": lambda: sentencepiece(decoders.WordPiece()),
    "stripped_words": lambda: sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    ),
}


@pytest.fixture(params=[*MAKERS, "stories15M"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param != "stories15M":
        return MAKERS[request.param]()
    shared: Path = request.getfixturevalue("shared")
    return load_tokenizer(str(shared / "models" / "stories15M"))


def continuations(tokenizer: Tokenizer) -> list[int]:
    """Ids of some bytes that continue a character, where the tokenizer has them."""
    vocabulary = tokenizer.backend.get_vocab()
    names = ["<0x80>", "<0x90>", "<0xA0>", "<0xBF>"]
    if names[0] not in vocabulary:
        names = ["Ģ", "Ĳ", "ł", "¿"]  # the same bytes of byte-level tokenizers
    return [vocabulary[token] for token in names if token in vocabulary]


def expected(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text so far by definition: without a character that more bytes would complete."""
    text = tokenizer.decode(ids)
    if text.endswith("\ufffd"):
        for count in (1, 2, 3):
            for more in itertools.product(continuations(tokenizer), repeat=count):
                longer = tokenizer.decode([*ids, *more])
                if not longer.endswith("\ufffd"):
                    return longer[:-1]
    return text


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Ids of all kinds, with more bytes and repeats than chance would give; a few do not exist."""
    size = tokenizer.vocab_size
    pools = [range(size), range(min(size, 260)), range(max(0, size - 16), size + 2)]
    ids: list[int] = []
    while len(ids) < 20:
        pool = rng.choice(pools)
        ids += [rng.choice(pool) for _ in range(rng.randint(1, 6))]
    return ids


def test_the_text_so_far_is_what_is_decoded_less_an_open_character(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    whole = tokenizer.name == "sentencepiece" and "_Whole" in repr(tokenizer.stream())
    for _ in range(60):
        ids = random_ids(tokenizer, rng)
        stream, seen = tokenizer.stream(), 0
        while seen < len(ids):
            step = rng.choice([0, 1, 1, 1, 3])
            text = stream.push(ids[seen : seen + step])
            seen = min(len(ids), seen + step)
            assert stream.read == seen
            if whole:  # of an unknown kind: U+FFFD at the end is held back, whatever it is
                assert text == tokenizer.decode(ids[:seen]).rstrip("\ufffd")
            else:
                assert text == expected(tokenizer, ids[:seen])


def test_written_text_grows_and_never_holds_half_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS[:4]:
        try:
            ids = tokenizer.encode_plain(text)
        except ValueError:  # the symbols are few
            ids = [0, 1, 2, 0]
        stream, before, pieces = tokenizer.stream(), "", []
        for i in ids:
            after = stream.push([i])
            assert after.startswith(before)
            pieces.append(after[len(before) :])
            before = after
        assert "\ufffd" not in before
        assert "".join(pieces) == tokenizer.decode(ids)
    fresh = tokenizer.stream()
    assert (fresh.push([]), fresh.read) == ("", 0)


def test_which_tokenizers_are_read_token_by_token() -> None:
    kinds = {name: type(make().stream()).__name__ for name, make in MAKERS.items()}
    assert kinds == {
        "embedded": "_Bytes", "byte_level": "_Bytes", "llama": "_Fallback", "gemma": "_Fallback",
        "metaspace": "_Joined", "metaspace_never": "_Joined", "symbols": "_Joined",
        "word_piece": "_Whole", "stripped_words": "_Whole",
    }  # fmt: skip


def test_a_character_is_held_back_until_it_is_whole_or_broken() -> None:
    tokenizer = MAKERS["llama"]()
    a, snow = tokenizer.backend.token_to_id("▁a"), [2 + byte for byte in "☃".encode()]
    stream = tokenizer.stream()
    seen = [stream.push([i]) for i in [a, *snow, snow[0], a]]
    assert seen == ["a", "a", "a", "a☃", "a☃", "a\ufffd\ufffd\ufffd\ufffd a"]


def test_spaces_that_are_cleaned_up_are_not_there_token_by_token_either() -> None:
    from transformers import PreTrainedTokenizerFast

    words = tk.Tokenizer(tk.models.WordLevel({"a": 0, ".": 1, "b": 2, "<unk>": 3}, "<unk>"))
    hf = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    stream = load_tokenizer(hf).stream()
    assert [stream.push([i]) for i in (0, 1, 2, 1)] == ["a", "a.", "a. b", "a. b."]
    # Transformers leaves BPE alone whatever the setting says, and such a tokenizer is not slower.
    bpe = PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend, clean_up_tokenization_spaces=True
    )
    handle = load_tokenizer(bpe)
    ids = handle.encode_plain("it 's so .")
    stream = handle.stream()
    for i in ids:
        stream.push([i])
    assert stream.text == handle.decode(ids) == str(bpe.decode(ids))


# --- in the decision process


class Pieces:
    """The cursor of a text's length; writes down what it is given."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, piece: str) -> float:
        self.pieces.append(piece)
        return float(sum(map(len, self.pieces)))

    def copy(self) -> Pieces:
        return Pieces(list(self.pieces))


class Spy(Reward):
    """Remembers what its cursors were given, and what was scored."""

    name = "spy"

    def __init__(self) -> None:
        self.cursors: list[list[str]] = []

    def begin(self, row: Any) -> Any:
        pieces: list[str] = []
        self.cursors.append(pieces)

        return Pieces(pieces)

    def score(self, batch: TextBatch) -> list[float]:
        return [float(len(text)) for text in batch.texts]


def make(reward: Any, rows: int = 1, **arguments: Any) -> TokenMDP:
    given = {"prompts": [{"prompt": "x"}], "tokenizer": byte_level(), "stop": "STOP"}
    task = Task(**{**given, "reward": reward, "max_new_tokens": 60, **arguments})
    mdp = TokenMDP(task, rows)
    mdp.begin(np.arange(rows))
    return mdp


def test_cursors_are_given_each_piece_once() -> None:
    spy = Spy()
    tokenizer = byte_level()
    mdp = make(dense(spy), tokenizer=tokenizer)
    text = "naïve ☃ café 🎉 STOP and more"
    for i in tokenizer.encode_plain(text):
        outcome = mdp.step([i])
        if outcome.terminated[0]:
            break
    assert (outcome.stop_reason[0], outcome.text[0]) == ("stop_string", "naïve ☃ café 🎉 ")
    # The beginning of the stop string was text so far until it was whole: the cursor begins anew.
    first, second = spy.cursors
    assert "".join(first).startswith("naïve ☃ café 🎉 ") and second == ["naïve ☃ café 🎉 "]
    assert all(first[1:])
    assert mdp.paid[0] == len(outcome.text[0])


def test_rows_are_independent_and_a_copied_row_goes_on_exactly() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode_plain("café ☃☃ on")
    spy = dense(Spy())
    alone = make(spy, tokenizer=tokenizer)
    expected_rewards = [alone.step([i]).reward[0] for i in ids]
    mdp = make(spy, rows=3, tokenizer=tokenizer)
    for t, i in enumerate(ids):
        live = np.array([True, t % 2 == 0, False])
        reward = mdp.step([i, 5, 0], live).reward
        assert reward[0] == expected_rewards[t]
        mdp.set_state(2, mdp.get_state(0))
        if t == 3:
            mdp.begin(np.array([1]))
    assert mdp.response_text(2) == mdp.response_text(0)


def test_a_terminal_reward_decodes_once_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = Tokenizer.decode_batch

    def counted(self: Tokenizer, rows: Any) -> Any:
        calls.append(sum(map(len, rows)))
        return inner(self, rows)

    monkeypatch.setattr(Tokenizer, "decode_batch", counted)
    terminal = as_reward(lambda text: 0.5)
    for stop, schedule in (((), terminal), (("STOP", 0), terminal), ((), dense(Spy()))):
        mdp = make(schedule, stop=stop, max_new_tokens=30)
        calls.clear()
        for _ in range(30):
            mdp.step([70])
        assert [n for n in calls if n] == [30], "the finished response, in one go"
    monkeypatch.delattr(Tokenizer, "stream")  # what ends by its budget alone needs none at all
    mdp = make(terminal, stop=(), max_new_tokens=2)
    mdp.step([70])
    assert mdp.step([70]).terminated[0]


def test_stop_strings_are_searched_in_what_the_policy_said_last() -> None:
    tokens = symbol_tokenizer(["a", "b", "c"])
    mdp = make(
        as_reward(lambda text: 1.0),
        prompts=[{"prompt": "a"}],
        tokenizer=tokens,
        stop="b b",
        respond=lambda row, ids: Reply([1, 1]) if ids[-1] == 2 else None,
    )
    for token in (0, 2, 0, 2):  # the environment says b b after every c
        assert not mdp.step([token]).terminated[0]
    state = mdp.get_state(0)
    for _ in range(2):
        mdp.set_state(0, state)
        assert not mdp.step([1]).terminated[0]  # with the b before it, but that was a reply
        assert mdp.step([1]).stop_reason[0] == "stop_string"
