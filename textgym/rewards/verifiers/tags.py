"""Responses that think first: `<think>...</think><answer>...</answer>`, and what is in their tags.

After DeepSeek-R1 (DeepSeek-AI 2025, https://arxiv.org/abs/2501.12948, section 2.2.2): one reward
for the format, and one for the answer in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from textgym.rewards.base import Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.compose import Sum
from textgym.rewards.scores import as_items
from textgym.rewards.verifiers.base import Verifier
from textgym.rewards.verifiers.numeric import Numeric

_NAME = re.compile(r"[A-Za-z][\w-]*")


class TagFormat(Verifier):
    """1 if the response is `<think>...</think>` and `<answer>...</answer>` and no more, else 0.

    Every tag must be there once, in order, with something in it; only space may be around them.

    **Range** 0 or 1; it says nothing about the content. **Cost** linear in the text, a microsecond.
    **Statuses**: none.

    Args:
        tags: The names of the tags, in order.
        opened: The prompt ends in the first opening tag, so that the response begins inside.

    Raises:
        ValueError: If there is no tag, a name is not one, or one comes twice.
    """

    judges_content = False

    def __init__(
        self, tags: tuple[str, ...] = ("think", "answer"), *, opened: bool = False
    ) -> None:
        super().__init__("tags", None)
        if not tags or len(set(tags)) < len(tags) or not all(_NAME.fullmatch(t) for t in tags):
            raise ValueError(f"tags must be different names, as ('think', 'answer'), got {tags!r}")
        self.tags, self.opened = tuple(tags), opened

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Look for the tags, one after the other."""
        if self.opened:
            text = f"<{self.tags[0]}>{text}"
        at = 0
        for tag in self.tags:
            start, end = f"<{tag}>", f"</{tag}>"
            if text.count(start) != 1 or text.count(end) != 1:
                return 0.0
            first, last = text.find(start, at), text.find(end, at)
            content = first + len(start)
            if first < at or last < content:
                return 0.0
            if text[at:first].strip() or not text[content:last].strip():
                return 0.0
            at = last + len(end)
        return float(not text[at:].strip())

    def examples(self) -> tuple[Example, ...]:
        """Give the format, and what breaks it."""
        body = "".join(f"<{tag}>so</{tag}>\n" for tag in self.tags)
        right = body.removeprefix(f"<{self.tags[0]}>") if self.opened else body
        return (Example({}, right, 1.0), Example({}, f"{right}So!", 0.0), Example({}, "so", 0.0))


class InTag(Reward):
    """Another reward, of what is in a tag; its `low`, if the response does not have the tag once.

    **Accepts** what the other reward does, and has its columns, range and statuses. **Cost** that
    of the other reward, and time linear in the text.

    Put the sign of a penalty inside, `InTag(-toxicity)`: in `-1 * InTag(toxicity)` the `low` of a
    response without the tag would be the best there is.

    Args:
        reward: The reward of the content.
        tag: The name of the tag.
    """

    reads_only = True

    def __init__(self, reward: Reward, tag: str = "answer") -> None:
        if not _NAME.fullmatch(tag):
            raise ValueError(f"a tag must be a name, as 'answer', got {tag!r}")
        self.reward, self.tag = reward, tag
        self.name, self.low, self.high = reward.name, reward.low, reward.high
        self.reads_tokens = reward.reads_tokens

    def check(self, columns: Collection[str]) -> None:
        """Check the columns of the other reward."""
        self.reward.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Reward:
        """Give the same of the fitted reward."""
        reward = self.reward.fitted(rows)
        return self if reward is self.reward else InTag(reward, self.tag).named(self.name)

    def keep(self, folder: Path) -> None:
        """Write what the other reward froze."""
        self.reward.keep(folder)

    def score(self, batch: TextBatch) -> list[Any]:
        """Score the contents; the token ids remain those of the whole responses."""
        contents = [self._content(text) for text in batch.texts]
        there = [i for i, content in enumerate(contents) if content is not None]
        items: list[Any] = [self.low] * len(batch)
        if there:
            part = replace(batch.take(there), texts=[contents[i] or "" for i in there])
            if not self.reward.reads_only:
                part = part.private()
            for i, item in zip(there, as_items(self.reward.score(part), len(there)), strict=True):
                items[i] = item
        return items

    def _content(self, text: str) -> str | None:
        start, end = f"<{self.tag}>", f"</{self.tag}>"
        if text.count(start) != 1 or text.count(end) != 1:
            return None
        first, last = text.find(start) + len(start), text.find(end)
        return text[first:last] if first <= last else None

    def examples(self) -> tuple[Example, ...]:
        """Give those of the other reward, in the tag; and without it."""
        inner = self.reward.examples()
        bare = [Example(inner[0].row, inner[0].text, self.low)] if inner else []
        wrapped = [replace(e, text=f"<{self.tag}>{e.text}</{self.tag}>") for e in inner]
        return (*wrapped, *bare)


class ThinkAnswer(Sum):
    """The reward of `think_answer`, which says what it is: a sum of two parts, reported each."""

    def __init__(
        self, answer: Reward, *, format_weight: float, answer_weight: float, opened: bool
    ) -> None:
        self.answer, self.opened = answer, opened
        self.weights = format_weight, answer_weight
        inside = InTag(answer, "answer")
        super().__init__([(format_weight, TagFormat(opened=opened)), (answer_weight, inside)])
        self.name = "think_answer"

    def examples(self) -> tuple[Example, ...]:
        """Give the answer's examples after a thought, and its best one without the format."""
        form, weight = self.weights
        start = "" if self.opened else "<think>"
        inner = self.answer.examples()
        return tuple(
            Example(
                e.row,
                f"{start}Let me see.</think>\n<answer>{e.text}</answer>",
                form + weight * e.value,
            )
            for e in inner
        ) + tuple(Example(e.row, e.text, weight * self.answer.low) for e in inner[:1])


def think_answer(
    answer: Reward | None = None,
    *,
    format_weight: float = 0.5,
    answer_weight: float = 0.5,
    opened: bool = False,
) -> ThinkAnswer:
    """Give the thinking reward of DeepSeek-R1: half for the format, half for the answer.

        R = format_weight · TagFormat() + answer_weight · InTag(answer)

    The answer counts where its tag is there once, even if the rest of the format is not kept. Both
    parts are reported. Columns, statuses and cost are those of `answer`; the range is 0 to 1 for a
    verifier and the weights that are given.

    Args:
        answer: The reward of what is in `<answer>`; `Numeric()` by default.
        format_weight: What the format is worth.
        answer_weight: What the answer is worth.
        opened: The prompt ends in `<think>`, so that the response begins inside.
    """
    return ThinkAnswer(
        Numeric() if answer is None else answer,
        format_weight=format_weight,
        answer_weight=answer_weight,
        opened=opened,
    )
