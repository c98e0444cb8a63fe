"""What rewards see: a batch of responses with their prompts and table rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from textgym.rewards.errors import missing_column

ATOMS = (int, str, float, bool, type(None))
Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True)
class TextBatch:
    """What rewards see of `n` responses; every list has `n` entries.

    Attributes:
        prompts: The prompts as the table holds them: text, token ids or chat messages.
        texts: The responses so far, without the stop id and cut before the stop string.
        token_ids: The whole responses, stop id included.
        prompt_ids: The encoded prompts: `prompt_ids[i] + token_ids[i]` is what the policy saw and
            wrote.
        rows: The rows of the prompt table, with every column.
        stop_reasons: Why each response ended; None while it goes on.
        action_masks: Which of `token_ids` the policy chose; None if it chose all of them.
    """

    prompts: list[Prompt]
    texts: list[str]
    token_ids: list[list[int]]
    prompt_ids: list[list[int]]
    rows: list[Mapping[str, Any]]
    stop_reasons: list[str | None]
    action_masks: list[Sequence[bool]] | None = None

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
    ) -> TextBatch:
        """Make a batch of bare texts, as for scoring a file; the token ids are empty.

        Raises:
            TypeError: If the texts are no list of strings.
            ValueError: If there is not one row per text.
        """
        strays = [texts] if isinstance(texts, str) else [t for t in texts if not isinstance(t, str)]
        if strays:
            raise TypeError(
                "expected texts as a list of strings, got "
                f"{type(strays[0]).__name__}: {strays[0]!r:.200}; decode bytes first, and give '' "
                "where there is no text"
            )
        n = len(texts)
        table: list[Mapping[str, Any]] = [{} for _ in range(n)] if rows is None else list(rows)
        if len(table) != n:
            raise ValueError(f"expected one row per text, got {len(table)} rows for {n} texts")
        return cls(
            prompts=[row.get("prompt", "") for row in table],
            texts=list(texts),
            token_ids=[[] for _ in range(n)],
            prompt_ids=[[] for _ in range(n)],
            rows=table,
            stop_reasons=[None] * n,
        )

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> list[Any]:
        """Give one column of the prompt table, a value per text.

        Raises:
            RewardColumnError: If a row does not have it.
        """
        for row in self.rows:
            if name not in row:
                raise missing_column("a reward", name, row)
        return [row[name] for row in self.rows]

    def each(self, value: Callable[[str, Mapping[str, Any]], Any]) -> list[Any]:
        """Give `value(text, row)` of each text; what it raises is the item of its text alone."""
        items: list[Any] = []
        for text, row in zip(self.texts, self.rows, strict=True):
            try:
                items.append(value(text, row))
            except Exception as error:
                items.append(error)
        return items

    def take(self, indices: Iterable[int]) -> TextBatch:
        """Give the batch of the texts at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        masks = self.action_masks
        return TextBatch(
            prompts=[self.prompts[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            token_ids=[self.token_ids[i] for i in chosen],
            prompt_ids=[self.prompt_ids[i] for i in chosen],
            rows=[self.rows[i] for i in chosen],
            stop_reasons=[self.stop_reasons[i] for i in chosen],
            action_masks=None if masks is None else [masks[i] for i in chosen],
        )

    def private(self) -> TextBatch:
        """Give a copy that can be changed at will without changing this batch."""
        masks = self.action_masks
        return replace(
            self,
            prompts=[private(prompt) for prompt in self.prompts],
            texts=list(self.texts),
            token_ids=[list(ids) for ids in self.token_ids],
            prompt_ids=[list(ids) for ids in self.prompt_ids],
            rows=[private(dict(row)) for row in self.rows],
            stop_reasons=list(self.stop_reasons),
            action_masks=None if masks is None else [list(mask) for mask in masks],
        )


def private(value: Any) -> Any:
    """Copy lists, dicts, sets and arrays to any depth; everything else is shared."""
    if isinstance(value, list):
        return [item if type(item) in ATOMS else private(item) for item in value]
    if isinstance(value, dict):
        return {key: private(item) for key, item in value.items()}
    if isinstance(value, tuple):
        # A plain tuple can hold lists; a named tuple is left as it is.
        return tuple(private(item) for item in value) if type(value) is tuple else value
    if isinstance(value, set | bytearray | np.ndarray):
        return value.copy()
    return value
