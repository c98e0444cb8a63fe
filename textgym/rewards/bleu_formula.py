"""The formula of BLEU, with sacrebleu's smoothing methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

SMOOTHING: dict[str, float | None] = {"exp": None, "floor": 0.1, "add-k": 1.0, "none": None}
LOG_OF_ZERO = -9999999999.0  # what sacrebleu takes for the logarithm of a precision of 0


@dataclass(frozen=True)
class Formula:
    """BLEU = BP · exp(mean of log p_n, n = 1..N), from 0 to 1 (Papineni et al. 2002, section 2.3).

    The same floating-point operations in the same order as sacrebleu's, so that values are equal
    bit for bit; that makes a perfect text worth 1 + 4e-16.

    Args:
        max_order: N.
        effective_order: Average over the orders that the text is long enough for.
        smooth_method: What becomes of a precision of 0 (Chen & Cherry 2014): `"exp"` halves at
            each (method 3), `"floor"` counts `smooth_value` matches (1), `"add-k"` adds it to all
            matches and totals of n > 1 (2), `"none"` leaves it.
        smooth_value: See `smooth_method`.
    """

    max_order: int = 4
    effective_order: bool = True
    smooth_method: str = "exp"
    smooth_value: float = 0.0

    def of_counts(self, correct: Sequence[float], totals: Sequence[float], penalty: float) -> float:
        """Compute BLEU of one text or of many together.

        Args:
            correct: Matched n-grams, `[N]`.
            totals: N-grams of the text, `[N]`.
            penalty: The brevity penalty BP.
        """
        if not correct[0]:
            return 0.0  # who shares no word shares no n-gram
        more = self.smooth_value if self.smooth_method == "add-k" else 0.0
        logs: list[float] = []
        halving = 1.0
        for n, (matched, total) in enumerate(zip(correct, totals, strict=True)):
            if n:
                matched += more
                total += more
            if not total:
                break
            if matched:
                logs.append(log(100.0 * matched / total))
            else:
                halving *= 2
                logs.append(self._log_of_none(total, halving))
        return self._mean(logs, penalty)

    def of_text(self, correct: Sequence[int], length: int, penalty: float) -> float:
        """Compute BLEU of one text of `length` words, as `of_counts` does, in a quicker loop."""
        if self.smooth_method == "add-k":
            totals = [max(0, length - n) for n in range(self.max_order)]
            return self.of_counts(correct, totals, penalty)
        if not correct[0]:
            return 0.0
        logs: list[float] = []
        halving = 1.0
        for matched in correct:
            if length <= 0:
                break
            if matched:
                logs.append(log(100.0 * matched / length))
            else:
                halving *= 2
                logs.append(self._log_of_none(length, halving))
            length -= 1
        return self._mean(logs, penalty)

    def _log_of_none(self, total: float, halving: float) -> float:
        """Give the logarithm of a precision without a match."""
        precision = 0.0
        if self.smooth_method == "exp":
            precision = 100.0 / (halving * total)
        elif self.smooth_method == "floor":
            precision = 100.0 * self.smooth_value / total
        return log(precision) if precision else LOG_OF_ZERO

    def _mean(self, logs: list[float], penalty: float) -> float:
        order = len(logs)
        if not self.effective_order:
            order = self.max_order
            logs += [LOG_OF_ZERO] * (order - len(logs))
        return penalty * exp(sum(logs) / order) / 100.0


def brevity_penalty(length: float, reference: float) -> float:
    """Give BP for a text and the references that it is held against, both lengths in words."""
    if length >= reference:
        return 1.0
    return exp(1 - reference / length) if length > 0 else 0.0
