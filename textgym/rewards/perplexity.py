"""How perplexed a frozen reference model is by a response."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.rewards.base import Corpus
from textgym.rewards.batch import TextBatch
from textgym.rewards.reference import ReferenceLogProb, SequenceScorer
from textgym.rewards.scores import FloatArray


class InversePerplexity(ReferenceLogProb):
    """1 / perplexity under a reference model: the geometric mean of the tokens' probabilities.

        r = exp(Σ log π_ref / n)

    From 0 to 1, over the n tokens that the policy chose, the stop id included; unlike the sum of
    `ReferenceLogProb` it does not fall with length. A perplexity is 1 / r. It does not apply (has
    no value) to a response without a token. `corpus` takes all tokens together, as the perplexity
    of a corpus does.

    Columns, statuses: none. Cost: a forward of the model over prompt and response.

    Args:
        source: As for `ReferenceLogProb`, and so are the others.
        vocab_size: Logits from this id on are dropped.
        temperature: The logits are divided by it.
        batch_size: The largest number of sequences of one forward.
        device: Where a model loaded by name runs.
        dtype: The type of the weights of a model loaded by name.

    Raises:
        TypeError: If the source is not a model.
        FileNotFoundError: If it is an absolute path where there is no folder.
    """

    judges_content = False

    def __init__(
        self,
        source: str | os.PathLike[str] | SequenceScorer | Any,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        batch_size: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            source,
            low=0.0,
            high=1.0,
            vocab_size=vocab_size,
            temperature=temperature,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        self.name = "inverse_perplexity"

    def score(self, batch: TextBatch) -> Sequence[Any]:
        """Score each response by the mean of its log-probabilities."""
        sums, counts = self.sums(batch)
        pairs = zip(sums.tolist(), counts.tolist(), strict=True)
        return [float(np.exp(total / n)) if n else None for total, n in pairs]

    def corpus(self, batch: TextBatch) -> Corpus:
        """Give 1 / the perplexity of all tokens together."""

        def score(sums: FloatArray) -> FloatArray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))

        return Corpus(np.stack(self.sums(batch), axis=1), score)
