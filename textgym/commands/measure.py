"""Measure a policy on a table of prompts: what `train` and `eval` print."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from textgym.evaluation import (
    Metric,
    bleu_metric,
    distinct_n,
    hold_out_reference,
    mean_metric,
    perplexity_metric,
    rouge_metric,
)
from textgym.learning import microbatches
from textgym.parallel import deal, total
from textgym.rewards import TextBatch
from textgym.rollout import collect

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task

ROUGE = ("rouge1", "rouge2", "rougeL")
FORWARD = 64  # sequences of one scoring forward


@dataclass(frozen=True)
class Measured:
    """What one policy, or the references themselves, scored."""

    metrics: dict[str, Metric | float]
    """By name; a bare number is one that has no bootstrap interval."""
    prompts: list[str]
    """Prompts as text."""
    texts: list[str]
    """First response to each prompt."""
    scores: list[float]
    """Its reward; NaN where it is unscored."""


def measure(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy | None,
    envs: Any,
    *,
    count: int | None = None,
    seed: int = 0,
    samples: int = 1,
    lowercase: bool = False,
) -> Measured:
    """Let a policy answer the first prompts of an environment, and score the answers.

    Args:
        policy: Acts with the sampler that it has.
        reference: What KL and perplexity are measured against; None for neither.
        envs: Made with `autoreset_mode="Disabled"`.
        count: Number of prompts; None for all.
        seed: Key of the draws; equal seeds give two policies the same draws.
        samples: Responses to each prompt.
        lowercase: Whether corpus BLEU compares lower-cased.
    """
    task: Task = envs.unwrapped.task
    number = len(task.prompts) if count is None else min(count, len(task.prompts))
    episodes = collect(
        policy,
        envs,
        number * samples,
        group_size=samples,
        seed=seed,
        prompt_rows=np.arange(number),
    )
    scores = np.where(episodes.weight > 0, episodes.scores, np.nan)
    metrics: dict[str, Metric | float] = {"reward": mean_metric("reward", scores)}
    for name, values in episodes.components.items():
        applies = np.add.reduceat(~np.isnan(values), episodes.offsets[:-1]) > 0
        part = np.where(applies & (episodes.weight > 0), episodes.per_episode(values), np.nan)
        if len(episodes.components) > 1:
            metrics[f"reward: {name}"] = mean_metric(name, part)
    rows = [task.prompts[int(p)] for p in episodes.prompt_row]
    metrics |= text_metrics(episodes.texts, _references(rows), lowercase=lowercase)
    metrics["length"] = mean_metric("length", episodes.lengths)
    cut = [reason == "length" for reason in episodes.stop_reason]
    metrics["cut"] = mean_metric("cut", np.asarray(cut, np.float64))
    if reference is not None:
        metrics |= _against(policy, reference, episodes)
    if (episodes.weight == 0).any():
        metrics["unscored"] = mean_metric("unscored", episodes.weight == 0)
    grouped = {n: m.grouped(samples) if isinstance(m, Metric) else m for n, m in metrics.items()}
    shown = slice(None, None, samples)
    prompts = [_as_text(prompt) for prompt in episodes.prompts[shown]]
    return Measured(grouped, prompts, episodes.texts[shown], scores[shown].tolist())


def ceiling(task: Task, *, count: int | None = None, lowercase: bool = False) -> Measured | None:
    """Score one reference of each prompt against the others; None where there are no two.

    It has one reference fewer to agree with than a model has, and people do not write for BLEU.
    """
    rows = list(task.prompts)[:count]
    references = _references(rows)
    if references is None:
        return None
    kept, texts, rest = hold_out_reference(references)
    if not kept:
        return None
    without = [{**rows[i], "references": r} for i, r in zip(kept, rest, strict=True)]
    schedule = task.schedule
    prompts = [task.prompt_text(i) for i in kept]
    tracks = [schedule.begin(row, p) for row, p in zip(without, prompts, strict=True)]
    batch = replace(TextBatch.from_texts(texts, without), prompts=prompts)
    ended = np.ones(len(texts), np.bool_)
    payment = schedule.pay(tracks, batch, ended, ~ended)
    scores = [
        reward if status is None else math.nan
        for reward, status in zip(payment.reward.tolist(), payment.status, strict=True)
    ]
    metrics: dict[str, Metric | float] = {"reward": mean_metric("reward", scores)}
    if len(payment.components) > 1:
        parts = payment.components.items()
        metrics |= {f"reward: {name}": mean_metric(name, values) for name, values in parts}
    metrics |= text_metrics(texts, rest, lowercase=lowercase)
    return Measured(metrics, [_as_text(p) for p in prompts], texts, scores)


def text_metrics(
    texts: list[str], references: list[list[str]] | None, *, lowercase: bool = False
) -> dict[str, Metric | float]:
    """Corpus BLEU and ROUGE, where there are references, and distinct-n."""
    metrics: dict[str, Metric | float] = {}
    if references is not None:
        metrics["bleu"] = bleu_metric(texts, references, lowercase=lowercase)
        metrics |= {kind: rouge_metric(kind, texts, references) for kind in ROUGE}
    return metrics | {"distinct-1": distinct_n(texts, 1), "distinct-2": distinct_n(texts, 2)}


@contextmanager
def sampler(policy: CausalLMPolicy, **changes: Any) -> Iterator[CausalLMPolicy]:
    """Give a policy another sampler for a while: `method`, `temperature`, `top_k`, `top_p`."""
    before = policy.sampler
    policy.sampler = replace(before, **changes)
    try:
        yield policy
    finally:
        policy.sampler = before


@torch.no_grad()
def _against(
    policy: CausalLMPolicy, reference: CausalLMPolicy, episodes: Episodes
) -> dict[str, Metric | float]:
    """KL to the reference (exact, nats per response) and perplexity under it."""
    kl, logprob = np.zeros(episodes.num_tokens), np.zeros(episodes.num_tokens)
    with sampler(policy, top_k=None, top_p=None):  # the distribution before any cut
        for part in microbatches(
            deal(np.diff(episodes.starts)), episodes, FORWARD, policy.forward_tokens
        ):
            tokens = episodes.tokens(part)
            kl[tokens] = policy.kl(reference, episodes.batch(part)).cpu().numpy()
            scored = reference.evaluate(episodes.batch(part), entropy=False)
            logprob[tokens] = scored.logprob.cpu().numpy()
    kl, logprob = total(kl), total(logprob)
    return {
        "kl": mean_metric("kl", episodes.per_episode(kl)),
        "perplexity": perplexity_metric(episodes.per_episode(logprob), episodes.lengths),
    }


def _references(rows: list[Any]) -> list[list[str]] | None:
    if not rows or "references" not in rows[0]:
        return None
    given = [row["references"] for row in rows]
    return [[targets] if isinstance(targets, str) else list(targets) for targets in given]


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
