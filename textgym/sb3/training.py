"""An algorithm of stable-baselines3 as a run of textgym: its logs, evaluation, checkpoints, resume.

The algorithm stays as it is. Each update is one call of its own `learn`, which goes on where the
last one ended; what is around that call is the loop of textgym's own agents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textgym.kl import AdaptiveKL
from textgym.learning import (
    NOT_NEGATIVE,
    NonFiniteError,
    check_above_0,
    check_not_negative,
    check_positive,
    check_setup,
    learning_rate,
)
from textgym.parallel import world
from textgym.returns import check_unit
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.sb3.callbacks import SampleTextCallback, TextMetricsCallback
from textgym.sb3.kl import ReferenceKL
from textgym.sb3.state import AlgorithmState
from textgym.sb3.vec_env import SB3VecEnv
from textgym.streams import mix64

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task
    from textgym.vector import TextGenVectorEnv

RECORDED = {  # SB3's name -> ours, and the factor between them
    "train/policy_gradient_loss": ("loss/policy", 1.0),
    "train/policy_loss": ("loss/policy", 1.0),
    "train/policy_objective": ("loss/policy", -1.0),
    "train/value_loss": ("loss/value", 1.0),
    "train/entropy_loss": ("policy/entropy", -1.0),
    "train/approx_kl": ("ppo/approx_kl", 1.0),
    "train/clip_fraction": ("ppo/clip_fraction", 1.0),
    "train/kl_divergence_loss": ("trpo/kl", 1.0),
    "train/is_line_search_success": ("trpo/line_search", 1.0),
    "train/explained_variance": ("value/explained_variance", 1.0),
}
OURS = ("rollout/", "reward/", "kl/")  # recorded by our callbacks under the names of the glossary
RESPONSES = 3  # steps of a rollout in budgets of a response: the more, the fewer of them are cut
_ROWS = 1  # key that the run's seed is hashed with
NOT_OURS = ("rollout/ep_len_mean", "rollout/ep_rew_mean", "rollout/success_rate")


def check_config(config: Any) -> None:
    """Check what the recipes' configs have in common.

    Raises:
        ValueError: Naming the first number that could not be trained with.
    """
    check_positive(config, "checkpoint_every", "keep", "eval_episodes")
    check_not_negative(config, *NOT_NEGATIVE)
    if config.n_steps is not None:
        check_positive(config, "n_steps")
    check_unit("gamma", config.gamma)
    check_above_0(config, "lr")


@dataclass
class UpdateLR:
    """A schedule of SB3 that is set from outside: SB3 sees a run one update at a time."""

    value: float
    """Learning rate of the present update."""

    def __call__(self, progress_remaining: float) -> float:
        """The learning rate, whatever SB3 believes the progress to be."""
        return self.value


class Training:
    """Everything around one algorithm.

    Args:
        policy: What is trained, in place; needs a value head.
        envs: Made with `autoreset_mode="SameStep"`.
        config: A recipe's; see `textgym.agents.SB3PPOConfig`.
        title: Name of the agent.
        eval_envs: Held-out prompts, made with `autoreset_mode="Disabled"`; None: no evaluation.
        reference: What `kl_coef` prices the distance to. None: the policy as it is now, where there
            is a price.
        folder: Where logs and checkpoints go; None: nowhere.
        masks: Whether the algorithm heeds action masks.

    Raises:
        ValueError: If the parts do not fit (see `textgym.learning.check_setup`).

    Attributes:
        envs: What the algorithm learns in.
        n_steps: Steps of each row in a rollout.
        num_tokens: Action tokens of a rollout.
        options: Arguments that every algorithm is given.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: Any,
        title: str,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
        masks: bool = False,
    ) -> None:
        if world().size > 1:
            raise ValueError(
                f"stable-baselines3 trains in one process, this run has {world().size}: start it "
                "without torchrun, or use textgym's own agents"
            )
        if reference is None and (config.kl_coef > 0 or config.kl_target is not None):
            reference = policy.frozen_copy()
        check = partial(
            check_setup, policy, gamma=config.gamma, reference=reference, needs_values=True
        )
        check(envs, autoreset_mode="SameStep")
        if envs.masks_actions and not masks:
            raise ValueError(
                "this environment forbids tokens, and of SB3's algorithms only MaskablePPO heeds "
                "that: use SB3MaskablePPO (--agent sb3-maskable-ppo)"
            )
        if eval_envs is not None:
            check(eval_envs)
        self.policy, self.config, self.title = policy, config, title
        self.eval_envs, self.reference, self.folder = eval_envs, reference, folder
        self.task: Task = envs.unwrapped.task
        self.lr = UpdateLR(config.lr)
        self.envs = SB3VecEnv(envs)
        # Row i is seeded with the i-th number from here: seeds that are neighbours share no row.
        self.row_seed = int(mix64(config.seed, _ROWS)) >> 33
        self.n_steps = config.n_steps or RESPONSES * self.task.max_new_tokens
        self.num_tokens = self.n_steps * self.envs.num_envs
        self.options: dict[str, Any] = {
            "env": self.envs,
            "learning_rate": self.lr,
            "n_steps": self.n_steps,
            "gamma": config.gamma,
            "gae_lambda": config.gae_lambda,
            "policy_kwargs": {"model": policy, "seed": config.seed},
            "rollout_buffer_kwargs": {"seed": config.seed},
            "device": policy.device,
        }
        self.metrics = TextMetricsCallback()
        self.samples = SampleTextCallback(None, samples=config.samples)
        self.callbacks: list[BaseCallback] = [self.metrics, self.samples]
        self.kl: ReferenceKL | None = None
        if reference is not None:
            self.kl = ReferenceKL(
                config.kl_coef,
                reference,
                target=config.kl_target,
                horizon=config.kl_horizon,
                exact_sequences=config.exact_kl_episodes,
            )
            if isinstance(self.kl.controller, AdaptiveKL):
                self.kl.controller.check(self.num_tokens)  # as many episodes at most
            self.callbacks.append(self.kl)

    def batch_size(self, minibatches: int) -> int:
        """Tokens of each of so many minibatches.

        Raises:
            ValueError: There are not two for each, of which a standard deviation could be taken.
        """
        if self.num_tokens < 2 * minibatches:
            raise ValueError(
                f"a rollout of {self.envs.num_envs} rows and {self.n_steps} steps is too small for "
                f"{minibatches} parts of two tokens at least: take more rows or a larger n_steps"
            )
        return self.num_tokens // minibatches

    def learn(
        self,
        algorithm: OnPolicyAlgorithm,
        total_tokens: int,
        *,
        resume: bool = False,
        quiet: bool = False,
        max_updates: int | None = None,
    ) -> Result:
        """Train until `total_tokens` action tokens were sampled.

        Args:
            algorithm: Made with `options`.
            total_tokens: Of the whole run, unscored ones counted.
            resume: Go on from the newest checkpoint in the folder, if there is one.
            quiet: No progress on standard error.
            max_updates: End this call, not the run, after so many updates.

        Raises:
            UnscoredError: If more than 20 % of a rollout's episodes have no score.
            NonFiniteError: If an update left a weight that is not finite; the newest checkpoint is
                from before it.
        """
        parts: dict[str, Stateful] = {
            "algorithm": AlgorithmState(algorithm, self.envs),
            "metrics": self.metrics,
            "samples": self.samples,
        }
        if self.kl is not None:
            parts["kl"] = self.kl
        with (
            self._lent(algorithm),
            Run(
                self.title,
                self.policy,
                self.config,
                parts,
                folder=self.folder,
                total_tokens=total_tokens,
                resume=resume,
                quiet=quiet,
                max_updates=max_updates,
                evaluate=None if self.eval_envs is None else self._evaluate,
                reference=self.reference,
                task=self.task,
            ) as run,
        ):
            if algorithm._last_obs is None:
                self.envs.seed(self.row_seed)
            run.begin()
            callbacks = [*self.callbacks, _RolloutDone(run)]
            while run.wants_more:
                self.lr.value = learning_rate(
                    self.config.lr,
                    run.counters.update,
                    run.progress,
                    warmup_updates=self.config.warmup_updates,
                    final=self.config.lr_final,
                )
                with self._own_draws(run.counters.update):
                    algorithm.learn(
                        self.num_tokens,
                        callback=callbacks,
                        log_interval=None,  # type: ignore[arg-type]
                        reset_num_timesteps=False,
                    )
                self._check_finite()
                metrics = self._take_metrics(algorithm.logger) | {"optim/lr": self.lr.value}
                run.finish_update(metrics, self.num_tokens, lambda: self.samples.records)
            return run.result()

    @contextmanager
    def _lent(self, algorithm: OnPolicyAlgorithm) -> Iterator[None]:
        """Let the algorithm log to us, and leave it as it was, whatever happens."""
        algorithm.set_logger(Logger(folder=None, output_formats=[]))
        try:
            yield
        finally:
            algorithm._custom_logger = False

    @contextmanager
    def _own_draws(self, update: int) -> Iterator[None]:
        """Let SB3 draw from the process's generator (TRPO does), and put that back afterwards."""
        device = self.policy.device
        with torch.random.fork_rng(
            range(torch.cuda.device_count()) if device.type == "cuda" else []
        ):
            torch.manual_seed(int(mix64(self.config.seed, update)) >> 1)
            yield

    def _evaluate(self) -> tuple[dict[str, float], float]:
        assert self.eval_envs is not None
        metrics, _ = evaluate_policy(
            self.policy, self.eval_envs, self.config.eval_episodes, seed=self.config.seed
        )
        return metrics, metrics["eval/reward_mean"]

    def _check_finite(self) -> None:
        for name, parameter in self.policy.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"after this update {name} is not finite: stable-baselines3 takes every step, "
                    "also of a loss that is not finite. Too high a learning rate, or a minibatch "
                    "of one token, can be the cause"
                )

    @staticmethod
    def _take_metrics(logger: Logger) -> dict[str, float]:
        """What was recorded since the last update, by glossary name."""
        found: dict[str, float] = {}
        for name, value in logger.name_to_value.items():
            if name in RECORDED:
                ours, factor = RECORDED[name]
                found[ours] = factor * float(value)
            elif name.startswith(OURS) and name not in NOT_OURS:
                found[name] = float(value)
        logger.dump()  # which clears it
        return found


@contextmanager
def whole_sequences() -> Iterator[None]:
    """Without SB3's warning of tokens left over: minibatches are filled with whole sequences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have specified a mini-batch size")
        yield


class _RolloutDone(BaseCallback):
    """Tells the run when sampling is over and learning begins."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.run.rollout_done()
