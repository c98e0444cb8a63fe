"""What the agents share: plain functions between a rollout and an optimizer step.

Settings are checked before anything is sampled, episodes become microbatches (`microbatches`), and
gradients become steps that are skipped where they are not finite (`GuardedOptimizer`). The
mathematics is in `returns`, `losses` and `kl`, what rewards become in `shaping`, the bookkeeping of
a run in `runs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from textgym.episodes import FORWARD_TOKENS
from textgym.parallel import sum_gradients
from textgym.returns import IntArray, check_unit

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv


UNSCORED_LIMIT = 0.2
"""Share of a batch's episodes above which training stops for want of scores."""


class UnscoredError(RuntimeError):
    """Too many episodes of a batch have no score. The message holds the first traceback."""


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite too many times in a row."""


# ------------------------------------------------------------------------------------ before a run


def check_setup(
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    *,
    gamma: float,
    reference: CausalLMPolicy | None = None,
    needs_values: bool = False,
    autoreset_mode: str = "Disabled",
) -> None:
    """Refuse what could not be learned from, before anything is sampled.

    Raises:
        ValueError: If the environment resets otherwise, the policy samples another distribution
            than it scores, sizes do not fit, gamma differs from the reward schedule's, or a value
            head is needed and missing.
    """
    mode = getattr((envs.metadata or {}).get("autoreset_mode"), "value", "none")
    if mode != autoreset_mode:
        raise ValueError(
            f"this agent needs a vector environment made with autoreset_mode={autoreset_mode!r}, "
            f"got {mode!r}: gym.make_vec(id, num_envs, autoreset_mode={autoreset_mode!r}, ...)"
        )
    if not policy.is_exact:
        raise ValueError(
            "agents train the distribution that was sampled, but this policy's sampler cuts it "
            "(greedy, top_k or top_p): after an update the cut may exclude a stored token; make "
            "the policy with sampler='inverse_cdf' and without top_k and top_p"
        )
    task = envs.unwrapped.task
    for name, model in (("policy", policy), ("reference", reference)):
        if model is None:
            continue
        if model.vocab_size != task.vocab_size:
            raise ValueError(
                f"the {name} has {model.vocab_size} actions and the environment "
                f"{task.vocab_size}: give the environment the model's tokenizer (tokenizer=<its "
                f"folder or name>), or make the policy with vocab_size={task.vocab_size}"
            )
        if model.context_length is not None and model.context_length < task.max_length:
            raise ValueError(
                f"the {name}'s context holds {model.context_length} tokens, an episode up to "
                f"{task.max_length}: lower max_new_tokens, or max_prompt_tokens with "
                "truncate_prompt"
            )
    if reference is not None and reference.temperature != policy.temperature:
        raise ValueError(
            f"the reference has temperature {reference.temperature}, the policy "
            f"{policy.temperature}: they must be equal, or the KL would not start at 0"
        )
    expected = task.schedule.gamma
    if expected is not None and expected != gamma:
        raise ValueError(
            f"the reward's dense schedule has gamma {expected}, the agent {gamma}: make them equal"
        )
    if needs_values and policy.value_head is None:
        raise ValueError("this agent learns values: make the policy with value_head=True")


def check_scored(episodes: Episodes, limit: float = UNSCORED_LIMIT) -> None:
    """Stop when more than `limit` of a batch has no score.

    Raises:
        UnscoredError: With the reasons, counted, and the first traceback.
    """
    reasons = [status for status in episodes.status if status is not None]
    if len(reasons) > limit * len(episodes):
        counted = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        shown = ", ".join(f"{reason} ({n})" for reason, n in list(counted.items())[:5])
        raise UnscoredError(
            f"{len(reasons)} of {len(episodes)} episodes are unscored, more than {limit:.0%}: "
            f"{shown}. The first failure was:\n{episodes.traceback or '(no traceback)'}"
        )


def check_positive(config: Any, *names: str) -> None:
    """Check that fields of a config are at least 1.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_rl_config(config: Any) -> None:
    """Check what the configs of all agents that sample have in common, before anything is sampled.

    Raises:
        ValueError: Naming the first number that could not be trained with.
    """
    check_positive(config, "episodes", "group_size", "checkpoint_every", "keep", "eval_episodes")
    if config.episodes % config.group_size:
        raise ValueError(
            f"episodes must be a multiple of group_size ({config.group_size}), "
            f"got {config.episodes}"
        )
    check_not_negative(config, *NOT_NEGATIVE)
    check_unit("gamma", config.gamma)
    check_above_0(config, "max_grad_norm")


NOT_NEGATIVE = (
    "warmup_updates",
    "lr_final",
    "vf_coef",
    "whiten_floor",
    "exact_kl_episodes",
    "samples",
)
"""Fields of configs that sample, where they have them, that may be 0 and no less."""


def check_not_negative(config: Any, *names: str) -> None:
    """Check that fields of a config are at least 0; it need not have all of them.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name in names:
        if getattr(config, name, 0) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")


def check_above_0(config: Any, *names: str) -> None:
    """Check that fields of a config are above 0, or None.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


# ------------------------------------------------------------------------------------ forwards


SHARED = 4
"""How many times a forward's tokens attention may read, a prompt counted for each sequence."""


def microbatches(
    indices: IntArray, episodes: Episodes, size: int | None, limit: int
) -> Iterator[IntArray]:
    """Split episodes into forwards of at most `size` sequences.

    In order of length, or of groups where these share their prompts (a forward computes a prompt
    once, see `textgym.policies.shared_prompts`), the split is the one that costs least: the padded
    tokens of all forwards, and `FORWARD_TOKENS` for each. Few tokens, or all of one length, are one
    forward, as long as they are no more than `limit` (or a single sequence): beyond that nothing is
    faster and all takes more memory.

    Args:
        indices: Which episodes.
        episodes: Of them.
        size: The most sequences of a forward; None for no such limit.
        limit: Its most padded tokens, `policy.forward_tokens`.
    """
    count = len(indices)
    if not count:
        return
    lengths, prompts = np.diff(episodes.starts)[indices], episodes.prompt_length[indices]
    widest = count if size is None else size
    whole, padding = count * int(lengths.max()), _padding(lengths) + _padding(prompts)
    if count <= widest and whole <= limit and padding <= FORWARD_TOKENS:
        yield indices  # a second forward would cost more than all of the padding
        return
    order = np.argsort(-lengths, kind="stable")
    cost, ends = _cheapest_split(lengths[order], widest, limit)
    names, group = np.unique(episodes.group[indices], return_inverse=True)
    if len(names) < count:
        longest = np.zeros(len(names), np.int64)
        np.maximum.at(longest, group, lengths)
        grouped = np.lexsort((-lengths, group, -longest[group]))
        heads = (prompts[grouped], group[grouped])
        shared, ends_shared = _cheapest_split(lengths[grouped], widest, limit, heads)
        if shared < cost:
            order, ends = grouped, ends_shared
    for first, last in itertools.pairwise(ends):
        yield indices[order[first:last]] if len(ends) > 2 else indices


def _cheapest_split(
    lengths: IntArray,
    widest: int,
    limit: int,
    prompts: tuple[IntArray, IntArray] | None = None,
) -> tuple[float, list[int]]:
    """Cut a row of sequences into forwards at the least cost.

    Args:
        lengths: Of the sequences [n].
        widest: The most sequences of a forward.
        limit: Its most tokens.
        prompts: Lengths of their prompts [n] and their groups [n], whose members stand together;
            None: prompts are not shared.

    Returns:
        The cost in tokens, and where forwards end, from 0 to n.
    """
    count = len(lengths)
    turns = np.zeros(count, np.int64)
    if prompts is not None:
        turns[1:] = np.cumsum(np.diff(prompts[1]) != 0)
    # cost[k]: the least cost of the first k; it ends with a forward of those from begin[k] on.
    cost, begin = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    low = 0  # forwards from before it have too many tokens, and will have with more sequences
    for k in range(1, count + 1):
        low = max(low, k - widest)
        starts = np.arange(low, k)
        rows = k - starts
        least = tokens = rows * _longest_since(lengths[starts])
        if prompts is not None:
            prompt = _longest_since(prompts[0][starts])
            rest = _longest_since(lengths[starts] - prompts[0][starts])
            shared = (turns[k - 1] - turns[starts] + 1) * prompt + rows * rest
            pays = shared + FORWARD_TOKENS < tokens
            pays &= rows * (prompt + rest) <= SHARED * limit  # what attention reads
            least = np.minimum(shared, tokens)
            tokens = np.where(pays, shared, tokens)
        costs = cost[starts] + tokens + FORWARD_TOKENS
        costs += 1e-6 * (tokens / limit) ** 2  # of splits that cost the same, the even one
        costs[(tokens > limit) & (rows > 1)] = np.inf
        best = int(costs.argmin())
        cost[k], begin[k] = costs[best], starts[best]
        low = int(starts[((least <= limit) | (rows == 1)).argmax()])
    ends = [count]
    while ends[-1]:
        ends.append(int(begin[ends[-1]]))
    return float(cost[-1]), ends[::-1]


def _padding(lengths: IntArray) -> int:
    return len(lengths) * int(lengths.max()) - int(lengths.sum())


def _longest_since(lengths: IntArray) -> IntArray:
    """The largest number from each place to the last."""
    return np.maximum.accumulate(lengths[::-1])[::-1]


def to_device(values: Any, device: torch.device) -> Tensor:
    """A float32 copy on the policy's device."""
    return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=device)


# ------------------------------------------------------------------------------------ steps


def learning_rate(
    base: float, update: int, progress: float, *, warmup_updates: int, final: float
) -> float:
    """Linear warm-up over updates, times linear decay over tokens.

        lr = base * min(1, (update + 1) / (warmup_updates + 1)) * (1 - (1 - final) * progress)

    Args:
        base: Highest learning rate.
        update: Updates done before this one.
        progress: Share of the run's tokens done, clipped to [0, 1].
        warmup_updates: Updates before the full rate.
        final: Rate at the end, as a share of `base`.
    """
    warm = min(1.0, (update + 1) / (warmup_updates + 1))
    return base * warm * (1.0 - (1.0 - final) * min(1.0, max(0.0, progress)))


class GuardedOptimizer:
    """Adam with gradient clipping that changes nothing where loss or gradient is not finite.

    With several processes gradients are summed first, so that all take the same step. An
    accelerator is not waited for: it finds out itself what is to be skipped, and `settle` counts.

    Attributes:
        skipped: Steps skipped so far.
        in_a_row: Steps skipped since the last good one.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        *,
        lr: float,
        max_grad_norm: float,
        weight_decay: float = 0.0,
        limit: int = 5,
    ) -> None:
        """Optimise every parameter of `policy` that wants a gradient."""
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the policy has no parameter to train: every one is frozen")
        # eps 1e-5 and not 1e-8: Huang et al. 2022, "The 37 implementation details of PPO", detail
        # 3. Fused: a third of the time of the plain loop on a CPU, and it can skip on the device.
        self.adam: Any = torch.optim.AdamW(
            self.parameters, lr=lr, eps=1e-5, weight_decay=weight_decay, fused=True
        )
        self.max_grad_norm, self.limit = max_grad_norm, limit
        self.skipped, self.in_a_row = 0, 0
        self._unsettled: list[Tensor] = []

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.adam.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, loss: Tensor | float) -> Tensor:
        """Clip the accumulated gradients and step, or skip.

        Args:
            loss: The sum of what this process differentiated, to look at.

        Returns:
            The gradient norm before clipping, 0-d; NaN where the step was skipped.

        Raises:
            NonFiniteError: On a CPU, where looking is free, as `settle` does.
        """
        here = torch.as_tensor(loss, dtype=torch.float32, device=self.parameters[0].device)
        everywhere = sum_gradients(self.parameters, here.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        found = torch.stack([everywhere, norm.to(everywhere)])
        bad = ~torch.isfinite(found).all()
        self.adam.found_inf = bad.float()  # what gradient scalers tell a fused optimizer
        self.adam.step()
        self.zero_grad()
        self._unsettled.append(found)
        if found.device.type == "cpu":
            self.settle()
        return torch.where(bad, torch.nan, found[1])

    def settle(self) -> None:
        """Count the steps that were skipped; call it at the end of an update.

        Raises:
            NonFiniteError: After `limit` skipped steps in a row.
        """
        found, self._unsettled = self._unsettled, []
        for loss, norm in torch.stack(found).tolist() if found else []:
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row = 0
                continue
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= self.limit:
                raise NonFiniteError(
                    f"loss ({loss}) or gradient norm ({norm}) was not finite {self.in_a_row} steps "
                    "in a row: lower the learning rate, use float32, or look for an outlying reward"
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on exactly."""
        adam = self.adam.state_dict()
        return {"adam": adam, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        # Checkpoints written before the optimizer was fused say that it is not.
        groups = [{**group, "fused": True} for group in state["adam"]["param_groups"]]
        self.adam.load_state_dict({**state["adam"], "param_groups": groups})
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
