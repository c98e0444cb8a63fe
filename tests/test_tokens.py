"""Tokenizer handles: what they encode, what they decode, where their stop ids come from."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk

from textgym.tokens import Tokenizer, assets_folder, load_tokenizer, symbol_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "hello", "world", "user", "assistant", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def hf_tokenizer(**options: Any) -> Any:
    """A word-level Hugging Face tokenizer that puts `<s>` before a text."""
    from transformers import PreTrainedTokenizerFast

    backend = tk.Tokenizer(
        tk.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tk.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **options}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


# --- where a handle comes from


def test_hugging_face_object() -> None:
    handle = load_tokenizer(hf_tokenizer())
    assert (handle.bos_id, handle.stop_ids, handle.vocab_size) == (1, (2,), len(WORDS))
    assert handle.encode("hello world") == [1, 3, 4]
    assert handle.decode([1, 3, 4, 2]) == "hello world"
    assert handle.decode_batch([[3], [], [4, 3]]) == ["hello", "", "world hello"]


def test_a_handle_is_returned_as_it_is_and_names_are_cached() -> None:
    handle = load_tokenizer("embedded")
    assert load_tokenizer(handle) is handle
    assert load_tokenizer() is handle
    assert symbol_tokenizer(["a", "b"]) is symbol_tokenizer(("a", "b"))


def test_the_embedded_tokenizer_is_the_same_through_transformers() -> None:
    embedded, pretrained = load_tokenizer("embedded"), load_tokenizer(str(assets_folder()))
    assert embedded.vocab_size == pretrained.vocab_size
    assert embedded.bos_id == pretrained.bos_id
    assert embedded.stop_ids == pretrained.stop_ids
    for text in ("", "name Gannet | food none =", " 12 + 7 =", "é ☃ \n"):
        ids = embedded.encode(text)
        assert ids == pretrained.encode(text)
        assert embedded.decode(ids) == pretrained.decode(ids)


def test_the_embedded_tokenizer_needs_no_transformers() -> None:
    code = (
        "import sys; from textgym.tokens import load_tokenizer; load_tokenizer().encode('name');"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_real_folder_unites_the_stop_ids_of_its_generation_config(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    handle = load_tokenizer(folder)
    assert load_tokenizer(str(folder)) is handle
    assert handle.vocab_size == 512
    assert handle.bos_id == 1
    assert set(handle.stop_ids) == {1, 2}
    ids = handle.encode("Once upon a time")
    assert ids[0] == 1
    assert handle.decode(ids) == "Once upon a time"


def test_stop_ids_of_a_folder_without_a_generation_config(tmp_path: Path) -> None:
    hf_tokenizer().save_pretrained(tmp_path / "alone")
    assert load_tokenizer(tmp_path / "alone").stop_ids == (2,)
    hf_tokenizer().save_pretrained(tmp_path / "several")
    (tmp_path / "several" / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert load_tokenizer(tmp_path / "several").stop_ids == (2, 4)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"folder, a hub name.*got int"):
        load_tokenizer(3)
    with pytest.raises(OSError, match="no-such-folder"):
        load_tokenizer("./no-such-folder")


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    class Slow:
        name_or_path = "slow-one"
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return []

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(TypeError, match=r"'slow-one' \(Slow\) has no fast backend"):
        load_tokenizer(Slow())


def test_neither_pad_nor_eos_nor_bos_is_needed_to_load() -> None:
    handle = load_tokenizer(hf_tokenizer(bos_token=None, eos_token=None))
    assert (handle.bos_id, handle.stop_ids) == (None, ())
    assert handle.hf.pad_token is None


# --- encoding prompts


def test_kinds_of_prompts() -> None:
    handle = load_tokenizer(hf_tokenizer(chat_template=TEMPLATE))
    assert handle.encode("hello") == [1, 3]
    assert handle.encode([4, 3]) == [4, 3]
    assert handle.encode((4, 3)) == [4, 3]
    messages = [{"role": "user", "content": "hello"}]
    # The chat template alone: no bos token beside what it writes.
    assert handle.encode(messages) == [5, 7, 3, 6, 7]


def test_an_empty_prompt_becomes_bos_or_an_error() -> None:
    handle = load_tokenizer(hf_tokenizer())
    assert handle.encode("") == [1]
    assert handle.encode([]) == [1]
    assert symbol_tokenizer(["a"]).encode("") == [2]
    for empty in ("", []):
        with pytest.raises(ValueError, match=r"symbols\(1\)' has none"):
            symbol_tokenizer(["a"], bos=None).encode(empty)


def test_bad_prompts() -> None:
    handle = load_tokenizer(hf_tokenizer())
    for source in (handle, load_tokenizer("embedded")):
        with pytest.raises(ValueError, match="cannot encode"):
            source.encode("half a character: \ud800")
    with pytest.raises(ValueError, match="no chat template; use a chat model's tokenizer"):
        handle.encode([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="id 99 is outside the vocabulary of 8 ids"):
        handle.encode([1, 99])
    with pytest.raises(ValueError, match="id -1 is outside"):
        handle.encode([-1])
    for wrong in ([1.5], [True], ["a"]):
        with pytest.raises(TypeError, match="holds integers"):
            handle.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        handle.encode(5)  # type: ignore[arg-type]


# --- decoding


def test_special_tokens_are_skipped_in_text_and_shown_in_pieces() -> None:
    handle = load_tokenizer(hf_tokenizer())
    assert handle.decode([1, 3, 2]) == "hello"
    assert handle.piece(2) == "</s>"
    assert handle.piece(3) == "hello"


def test_a_piece_of_a_broken_character_has_a_name() -> None:
    handle = load_tokenizer("embedded")
    snowman = [i for i in handle.encode("☃") if i != handle.bos_id]
    assert len(snowman) > 1, "the test needs a character of several tokens"
    assert all(handle.piece(i) and "\ufffd" not in handle.piece(i) for i in snowman)
    assert handle.decode(snowman) == "☃"


def test_every_id_of_the_embedded_vocabulary_has_a_piece() -> None:
    handle = load_tokenizer("embedded")
    assert all(handle.piece(i) for i in range(handle.vocab_size))
    assert handle.piece(handle.vocab_size + 5)  # a padded embedding's surplus


def test_spaces_are_cleaned_up_where_the_tokenizer_says_so() -> None:
    hf = hf_tokenizer()
    hf.clean_up_tokenization_spaces = True
    handle = load_tokenizer(hf)
    ids = [3, 7, 4]
    assert handle.decode(ids) == hf.decode(ids)


# --- symbols


def test_symbol_tokenizer_numbers_its_symbols_first() -> None:
    handle = symbol_tokenizer(["a", "b", "c"])
    assert (handle.vocab_size, handle.stop_ids, handle.bos_id) == (5, (3,), 4)
    assert handle.encode("c a b") == [2, 0, 1]
    assert handle.decode([2, 0, 3, 4]) == "c a"
    bare = symbol_tokenizer(["a", "b"], bos=None, eos=None)
    assert (bare.vocab_size, bare.stop_ids, bare.bos_id) == (2, (), None)


@pytest.mark.parametrize("symbols", [[], ["a", "a"], ["a b"], [""], ["<eos>"]])
def test_bad_symbols(symbols: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct words"):
        symbol_tokenizer(symbols)


def test_a_word_that_is_no_symbol_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot encode 'a z'"):
        symbol_tokenizer(["a", "b"]).encode("a z")


# --- handles as arguments of a spec


@pytest.mark.parametrize("kind", ["embedded", "symbols", "object"])
def test_deep_copy_is_identity_and_pickling_makes_an_equal_handle(kind: str) -> None:
    handle: Tokenizer = {
        "embedded": lambda: load_tokenizer("embedded"),
        "symbols": lambda: symbol_tokenizer(["a", "b"]),
        "object": lambda: load_tokenizer(hf_tokenizer()),
    }[kind]()
    assert copy.deepcopy({"tokenizer": handle})["tokenizer"] is handle
    other = pickle.loads(pickle.dumps(handle))
    if kind != "object":
        assert other is handle, "a process has one handle of a name"
    for attribute in ("name", "vocab_size", "bos_id", "stop_ids"):
        assert getattr(other, attribute) == getattr(handle, attribute)
    assert other.decode([0, 1]) == handle.decode([0, 1])


def test_a_name_that_is_neither_folder_nor_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"no folder 'runs/mien' here.*no connection"):
        load_tokenizer("runs/mien")


def test_a_folder_without_a_tokenizer_says_where_that_of_a_run_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"holds no tokenizer .* checkpoints/<step>/policy"):
        load_tokenizer(tmp_path)
