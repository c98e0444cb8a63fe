"""What the outcomes of the jobs of `check_reward` say about a reward, check by check."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from textgym.checks import probes
from textgym.checks.guard import Outcome
from textgym.checks.hostile import HOSTILE
from textgym.checks.report import Check
from textgym.rewards.base import Example, Reward
from textgym.rewards.scores import text_at_fault

EMPTY = ("", " ", "\n\n")
GARBAGE = ("qzx vkj wpf", "?! ;; --", "zzz zzz zzz zzz", "I do not know.", "_" * 40)
_NAMED = 5  # hostile texts that a detail names


@dataclass
class Verdicts:
    """Judges outcomes, and keeps the values and statuses that it sees."""

    reward: Reward
    examples: tuple[Example, ...]
    outcomes: Mapping[Any, Outcome]
    tolerance: float
    max_cpu_us: float | None
    max_memory_mb: float | None
    values: list[float] = field(default_factory=list)
    statuses: set[str] = field(default_factory=set)
    cost: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("cpu_us", "wall_us", "memory_mb"), math.nan)
    )

    @property
    def half(self) -> float:
        """The middle of the range, above which nonsense must not come."""
        return self.reward.low + 0.5 * (self.reward.high - self.reward.low)

    def checks(self, skip: Collection[str]) -> list[Check]:
        """Judge the outcomes; `range` comes last, when all values have been seen."""
        judges: dict[str, Callable[[], Check]] = {
            "columns": self._columns,
            "examples": self._examples,
            "oracle": self._oracle,
            "empty": lambda: self._nonsense("empty", EMPTY),
            "garbage": lambda: self._nonsense("garbage", GARBAGE),
            "other answers": self._other_answers,
            "deterministic": lambda: self._equal("deterministic", 0.0, "two calls"),
            "order": lambda: self._equal("order", self.tolerance, "the batch and its reverse"),
            "batch": self._batch,
            "hostile": self._hostile,
            "hostile paid": self._hostile_paid,
            "dense": self._dense,
            "cursor": self._cursor,
            "hostile cursor": self._hostile_cursor,
            "reads only": self._reads_only,
            "pickle": lambda: self._equal("pickle", self.tolerance, "reward and pickle"),
            "deepcopy": lambda: self._equal("deepcopy", self.tolerance, "reward and deep copy"),
            "cost": self._cost,
            "range": self._range,
        }
        return [judge() for name, judge in judges.items() if name not in skip]

    def _columns(self) -> Check:
        columns = tuple(self.examples[0].row) if self.examples else ()
        try:
            self.reward.check(columns)
        except ValueError as error:
            return Check("columns", "fail", str(error))
        return Check("columns", "pass", ", ".join(columns) or "none needed")

    def _scored(self, outcome: Outcome) -> probes.Scored:
        """Read the scores of a job, and keep values and statuses for later."""
        found: probes.Scored = outcome.value
        for value, status in zip(found["values"], found["status"], strict=True):
            self.statuses.add(_short(status))
            if not math.isnan(value):
                self.values.append(value)
        return found

    def _examples(self) -> Check:
        if not self.examples:
            return Check("examples", "skip", "there are none")
        outcome = self.outcomes["together"]
        if outcome.status != "ok":
            return Check("examples", "fail", _said(outcome))
        values = self._scored(outcome)["values"]
        for example, value, status in zip(
            self.examples, values, outcome.value["status"], strict=True
        ):
            if not abs(value - example.value) <= self.tolerance:
                got = f"{value:.10g}" + (f" ({status})" if status else "")
                stated = f"{example.value:.10g} stated, {got} paid"
                return Check("examples", "fail", f"{stated} for {example.text!r:.80}")
        return Check("examples", "pass", f"{len(values)} earn what is stated")

    def _oracle(self) -> Check:
        outcome = self.outcomes["together"]
        if not self.examples:
            return Check("oracle", "skip", "there are no examples")
        if outcome.status != "ok":
            return Check("oracle", "fail", _said(outcome))
        stated = [example.value for example in self.examples]
        paid = outcome.value["values"][int(np.argmax(stated))]
        enough = self.reward.low + 0.9 * (self.reward.high - self.reward.low)
        detail = f"the best answer earns {paid:.6g} of {self.reward.high:g}"
        return Check("oracle", "pass" if paid >= enough else "fail", detail)

    def _nonsense(self, name: str, texts: Sequence[str]) -> Check:
        if not self.reward.judges_content:
            return Check(name, "skip", "it judges form alone (judges_content is False)")
        highest, worst = -math.inf, ""
        for text in texts:
            outcome = self.outcomes["nonsense", text]
            if outcome.status != "ok":
                return Check(name, "fail", f"{text!r}: {_said(outcome)}")
            found = self._scored(outcome)
            for value, status in zip(found["values"], found["status"], strict=True):
                if _is_failure(status):
                    return Check(name, "fail", f"{text!r} is unscored ({status})")
                if value > highest:
                    highest, worst = value, text
        over = highest > self.half and self.reward.high > self.reward.low
        return Check(name, "fail" if over else "pass", f"at most {highest:.6g}, for {worst!r}")

    def _other_answers(self) -> Check:
        outcome, number = self.outcomes["other answers"], len(self.examples)
        # Text i + 1 answered row i.
        others = [
            i
            for i, example in enumerate(self.examples)
            if repr(self.examples[(i + 1) % number].row) != repr(example.row)
            and self.examples[(i + 1) % number].text != example.text
        ]
        if outcome.status != "ok" or not others or not self.reward.judges_content:
            return Check("other answers", "skip", "needs examples that answer several rows")
        values = np.array(self._scored(outcome)["values"])[others]
        paid = f"{int((values > self.half).sum())} of {len(values)}"
        return Check("other answers", "note", f"{paid} answers to another row earn over half")

    def _batch(self) -> Check:
        if not self.reward.per_text:
            return Check("batch", "skip", "the value depends on the batch (per_text is False)")
        return self._equal("batch", self.tolerance, "one by one and together")

    def _equal(self, name: str, tolerance: float, what: str) -> Check:
        first, second = self.outcomes["together"], self.outcomes[name]
        for outcome in (first, second):
            if outcome.status != "ok":
                return Check(name, "fail", _said(outcome))
        mine, theirs = self._scored(first), self._scored(second)
        a, b = np.array(mine["values"]), np.array(theirs["values"])
        differ = ~((np.abs(a - b) <= tolerance) | (np.isnan(a) & np.isnan(b)))
        if differ.any():
            i = int(np.argmax(differ))
            return Check(name, "fail", f"{what}: {a[i]:.10g} and {b[i]:.10g} for one text")
        return Check(name, "pass", f"{what} agree")

    def _hostile(self) -> Check:
        tried = self._of("hostile")
        unscored: dict[str, list[str]] = {}  # names of texts by what became of them
        for (name,), outcome in tried.items():
            if outcome.status != "ok":
                self.statuses.add(outcome.status)
                unscored.setdefault(f"{outcome.status} ({outcome.detail})", []).append(name)
            elif _is_failure(status := self._scored(outcome)["status"][0]):
                unscored.setdefault(_short(status), []).append(name)
        if unscored:
            said = "; ".join(f"{why}: {_names(names)}" for why, names in unscored.items())
            number = len({name for names in unscored.values() for name in names})
            return Check(
                "hostile", "fail", f"{number} of {len(HOSTILE)} texts are unscored: {said}"
            )
        slowest = max(outcome.wall_seconds for outcome in tried.values())
        detail = f"all {len(HOSTILE)} texts have a value; the slowest took {slowest:.2g} s"
        return Check("hostile", "pass", detail)

    def _hostile_paid(self) -> Check:
        if not self.reward.judges_content:
            return Check("hostile paid", "skip", "it judges form alone (judges_content is False)")
        if not self._of("hostile"):
            return Check("hostile paid", "skip", "the hostile texts are skipped")
        paid = [
            name
            for (name,), outcome in self._of("hostile").items()
            if outcome.status == "ok" and outcome.value["values"][0] > self.half
        ]
        detail = f"{len(set(paid))} texts earn over half" + (f": {_names(paid)}" if paid else "")
        return Check("hostile paid", "note", detail)

    def _of(self, kind: str) -> dict[Any, Outcome]:
        """The outcomes of one kind of job, by what else is in their keys."""
        return {key[1:]: outcome for key, outcome in self.outcomes.items() if key[0] == kind}

    def _dense(self) -> Check:
        outcome = self.outcomes["dense"]
        if outcome.status != "ok":
            return Check("dense", "fail", _said(outcome))
        for paid, score in outcome.value:
            if not abs(paid - score) <= max(self.tolerance, 1e-9):
                return Check("dense", "fail", f"{paid!r} paid in all, {score!r} is the score")
        return Check("dense", "pass", "what is paid token by token adds up to the score")

    def _cursor(self) -> Check:
        found = list(self._of("cursor").values())
        for outcome in found:
            if outcome.status != "ok":
                return Check("cursor", "fail", _said(outcome))
            if outcome.value:
                return Check("cursor", "fail", outcome.value)
        if all(outcome.value is None for outcome in found):
            return Check("cursor", "skip", "it has none: dense scores the whole text")
        return Check("cursor", "pass", "equals the score at every prefix; copies are independent")

    def _hostile_cursor(self) -> Check:
        found = self._of("hostile cursor")
        for (name,), outcome in found.items():
            if outcome.status != "ok":
                return Check("hostile cursor", "fail", f"{name!r}: {_said(outcome)}")
            if outcome.value is None:
                continue
            value, score = outcome.value
            if not abs(value - score) <= self.tolerance:
                return Check("hostile cursor", "fail", f"{name!r}: {value!r}, score {score!r}")
        if all(outcome.value is None for outcome in found.values()):
            return Check("hostile cursor", "skip", "it has none")
        return Check("hostile cursor", "pass", "equals the score of the same texts")

    def _reads_only(self) -> Check:
        outcome = self.outcomes["reads only"]
        if outcome.status != "ok":
            return Check("reads only", "fail", _said(outcome))
        if outcome.value:
            return Check("reads only", "fail", "scoring changed the batch that it was given")
        return Check("reads only", "pass", "scoring leaves its batch as it was")

    def _cost(self) -> Check:
        outcome = self.outcomes["cost"]
        if outcome.status != "ok":
            return Check("cost", "fail", _said(outcome))
        self.cost = {**outcome.value, "memory_mb": self._peak()}
        cpu, memory = self.cost["cpu_us"], self.cost["memory_mb"]
        over = (self.max_cpu_us is not None and cpu > self.max_cpu_us) or (
            self.max_memory_mb is not None and memory > self.max_memory_mb
        )
        wall = self.cost["wall_us"]
        detail = f"{cpu:.3g} us of CPU an item ({wall:.3g} us in all), {memory:.3g} MB"
        limited = self.max_cpu_us is not None or self.max_memory_mb is not None
        return Check("cost", "fail" if over else "pass" if limited else "note", detail)

    def _peak(self) -> float:
        return max(outcome.memory_mb for outcome in self.outcomes.values())

    def _range(self) -> Check:
        if not self.values:
            return Check("range", "fail", "it gave no value at all")
        least, most = min(self.values), max(self.values)
        detail = f"{least:.6g} to {most:.6g} paid, [{self.reward.low:g}, {self.reward.high:g}] said"
        within = self.reward.low - 1e-9 <= least and most <= self.reward.high + 1e-9
        return Check("range", "pass" if within else "fail", detail)


def _names(names: list[str]) -> str:
    """The first of some names, each once."""
    different = list(dict.fromkeys(names))
    more = ", ..." if len(different) > _NAMED else ""
    return ", ".join(different[:_NAMED]) + more


def _is_failure(status: str | None) -> bool:
    """Whether a text has no value; one that is at fault has."""
    return status is not None and not text_at_fault(status)


def _short(status: str | None) -> str:
    """A status without what differs from text to text."""
    if status is None:
        return "ok"
    words = status.split(": ")
    return ": ".join(words[:2])[:60]


def _said(outcome: Outcome) -> str:
    took = f" after {outcome.wall_seconds:.2g} s" if outcome.status != "raised" else ""
    return f"{outcome.status}{took}: {outcome.detail}" if outcome.detail else outcome.status
