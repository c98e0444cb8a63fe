"""Tokenizers behind one small handle: text to ids for prompts, ids to text for everything else.

Ids are the truth in textgym. Text is decoded from ids for rewards and people and is never encoded
back, so the handle encodes prompts only. It holds the fast `tokenizers` backend, and the Hugging
Face object where one was given, because chat templates live there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers as tk

from textgym.detokenize import Detokenizer, TextStream

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""What a prompt may be: a string, token ids, or chat messages (`{"role": ..., "content": ...}`)."""

EMBEDDED = "embedded"
"""Name of the tokenizer and model that the package ships."""


class Tokenizer:
    """A tokenizer as the environments see it.

    Args:
        backend: The fast tokenizer that decodes (and encodes where there is no Hugging Face
            object).
        name: What error messages call it.
        bos_id: Beginning-of-sequence id, the state an empty prompt becomes; None if there is none.
        stop_ids: Ids that end a response by default.
        hf: The Hugging Face tokenizer it was made from, if any; it encodes prompts and renders chat
            templates.
        recipe: `(function, arguments)` that makes the same handle again, for pickling.
    """

    def __init__(
        self,
        backend: tk.Tokenizer,
        *,
        name: str,
        bos_id: int | None,
        stop_ids: Sequence[int],
        hf: Any = None,
        recipe: tuple[Any, tuple[Any, ...]],
    ) -> None:
        self.backend = backend
        self.name = name
        self.bos_id = bos_id
        self.stop_ids = tuple(dict.fromkeys(int(i) for i in stop_ids))
        self.hf = hf
        self._recipe = recipe
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True) if hf is None else len(hf)
        self._cleans = hf is not None and _cleans_up(hf, backend)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        """Return itself: handles are shared, and Gymnasium deep-copies the arguments of a spec."""
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle by recipe, so that a worker process builds its own backend."""
        return self._recipe

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into ids.

        Strings get the tokenizer's special tokens; chat messages get the chat template and nothing
        else; ids are taken as they are. An empty prompt becomes `[bos]`.

        Raises:
            ValueError: The prompt is empty and there is no bos id, messages came without a chat
                template, or an id is outside the vocabulary.
            TypeError: The prompt is none of the three kinds.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_messages(prompt)
        elif isinstance(prompt, Sequence):
            ids = [_as_id(i, self.vocab_size) for i in prompt]
        else:
            raise TypeError(
                "a prompt is a string, a list of token ids or a list of chat messages, got "
                f"{type(prompt).__name__}"
            )
        if ids:
            return ids
        if self.bos_id is None:
            raise ValueError(
                f"an empty prompt becomes the bos token, but tokenizer {self.name!r} has none; "
                "give a prompt of at least one token"
            )
        return [self.bos_id]

    def encode_plain(self, text: str) -> list[int]:
        """Turn a text that people wrote into ids without special tokens.

        For reference responses and for what a person types in `textgym play`; the text of a policy
        is never encoded.

        Raises:
            ValueError: The tokenizer cannot encode it.
        """
        return self._encode_text(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens skipped."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Turn rows of ids into texts, special tokens skipped."""
        lists = [list(row) for row in rows]
        if self._cleans:
            return [self.hf.decode(row, skip_special_tokens=True) for row in lists]
        return list(self.backend.decode_batch(lists, skip_special_tokens=True))

    def stream(self) -> TextStream:
        """Begin an empty response whose ids are decoded as they come, each of them once."""
        return self._detokenizer.stream()

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self.backend, self.decode, exact=not self._cleans)

    def piece(self, token_id: int) -> str:
        """One token for people: its text, or its name where the text is empty or broken."""
        text = self.backend.decode([int(token_id)], skip_special_tokens=False)
        if text and "\ufffd" not in text:
            return str(text)
        return str(self.backend.id_to_token(int(token_id)) or f"<{int(token_id)}>")

    def _encode_text(self, text: str, special: bool = True) -> list[int]:
        try:
            if self.hf is not None:
                return [int(i) for i in self.hf.encode(text, add_special_tokens=special)]
            return list(self.backend.encode(text, add_special_tokens=special).ids)
        except Exception as error:  # `tokenizers` raises no class of its own
            raise ValueError(
                f"tokenizer {self.name!r} cannot encode {text!r:.80}: {error}"
            ) from None

    def _encode_messages(self, messages: Sequence[Any]) -> list[int]:
        if self.hf is None or not getattr(self.hf, "chat_template", None):
            raise ValueError(
                f"the prompt is a list of chat messages, but tokenizer {self.name!r} has no chat "
                "template; use a chat model's tokenizer or write the prompt as one string"
            )
        text = self.hf.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return self._encode_text(text, special=False)


def load_tokenizer(source: Any = EMBEDDED) -> Tokenizer:
    """Make a handle from whatever names a tokenizer; equal names give the same object.

    Args:
        source: A `Tokenizer`, a Hugging Face tokenizer object, a folder, a hub name, or
            `"embedded"`.

    Raises:
        TypeError: The source is none of these.
        OSError: The folder or hub name holds no tokenizer.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, str | Path):
        return _embedded() if str(source) == EMBEDDED else _pretrained(str(source))
    if hasattr(source, "encode") and hasattr(source, "get_vocab"):
        return _from_hf(source, str(getattr(source, "name_or_path", "") or "tokenizer"), source)
    raise TypeError(
        "tokenizer must be a folder, a hub name, 'embedded', a Hugging Face tokenizer or a "
        f"textgym Tokenizer, got {type(source).__name__}"
    )


def symbol_tokenizer(
    symbols: Sequence[str], *, bos: str | None = "<bos>", eos: str | None = "<eos>"
) -> Tokenizer:
    """Make a word-level tokenizer over a few symbols, for diagnostic environments.

    Symbol `i` has id `i`; then comes `eos`, then `bos`, where they are not None. Text is symbols
    with single spaces between them; strings are encoded without special tokens, and a word that
    is no symbol is an error.

    Raises:
        ValueError: There is no symbol, or one is empty, holds white space or appears twice.
    """
    return _symbols(tuple(symbols), bos, eos)


@lru_cache(maxsize=64)
def _symbols(symbols: tuple[str, ...], bos: str | None, eos: str | None) -> Tokenizer:
    names = [*symbols, *(s for s in (eos, bos) if s is not None)]
    if not symbols or len(set(names)) != len(names) or any(s.split() != [s] for s in names):
        raise ValueError(
            f"symbols must be distinct words without white space, got {list(symbols)!r}"
        )
    # The unknown token is in no vocabulary, so that an unknown word is an error.
    words = {s: i for i, s in enumerate(names)}
    backend = tk.Tokenizer(tk.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([s for s in (eos, bos) if s is not None])
    return Tokenizer(
        backend,
        name=f"symbols({len(symbols)})",
        bos_id=None if bos is None else names.index(bos),
        stop_ids=() if eos is None else (names.index(eos),),
        recipe=(_symbols, (symbols, bos, eos)),
    )


def assets_folder() -> Path:
    """Folder of the model and tokenizer that the package ships."""
    return Path(str(resources.files("textgym"))) / "assets" / "tiny"


@lru_cache(maxsize=1)
def _embedded() -> Tokenizer:
    """Load the shipped tokenizer without transformers, which takes seconds to import."""
    folder = assets_folder()
    backend = tk.Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    generation = folder / "generation_config.json"
    eos = _as_list(backend.token_to_id(config["eos_token"]))
    if generation.exists():
        eos += _as_list(json.loads(generation.read_text()).get("eos_token_id"))
    bos = config.get("bos_token")
    return Tokenizer(
        backend,
        name=EMBEDDED,
        bos_id=None if bos is None else backend.token_to_id(bos),
        stop_ids=eos,
        recipe=(load_tokenizer, (EMBEDDED,)),
    )


_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)  # one of which every folder of a tokenizer has


@lru_cache(maxsize=16)
def _pretrained(name: str) -> Tokenizer:
    from transformers import AutoTokenizer, GenerationConfig

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _FILES):
        raise OSError(
            f"the folder {name} holds no tokenizer ({', '.join(_FILES)}); that of a run is beside "
            "its weights, in checkpoints/<step>/policy"
        )
    try:
        hf = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"there is no folder {name!r} here, nor a model on the hub: {error}"
        ) from error
    try:
        more = _as_list(GenerationConfig.from_pretrained(name).eos_token_id)
    except OSError:  # a tokenizer alone, without a model beside it
        more = []
    return _from_hf(hf, name, name, more)


def _from_hf(hf: Any, name: str, recipe: Any, more_stop_ids: Sequence[int] = ()) -> Tokenizer:
    backend = getattr(hf, "backend_tokenizer", None)
    if not isinstance(backend, tk.Tokenizer):
        raise TypeError(
            f"tokenizer {name!r} ({type(hf).__name__}) has no fast backend; textgym needs one that "
            "is backed by the `tokenizers` library (a tokenizer.json)"
        )
    eos = [] if hf.eos_token_id is None else _as_list(hf.eos_token_id)
    return Tokenizer(
        backend,
        name=name,
        bos_id=hf.bos_token_id,
        stop_ids=[*eos, *more_stop_ids],
        hf=hf,
        recipe=(load_tokenizer, (recipe,)),
    )


def _cleans_up(hf: Any, backend: tk.Tokenizer) -> bool:
    """Whether decoding removes spaces before punctuation, on top of what the backend does.

    The setting alone does not say: Transformers ignores it for BPE, where it would spoil texts (the
    configuration of Llama 3 has it all the same), and which version does so is seen by trying.
    """
    if not getattr(hf, "clean_up_tokenization_spaces", False):
        return False
    if isinstance(backend.model, tk.models.BPE):
        ids = backend.encode("a , b", add_special_tokens=False).ids
        text = backend.decode(ids)
        return text.strip() != "a , b" or str(hf.decode(ids)) != text
    return True


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _as_id(value: Any, vocab_size: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"a prompt of ids holds integers, got {value!r}")
    token_id = int(value)
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is outside the vocabulary of {vocab_size} ids")
    return token_id
