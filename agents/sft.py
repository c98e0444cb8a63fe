"""SFT: behaviour cloning on reference responses.

Pomerleau 1988; supervised fine-tuning as in Ouyang et al. 2022, section 3.5. The loss is the
negative log-likelihood of the tokens of a reference response and of the stop id after it; prompt
tokens are read and never learned.

Where this departs from common practice:

1. One example is one (prompt, reference) pair: a prompt with five references counts five times.
2. The policy's own distribution is fitted, its temperature included: that is what is sampled.
3. The normaliser is the number of tokens of the whole batch, whatever the split into microbatches.
4. A reference longer than the token budget is cut there and gets no stop id: the policy could not
   write more of it either.
5. Training stops early by a held-out score (`patience`), and the best weights are put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from textgym.checkpoint import best_checkpoint
from textgym.episodes import SequenceBatch
from textgym.learning import GuardedOptimizer, check_positive, check_setup, learning_rate
from textgym.parallel import deal, total
from textgym.rollout import PromptQueue
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.streams import mix64
from textgym.weights import read_policy

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task
    from textgym.vector import TextGenVectorEnv

_QUEUE = 1  # key that the run's seed is hashed with


@dataclass(frozen=True)
class SFTConfig:
    """What SFT does; every number of it."""

    seed: int = 0
    """Seed of the order of examples."""
    column: str = "references"
    """Column of the reference responses: one text or a list of them."""
    prefix: str = ""
    """Put before every reference, for tokenizers whose words begin with a space."""
    batch_size: int = 32
    """Examples of an update."""
    epochs: float = 3.0
    """Passes over all examples, where `learn` is given no number of tokens."""
    microbatch: int | None = None
    """Sequences in one forward; None: all. Changes memory, not results."""
    lr: float = 3e-4
    """Highest learning rate."""
    warmup_updates: int = 0
    """Updates of linear warm-up."""
    lr_final: float = 0.1
    """Learning rate at the end, as a share of `lr`; decays linearly over tokens."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    select: Literal["nll", "reward"] = "nll"
    """What is best on held-out prompts: the likelihood of references, or sampled reward."""
    patience: int = 0
    """Held-out evaluations without a better one after which training stops; 0: never."""
    eval_every: int = 50
    """Updates between held-out evaluations; 0: only before and after."""
    eval_episodes: int = 256
    """Held-out prompts of an evaluation."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept; the best is kept besides."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        check_positive(self, "batch_size", "checkpoint_every", "keep", "eval_episodes")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")


@dataclass(frozen=True)
class Example:
    """One prompt and one reference response, as ids."""

    prompt: list[int]
    response: list[int]
    """Stop id included, unless the reference was cut."""


class SFT:
    """The agent; `learn` trains `policy` in place."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: SFTConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained.
            envs: Whose task has the prompts, the references and the tokenizer.
            config: Default: `SFTConfig()`.
            eval_envs: Held-out prompts; None: no evaluation, no early stop.
            folder: Where logs and checkpoints go; None: nowhere.

        Raises:
            ValueError: If there are no references, or the parts do not fit.
        """
        self.config = cfg = config or SFTConfig()
        self.policy, self.eval_envs, self.folder = policy, eval_envs, folder
        self.task = envs.unwrapped.task
        for each in (envs, eval_envs):
            if each is not None:
                gamma = each.unwrapped.task.schedule.gamma
                check_setup(policy, each, gamma=1.0 if gamma is None else gamma)
        self.examples = reference_examples(self.task, cfg.column, cfg.prefix)
        self.held_out: list[Example] = []
        if eval_envs is not None:
            found = reference_examples(
                eval_envs.unwrapped.task, cfg.column, cfg.prefix, limit=cfg.eval_episodes
            )
            self.held_out = sorted(found, key=lambda e: -len(e.prompt) - len(e.response))
        self.optimizer = GuardedOptimizer(
            policy, lr=cfg.lr, max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay
        )
        self.queue = PromptQueue(len(self.examples), int(mix64(cfg.seed, _QUEUE)))
        self._best: dict[str, Tensor] | None = None
        self._best_score = -math.inf

    @property
    def tokens_per_epoch(self) -> int:
        """Response tokens of all examples."""
        return sum(len(example.response) for example in self.examples)

    def learn(
        self,
        total_tokens: int | None = None,
        *,
        resume: bool = False,
        quiet: bool = False,
        max_updates: int | None = None,
    ) -> Result:
        """Train on `total_tokens` response tokens.

        Args:
            total_tokens: Of the whole run; None: `epochs` passes.
            resume: Go on from the newest checkpoint in `folder`, if there is one.
            quiet: No progress on standard error.
            max_updates: End this call, not the run, after so many updates.

        Raises:
            NonFiniteError: If five steps in a row were not finite.
        """
        cfg = self.config
        total = total_tokens or math.ceil(cfg.epochs * self.tokens_per_epoch)
        parts: dict[str, Stateful] = {"optimizer": self.optimizer, "queue": self.queue}
        with Run(
            "SFT",
            self.policy,
            cfg,
            parts,
            folder=self.folder,
            total_tokens=total,
            resume=resume,
            quiet=quiet,
            max_updates=max_updates,
            evaluate=self._evaluate if self.held_out else None,
            task=self.task,
        ) as run:
            run.begin()
            while run.wants_more:
                lr = learning_rate(
                    cfg.lr,
                    run.counters.update,
                    run.progress,
                    warmup_updates=cfg.warmup_updates,
                    final=cfg.lr_final,
                )
                self.optimizer.set_lr(lr)
                examples = [self.examples[i] for i in self.queue.take(cfg.batch_size)]
                nll, norm = self._update(examples)
                run.finish_update(
                    {
                        "loss/nll": nll,
                        "optim/grad_norm": norm,
                        "optim/lr": lr,
                        "optim/skipped": self.optimizer.skipped,
                    },
                    sum(len(example.response) for example in examples),
                )
            if run.finished:
                self._put_best_back(run)
            return run.result()

    def _update(self, examples: Sequence[Example]) -> tuple[float, float]:
        """One gradient step; returns the loss in nats per token and the gradient norm."""
        tokens = sum(len(example.response) for example in examples)
        nll = torch.zeros((), device=self.policy.device)
        for part in _parts(examples, self.config.microbatch):
            scored = self.policy.evaluate(sequence_batch(part), entropy=False)
            loss = -scored.logprob.sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            nll += loss.detach()
        norm = self.optimizer.step(nll)
        self.optimizer.settle()
        whole: float = total(float(nll))
        return whole, float(norm)

    def _evaluate(self) -> tuple[dict[str, float], float]:
        cfg = self.config
        nll = self.nll(self.held_out)
        metrics = {"eval/nll": nll, "eval/perplexity": math.exp(min(nll, 700.0))}
        score = -nll
        if cfg.select == "reward":
            assert self.eval_envs is not None
            sampled, _ = evaluate_policy(
                self.policy, self.eval_envs, cfg.eval_episodes, seed=cfg.seed
            )
            metrics |= sampled
            score = sampled["eval/reward_mean"]
        self._remember(score)
        return metrics, score

    @torch.no_grad()
    def nll(self, examples: Sequence[Example]) -> float:
        """Negative log-likelihood of reference responses, nats per token."""
        sums = [
            self.policy.evaluate(sequence_batch(part), entropy=False).logprob.double().sum()
            for part in _parts(examples, self.config.microbatch or self.config.batch_size)
        ]
        whole: float = total(sum(torch.stack(sums).tolist()) if sums else 0.0)
        return -whole / sum(len(example.response) for example in examples)

    def _remember(self, score: float) -> None:
        """Keep the best weights in memory where there is no folder to keep them in."""
        if self.folder is None and score > self._best_score:
            self._best_score = score
            trained = self.policy.named_parameters()
            self._best = {n: p.detach().clone() for n, p in trained if p.requires_grad}

    @torch.no_grad()
    def _put_best_back(self, run: Run) -> None:
        if not self.held_out:
            return
        if run.checkpoints is not None:
            best = best_checkpoint(run.checkpoints)
            if best is not None:
                read_policy(self.policy, best)
        elif self._best is not None:
            parameters = dict(self.policy.named_parameters())
            for name, value in self._best.items():
                parameters[name].copy_(value)


def reference_examples(
    task: Task, column: str, prefix: str = "", *, limit: int | None = None
) -> list[Example]:
    """Encode the references of a task's prompts.

    Text of a data set is encoded here, once, as a response on its own; text of a policy never is.

    Args:
        task: Prompts, tokenizer, budget and stop ids.
        column: Of the prompt table; one text or a list of texts a row.
        prefix: Put before every reference.
        limit: Only the first so many prompts.

    Returns:
        One example for each prompt and reference, in the order of the table.

    Raises:
        ValueError: If the column is missing or a row has no reference.
    """
    if column not in task.prompts.columns:
        raise ValueError(
            f"SFT learns from reference responses in the column {column!r}, which the prompt table "
            f"does not have; its columns are {list(task.prompts.columns)}"
        )
    found: list[Example] = []
    for row in range(len(task.prompts))[:limit]:
        references = task.prompts[row][column]
        texts = [references] if isinstance(references, str) else list(references)
        if not texts:
            raise ValueError(f"prompt {row} has no reference in the column {column!r}")
        prompt = task.prompt_ids[row, : task.prompt_length[row]].tolist()
        responses = [_response(task, prefix + text) for text in texts]
        if not all(responses):
            raise ValueError(f"prompt {row} has an empty reference in the column {column!r}")
        found.extend(Example(prompt, response) for response in responses)
    return found


def sequence_batch(examples: Sequence[Example]) -> SequenceBatch:
    """Whole sequences whose action tokens are the responses, on the CPU."""
    lengths = [len(example.prompt) + len(example.response) for example in examples]
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    row, col = [], []
    for b, example in enumerate(examples):
        ids[b, : lengths[b]] = torch.tensor(example.prompt + example.response)
        row.append(torch.full((len(example.response),), b))
        col.append(torch.arange(len(example.prompt), lengths[b]))
    return SequenceBatch(
        ids=ids, lengths=torch.tensor(lengths), row=torch.cat(row), col=torch.cat(col)
    )


def _response(task: Task, text: str) -> list[int]:
    """Ids of a reference, with what ends it."""
    ending = "" if task.stop_ids or not task.stop_strings else task.stop_strings[0]
    ids = task.tokenizer.encode_plain(text + ending) + list(task.stop_ids[:1])
    return ids[: task.max_new_tokens]


def _parts(examples: Sequence[Example], size: int | None) -> Iterator[list[Example]]:
    """This process's share of some examples in groups of at most `size`, of similar length."""
    mine = [examples[i] for i in deal([len(e.prompt) + len(e.response) for e in examples])]
    ordered = sorted(mine, key=lambda e: -len(e.prompt) - len(e.response))
    size = size or len(examples)
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
