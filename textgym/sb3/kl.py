"""A price for leaving a reference model, for stable-baselines3.

Why a callback, and not an option of the buffer: the price needs the policy (whose copy the
reference is by default), the logger and a state that lives as long as training; a buffer is made
before the policy is and knows none of them. But SB3 computes returns before any callback may look,
so the callback leaves a function with the buffer, which calls it first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textgym.kl import AdaptiveKL, FixedKL, KLController, k1
from textgym.policies import CausalLMPolicy
from textgym.sb3.buffer import SequenceRollouts
from textgym.sb3.policy import CausalLMActorCritic

SEQUENCES = 16  # of one forward


class ReferenceKL(BaseCallback):
    """Subtract `beta * k1` from every token's reward, before returns are computed.

    k1 = log pi(a|s) - log ref(a|s), so that return-to-go at gamma 1 has the gradient of the exact
    KL (Ziegler et al. 2019, equation 2). Logged: `kl/beta`, `kl/ref` (sampled) and `kl/ref_exact`
    (full distributions), in nats a response.

    Args:
        beta: Price of one nat; with `target`, its first value.
        reference: A policy, a model, a folder or a hub name; default: the policy as it is when
            training begins.
        target: KL in nats a response that the price is adapted to (Ziegler et al. 2019, section
            2.2); None: a fixed price.
        horizon: Episodes over which the price adapts.
        exact_sequences: Sequences of each rollout on which the exact KL is measured; 0: none.
        verbose: As in SB3.

    Raises:
        ValueError: `beta`, `target` or `horizon` is out of range.
        TypeError: At the start of training, if policy or buffer are not those of `textgym.sb3`.
    """

    def __init__(
        self,
        beta: float,
        reference: CausalLMPolicy | Any | str | Path | None = None,
        *,
        target: float | None = None,
        horizon: float = 10_000,
        exact_sequences: int = 16,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.controller: KLController = (
            FixedKL(beta) if target is None else AdaptiveKL(beta, target=target, horizon=horizon)
        )
        self.reference: Any = reference
        self.exact_sequences = exact_sequences

    def _on_training_start(self) -> None:
        policy, buffer = self.model.policy, getattr(self.model, "rollout_buffer", None)
        if not isinstance(policy, CausalLMActorCritic) or not isinstance(buffer, SequenceRollouts):
            raise TypeError(
                "ReferenceKL needs a causal language model as policy and "
                "rollout_buffer_class=textgym.sb3.SequenceRolloutBuffer, got "
                f"{type(policy).__name__} and {type(buffer).__name__}"
            )
        self.lm = policy.lm
        if self.reference is None:
            self.reference = self.lm.frozen_copy()
        elif not isinstance(self.reference, CausalLMPolicy):
            self.reference = CausalLMPolicy(
                self.reference,
                vocab_size=self.lm.vocab_size,
                temperature=self.lm.temperature,
                device=self.lm.device,
                value_head=False,
            )
        self.reference.to(self.lm.device)
        if self._price not in buffer.before_returns:
            buffer.before_returns.append(self._price)

    def _on_training_end(self) -> None:
        self.model.rollout_buffer.before_returns.remove(self._price)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _price(self, buffer: Any) -> None:
        beta = self.controller.beta
        numbers = np.arange(len(buffer.store.finished))
        total, exact, measured = 0.0, 0.0, 0
        for begin in range(0, len(numbers), SEQUENCES):
            batch, where = buffer.sequences(numbers[begin : begin + SEQUENCES])
            theirs = self.reference.evaluate(batch, entropy=False).logprob.double().cpu()
            price = k1(torch.from_numpy(buffer.log_probs[where]).double(), theirs).numpy()
            buffer.rewards[where] -= beta * price
            total += float(price.sum())
            if begin < self.exact_sequences:
                exact += float(self.lm.kl(self.reference, batch).double().sum())
                measured += len(price)
        counted = int(buffer.counted.sum())
        # Episodes that the buffer cuts count by their tokens.
        responses = max(buffer.ended - buffer.unscored, 0)
        self.logger.record("kl/beta", beta)
        if counted and responses:
            length = counted / responses
            self.logger.record("kl/ref", total / responses)
            if measured:
                self.logger.record("kl/ref_exact", exact / measured * length)
            if math.isfinite(total):
                self.controller.update(total / responses, responses)
