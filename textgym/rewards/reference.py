"""How likely a frozen reference model finds a response."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from textgym.rewards.base import Reward, check_bounds
from textgym.rewards.batch import TextBatch
from textgym.rewards.scores import FloatArray

# Floats that the logits of one forward may take: 256 MB.
MAX_LOGITS = 2**26


class SequenceScorer(Protocol):
    """Anything that scores whole sequences of ids."""

    def logprob(self, ids: Any, lengths: Any) -> Any:
        """Give log π(ids[b, t] | ids[b, :t]).

        Args:
            ids: int64 `[B, T]`, right-padded.
            lengths: int64 `[B]`.

        Returns:
            `[B, T]` array or tensor; column 0 and the columns past the length are not read.
        """


class ReferenceLogProb(Reward):
    """Σ log π_ref over the tokens that the policy chose, the stop id included; in nats.

    It scores the ids that the policy saw and wrote; nothing is encoded again. A model given by name
    or folder is loaded when it is first used, and a pickle holds its name, never its weights.

    Args:
        source: A folder or hub name of a Hugging Face causal model, such a model, or an object with
            `logprob(ids, lengths)`.
        low: The bound that is declared below; it clips nothing.
        high: The bound above.
        vocab_size: Logits from this id on are dropped; by default the vocabulary of the folder's
            tokenizer, or all logits where there is no tokenizer.
        temperature: The logits are divided by it.
        batch_size: The largest number of sequences of one forward.
        device: Where a model loaded by name runs; `"auto"` is CUDA if there is one.
        dtype: The type of the weights of a model loaded by name.

    Raises:
        TypeError: If the source is none of these.
        FileNotFoundError: If it is an absolute path where there is no folder.
    """

    reads_only = True
    transient = ("_scorer",)
    reads_tokens = True

    def __init__(
        self,
        source: str | os.PathLike[str] | SequenceScorer | Any,
        *,
        low: float = -1000.0,
        high: float = 0.0,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        batch_size: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.name = "reference_logprob"
        self.low, self.high = check_bounds(low, high)
        self.source: Any = os.fspath(source) if isinstance(source, os.PathLike) else source
        self.vocab_size, self.temperature = vocab_size, float(temperature)
        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self._scorer: SequenceScorer | None = None
        if isinstance(self.source, str) and os.path.isabs(self.source):
            if not os.path.isdir(self.source):
                raise FileNotFoundError(f"there is no reference model in {self.source!r}")
        if not isinstance(self.source, str):
            self._scorer = self._wrap(self.source)

    def _wrap(self, source: Any) -> SequenceScorer:
        if callable(getattr(source, "logprob", None)):
            scorer: SequenceScorer = source
            return scorer
        if hasattr(source, "config") and callable(getattr(source, "forward", None)):
            return HuggingFaceScorer(source, self.vocab_size, self.temperature)
        raise TypeError(
            "ReferenceLogProb expected a folder or hub name, a Hugging Face causal model or an "
            f"object with logprob(ids, lengths), got {type(source).__name__}"
        )

    @property
    def scorer(self) -> SequenceScorer:
        """The object that scores; a model given by name is loaded here, once."""
        if self._scorer is None:
            model, vocab_size = load_model(self.source, self.device, self.dtype)
            vocab_size = vocab_size if self.vocab_size is None else self.vocab_size
            self._scorer = HuggingFaceScorer(model, vocab_size, self.temperature)
        return self._scorer

    def score(self, batch: TextBatch) -> Sequence[Any] | FloatArray:
        """Sum the log-probabilities of each response, in batches of similar length."""
        return self.sums(batch)[0]

    def sums(self, batch: TextBatch) -> tuple[FloatArray, FloatArray]:
        """Give for each response the sum of its log-probabilities, and how many there are."""
        full = [p + r for p, r in zip(batch.prompt_ids, batch.token_ids, strict=True)]
        values, counts = np.zeros(len(batch)), np.zeros(len(batch))
        order = sorted(range(len(full)), key=lambda i: len(full[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids, lengths = pad([full[i] for i in rows])
            logprob = as_array(self.scorer.logprob(ids, lengths))
            if logprob.shape != ids.shape:
                raise ValueError(
                    f"logprob(ids, lengths) must give one number per id, shape {ids.shape}, "
                    f"got {logprob.shape}"
                )
            for k, i in enumerate(rows):
                begin = len(batch.prompt_ids[i])
                chosen = logprob[k, begin : len(full[i])]
                if batch.action_masks is not None:
                    chosen = chosen[np.asarray(batch.action_masks[i], bool)]
                values[i], counts[i] = chosen.sum(), len(chosen)
        return values, counts

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self.source, "state_dict"):
            raise pickle.PicklingError(
                f"{self!r} holds a model, and a pickle must not hold weights: make it from the "
                "model's folder or name"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scorer = None if isinstance(self.source, str) else self._wrap(self.source)


class HuggingFaceScorer:
    """A Hugging Face causal model as a `SequenceScorer`.

    Args:
        model: The model; it is used as it stands, in evaluation mode.
        vocab_size: Logits from this id on are dropped; None keeps all.
        temperature: The logits are divided by it.
    """

    def __init__(self, model: Any, vocab_size: int | None, temperature: float) -> None:
        self.model, self.vocab_size, self.temperature = model, vocab_size, temperature

    def logprob(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> FloatArray:
        """Give log π(ids[b, t] | ids[b, :t]), `[B, T]`; 0 in column 0 and in the padding."""
        import torch

        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(
                f"the reference model reads at most {limit} tokens, got {ids.shape[1]}"
            )
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        out = np.zeros(ids.shape)
        # Logits are [rows, T, V]: as many rows at a time as their memory allows.
        rows = max(1, MAX_LOGITS // (ids.shape[1] * self.model.config.vocab_size))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for at in range(0, len(ids), rows):
                    part = slice(at, at + rows)
                    out[part, 1:] = self._forward(ids[part], lengths[part])
        finally:
            self.model.train(was_training)
        return out

    def _forward(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> FloatArray:
        import torch

        device = next(self.model.parameters()).device
        rows = torch.as_tensor(ids, device=device)
        columns = torch.arange(ids.shape[1], device=device)
        mask = columns < torch.as_tensor(lengths, device=device)[:, None]
        logits = self.model(rows, attention_mask=mask.long(), use_cache=False).logits
        logits = logits[:, :-1, : self.vocab_size].float() / self.temperature
        picked = logits.gather(-1, rows[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        return as_array(picked.masked_fill(~mask[:, 1:], 0.0))


def load_model(source: str, device: str, dtype: str) -> tuple[Any, int | None]:
    """Load a causal model by folder or hub name, frozen; with the size of its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model = model.to(device).requires_grad_(False)
    try:
        return model, len(AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError, KeyError):
        return model, None  # a model without a tokenizer: all of its logits count


def pad(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad id sequences on the right with 0: ids `[B, T]` and lengths `[B]`."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    ids = np.zeros((len(sequences), int(lengths.max(initial=1))), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, lengths


def as_array(values: Any) -> FloatArray:
    """Give an array or a tensor as a float64 array on the CPU."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)
