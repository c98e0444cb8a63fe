"""Document frequencies of n-grams: in how many inputs' references each occurs."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textgym.rewards.words import caption_words, ngrams

ORDER = 4
FORMAT = 1

Gram = tuple[str, ...]
Words = Literal["caption", "space"]


@dataclass(frozen=True)
class Frequencies:
    """In how many documents n-grams occur.

    Attributes:
        documents: How many documents there are.
        counts: For each n-gram of one to four words the documents that have it.
        words: How texts were split: `"caption"` (`caption_words`) or `"space"` (at white space, for
            text that is in words already).
    """

    documents: int
    counts: Mapping[Gram, int]
    words: Words = "caption"

    @classmethod
    def count(cls, references: Iterable[Sequence[str]], words: Words = "caption") -> Frequencies:
        """Count over lists of references, a list (or a single string) a document.

        Raises:
            ValueError: If there is no document.
        """
        split = splitter(words)
        counts: Counter[Gram] = Counter()
        documents = 0
        for given in references:
            texts = [given] if isinstance(given, str) else given
            counts.update({gram for text in texts for gram in grams_of(split(text))})
            documents += 1
        if not documents:
            raise ValueError("expected the references of at least one input, got none")
        return cls(documents, dict(counts), words)

    def idf(self, gram: Gram) -> float:
        """Give log(documents / documents with it), those of an unknown n-gram being 1."""
        return math.log(self.documents) - math.log(max(1, self.counts.get(gram, 0)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        data = {
            "format": FORMAT,
            "documents": self.documents,
            "words": self.words,
            "counts": {" ".join(gram): n for gram, n in sorted(self.counts.items())},
        }
        Path(path).write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frequencies:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If it is none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["words"] not in ("caption", "space"):
                raise ValueError(f"format {data['format']}, words {data['words']!r}")
            counts = {tuple(gram.split(" ")): int(n) for gram, n in data["counts"].items()}
            return cls(int(data["documents"]), counts, data["words"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)} holds no document frequencies of format {FORMAT} ({error}): "
                "write them with Frequencies.save or Cider.save"
            ) from error


def splitter(words: str) -> Callable[[str], list[str]]:
    """Give the function that splits texts.

    Raises:
        ValueError: If there is none of that name.
    """
    if words == "caption":
        return caption_words
    if words == "space":
        return str.split
    raise ValueError(f"expected words 'caption' or 'space', got {words!r}")


def grams_of(words: Sequence[str]) -> list[Gram]:
    """List the n-grams of one to four words."""
    return [gram for n in range(1, ORDER + 1) for gram in ngrams(words, n)]
