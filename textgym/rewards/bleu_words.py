"""How sacrebleu's tokenizers split texts into words: whole texts, and texts that grow.

A text that grows is split only from its last *sure break* on: a place that always parts words,
whatever follows, and that no rule of the tokenizer looks across.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

# The tokenizers with a cursor; they need neither a model nor an optional package.
STEPWISE = ("13a", "none", "char", "zh", "intl")
CACHED_WORDS = 1 << 15
LONGEST_CACHED = 48

Words = Sequence[str]


def make_tokenizer(name: str) -> Callable[[str], str]:
    """Make sacrebleu's tokenizer of that name, which joins words by spaces.

    Raises:
        ValueError: If sacrebleu has none of that name.
        ImportError: If it needs a package that is not installed.
        FileNotFoundError: If it needs a model that sacrebleu would have to download.
    """
    from sacrebleu.metrics.bleu import BLEU

    if name not in BLEU.TOKENIZERS:
        near = difflib.get_close_matches(name, BLEU.TOKENIZERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"sacrebleu has no tokenizer {name!r}.{hint} It has: {', '.join(BLEU.TOKENIZERS)}"
        )
    if name in ("ja-mecab", "ko-mecab"):
        language = name[:2]
        needed = "MeCab" if language == "ja" else "mecab_ko"
        if importlib.util.find_spec(needed) is None:
            raise ImportError(
                f"the tokenizer {name!r} needs the package {needed!r}: "
                f'pip install "sacrebleu[{language}]"'
            )
    elif name not in STEPWISE:
        _check_model(name)
    metric: Any = BLEU(tokenize=name)
    return forgetful(metric.tokenizer)


def forgetful(tokenizer: Any) -> Callable[[str], str]:
    """Give a tokenizer of sacrebleu's that keeps no text.

    Its own keep the last 65,536, each of several stages: gigabytes of what a policy has written.
    """
    if hasattr(tokenizer, "_post_tokenizer"):
        tokenizer._post_tokenizer = forgetful(tokenizer._post_tokenizer)
    call = type(tokenizer).__call__
    return functools.partial(getattr(call, "__wrapped__", call), tokenizer)


def _check_model(name: str) -> None:
    if importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            f"the tokenizer {name!r} needs the package 'sentencepiece': pip install sentencepiece"
        )
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
    from sacrebleu.utils import SACREBLEU_DIR

    path = os.path.join(SACREBLEU_DIR, "models", os.path.basename(SPM_MODELS[name]["url"]))
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"the tokenizer {name!r} reads a model that sacrebleu downloads, and {path} is not "
            "there; rewards download nothing: fetch it once where there is a network, with\n"
            f"    python -c \"from sacrebleu.metrics import BLEU; BLEU(tokenize='{name}')\""
        )


class Splitter:
    """Splits texts as sacrebleu does: strip the end, fold case, tokenize, split at spaces.

    Args:
        name: The tokenizer.
        lowercase: Fold case first.

    Attributes:
        alone: How a word is split does not depend on the words around it.
        plain: A word of letters and digits stays as it is.
        characters: Every character is a word, and sure at once. Not where case is folded: whether
            Σ becomes σ or ς depends on the letters around it.
    """

    def __init__(self, name: str, lowercase: bool) -> None:
        self.name, self.lowercase = name, lowercase
        self.alone = name in ("13a", "none", "char")
        self.plain = name in ("13a", "none") and not lowercase
        self.characters = name == "char" and not lowercase
        self._tokenize = make_tokenizer(name)
        self._cached = functools.lru_cache(CACHED_WORDS)(self._split)
        self._parts = functools.lru_cache(CACHED_WORDS)(self._sets_apart)

    def whole(self, text: str) -> Words:
        """Split a whole text."""
        text = text.rstrip()
        joined = "-\n" in text or (">\n" in text and "<skipped>\n" in text.lower())
        if not self.alone or self.characters or joined:
            return self._split(text, True, True)
        found: list[str] = []
        for word in text.split():
            if self.plain and word.isalnum():
                found.append(word)
            else:
                found.extend(self.split(word))
        return found

    def split(self, text: str, first: bool = True, last: bool = True) -> Words:
        """Split a part of a text between two sure breaks.

        Args:
            text: The part; without space at its end if it is the last.
            first: The text begins here; of no matter where words are split `alone`.
            last: The text ends here; of no matter where words are split `alone`.
        """
        if len(text) < LONGEST_CACHED:
            return self._cached(text, first, last)
        return self._split(text, first, last)

    def _split(self, text: str, first: bool, last: bool) -> Words:
        if self.lowercase:
            text = text.lower()
        # A word beyond the break puts a space there, and is dropped again.
        padded = f"{'' if first else 'x '}{text}{'' if last else ' x'}"
        found = self._tokenize(padded).split()
        return tuple(found[not first : len(found) - (not last)])

    def last_break(self, text: str) -> int | None:
        """Find the end of what is sure in a text without space at its end.

        Every space parts words, but for those that `joins` tells of. `zh` also sets apart
        characters, and with `char` nothing is ever unsure.

        Returns:
            An index into the text, 0 excluded; None if nothing is sure.
        """
        if self.characters:
            return len(text) or None
        pieces = text.rsplit(None, 1)
        start = len(text) - len(pieces[-1]) if pieces else 0
        if self.name == "zh" and not self.lowercase:
            for i in range(len(text) - 1, start - 1, -1):
                if self._parts(text[i]):
                    return i + 1
        if len(pieces) < 2 or (self.name == "13a" and joins(text[: start - 1], text[start - 1])):
            return None
        return start

    def _sets_apart(self, character: str) -> bool:
        """Tell whether a character is a word of its own, be it between letters or digits."""
        return all(
            self._tokenize(f"{side}{character}{side}").split() == [side, character, side]
            for side in "x5"
        )


def joins(before: str, space: str) -> bool:
    """Tell whether 13a may delete `space` after `before`, so that the words beside it are one.

    It deletes `-` with a newline after it, also where a deleted `<skipped>` stood between them.
    """
    return space == "\n" and (before.endswith("-") or before[-9:].lower() == "<skipped>")


@functools.lru_cache(32)
def splitter(name: str, lowercase: bool) -> Splitter:
    """Give the splitter that all rewards with this tokenizer share."""
    return Splitter(name, lowercase)
