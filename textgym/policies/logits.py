"""From hidden states to logits, for a chunk of positions at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class LogitHead:
    """The output layer of a Hugging Face causal LM, with what some families do to its logits.

    It is compared once with the model's own logits, so that a family that does something else is
    refused at construction and never scored wrongly.

    Args:
        model: The causal LM (its weights are read at each call, never copied).

    Raises:
        ValueError: When the model's logits are not this function of its hidden states.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._scale: float = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        self.size = self._check()

    def of(self, model: Any) -> LogitHead:
        """Give the head of a copy of the model."""
        twin = copy.copy(self)
        twin._model = model
        return twin

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [n, all] of hidden states [n, D], in the model's dtype."""
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @torch.no_grad()
    def _check(self) -> int:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self._model.device)
        name = type(self._model).__name__
        if self._model.get_output_embeddings() is None:
            raise ValueError(
                f"model: expected a causal language model with an output layer, got {name}"
            )
        ones = torch.ones_like(ids)
        theirs = self._model(input_ids=ids, attention_mask=ones, use_cache=False).logits
        hidden = self._model.base_model(input_ids=ids, attention_mask=ones, use_cache=False)
        ours = self(hidden.last_hidden_state[0])
        if ours.shape != theirs[0].shape or not torch.allclose(
            ours, theirs[0], rtol=1e-2, atol=1e-3, equal_nan=True
        ):
            raise ValueError(
                f"model: the logits of {name} are not its output layer applied to its hidden "
                "states, so they cannot be computed a chunk at a time; this family is not supported"
            )
        return int(theirs.shape[-1])
