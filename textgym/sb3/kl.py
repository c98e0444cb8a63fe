"""A price for leaving a reference model, for stable-baselines3.

Why a callback, and not an option of the buffer: the price needs the policy (whose copy the
reference is by default), the logger and a state that lives as long as training; a buffer is made
before the policy is and knows none of them. But SB3 computes returns before any callback may look,
so the callback leaves a function with the buffer, which calls it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    (full distributions), in nats a response, over the responses that ended in the rollout.

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
        self._open: list[tuple[float, int]] = []  # KL and tokens so far of each row's response

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
        if not self.num_timesteps or len(self._open) != self.training_env.num_envs:
            self._open = [(0.0, 0)] * self.training_env.num_envs

    def _on_rollout_start(self) -> None:
        self.model.rollout_buffer.before_returns.append(self._price)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _price(self, buffer: Any) -> None:
        beta = self.controller.beta
        kl = np.zeros(buffer.counted.shape)
        for numbers in self._sequences(buffer):
            batch, where = buffer.sequences(numbers)
            theirs = self.reference.evaluate(batch, entropy=False).logprob.double().cpu()
            kl[where] = k1(torch.from_numpy(buffer.log_probs[where]).double(), theirs).numpy()
        buffer.rewards -= (beta * kl).astype(buffer.rewards.dtype)
        self.logger.record("kl/beta", beta)
        ended = self._responses(buffer, kl)
        if not ended:
            return
        mean, length = (float(x) for x in np.mean(ended, axis=0))
        self.logger.record("kl/ref", mean)
        if self.exact_sequences:
            exact, measured = 0.0, 0
            for numbers in self._sequences(buffer, self.exact_sequences):
                batch, _ = buffer.sequences(numbers)
                exact += float(self.lm.kl(self.reference, batch).double().sum())
                measured += len(batch.row)
            if measured:
                self.logger.record("kl/ref_exact", exact / measured * length)
        if math.isfinite(mean):
            self.controller.update(mean, len(ended))

    def _sequences(self, buffer: Any, count: int | None = None) -> Iterator[Any]:
        """Numbers of the first `count` sequences that are trained on, some at a time."""
        numbers = np.unique(buffer.store.sequence[buffer.counted])[:count]
        for begin in range(0, len(numbers), SEQUENCES):
            yield numbers[begin : begin + SEQUENCES]

    def _responses(self, buffer: Any, kl: NDArray[np.float64]) -> list[tuple[float, int]]:
        """KL and length of each response that ended here, what came before this rollout included.

        Those without a score are left out; what is known of those that go on is kept.
        """
        found = []
        for row in range(kl.shape[1]):
            begin = 0
            for last in np.flatnonzero(buffer.ends[:, row]):
                span = slice(begin, begin := int(last) + 1)
                total, tokens = self._open[row]
                if buffer.counted[last, row]:
                    found.append((total + float(kl[span, row].sum()), tokens + begin - span.start))
                self._open[row] = (0.0, 0)
            total, tokens = self._open[row]
            self._open[row] = (total + float(kl[begin:, row].sum()), tokens + len(kl) - begin)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The price, and what is known of the responses that are not over."""
        return {"controller": self.controller.state_dict(), "open": self._open}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.controller.load_state_dict(state["controller"])
        self._open = [(float(total), int(tokens)) for total, tokens in state["open"]]
