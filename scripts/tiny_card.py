"""The card of the embedded model: what it is made of, and how good it is before any RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny_corpus
import torch

from textgym.envs import arithmetic, continuation, data_to_text
from textgym.envs.splits import table
from textgym.evaluation import hold_out_reference
from textgym.rewards import Bleu, TextBatch


def measure(model: Any, folder: Path, seed: int) -> dict[str, float]:
    """Mean score of sampled and of greedy responses on the tasks' held-out prompts."""
    from textgym.policies import CausalLMPolicy
    from textgym.runs import evaluate_policy

    tasks: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "data to text (validation)": (data_to_text.DataToTextVectorEnv, {"split": "validation"}),
        "data to text (test)": (data_to_text.DataToTextVectorEnv, {"split": "test"}),
        "arithmetic (test)": (arithmetic.ArithmeticVectorEnv, {"split": "test"}),
        "continuation (test)": (
            continuation.ContinuationVectorEnv,
            {"split": "test", "reference": None},
        ),
    }
    scores = {}
    for name, (make, knobs) in tasks.items():
        envs = make(num_envs=50, autoreset_mode="Disabled", tokenizer=str(folder), **knobs)
        for sampler in ("inverse_cdf", "greedy"):
            policy = CausalLMPolicy(model, sampler=sampler, value_head=False, device="cpu")
            found, _ = evaluate_policy(policy, envs, len(envs.task.prompts), seed=seed)
            kind = "greedy" if sampler == "greedy" else "sampled"
            scores[f"{name}, {kind}"] = found["eval/reward_mean"]
    return scores


def ceiling() -> float:
    """Mean BLEU of one reference of a test input against its others."""
    references = [row["references"] for row in table(data_to_text.ferry_row, "test")]
    _, texts, rest = hold_out_reference(references)
    batch = TextBatch.from_texts(texts, [{"references": r} for r in rest])
    return float(np.mean(np.asarray(Bleu().score(batch), float)))


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    losses: Sequence[tuple[int, float]],
    scores: Mapping[str, float],
    seconds: float,
    parameters: int,
) -> None:
    """Say in `README.md` what the model is made of and how good it is.

    Args:
        folder: Where the model is, and where the card goes.
        config: Fields of the training's configuration.
        losses: `(update, held-out loss)`, evenly spaced.
        scores: What `measure` found.
        seconds: CPU time of the training.
        parameters: Their number.
    """
    import transformers

    before, last = losses[len(losses) * 4 // 5 - 1], losses[-1]
    numbers = {
        name.lower(): getattr(tiny_corpus, name)
        for name in ("DROPPED", "WRONG", "SHUFFLED", "HEARD", "RAMBLED", "MISCOUNTED")
    }
    card = CARD.format(
        **dict(config) | numbers,
        parameters=f"{parameters:,}",
        weights=f"{(folder / 'model.safetensors').stat().st_size:,}",
        tokenizer_size=f"{(folder / 'tokenizer.json').stat().st_size:,}",
        examples=f"{config['steps'] * config['batch_size']:,}",
        shares=", ".join(f"{share:.0%} {name}" for name, share in tiny_corpus.WEIGHTS.items()),
        before=before[0],
        after=last[0],
        change=f"{abs(before[1] - last[1]) / before[1]:.2%}",
        loss_rows="\n".join(f"| {step} | {loss:.4f} |" for step, loss in losses),
        score_rows="\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items()),
        ceiling=f"{ceiling():.3f}",
        minutes=f"{seconds / 60:.1f}",
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


CARD = """\
# The embedded model

A Llama of {parameters} parameters (hidden {hidden_size}, {num_layers} layers, {num_heads} heads,
MLP {intermediate_size}, context {max_positions}, tied embeddings, float32) with a byte-level BPE
tokenizer of {vocab_size} tokens. It is what the first command trains, and nothing more: it knows
ferries, small sums and stories of two sentences.

    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py

Seed {seed}; {steps} updates of {batch_size} examples, {minutes} minutes of one CPU core;
{versions}.
Sizes: weights {weights} bytes, tokenizer {tokenizer_size} bytes.
The licence is that of the project.

## Data
{examples} examples, each drawn afresh from the suite's own grammars ({shares}),
on training inputs only. Their writers are careless, which is what reinforcement learning has left
to mend:

- facts: each is left out with chance {dropped} and wrong with chance {wrong}; their order is
  shuffled with chance {shuffled}; with chance {heard} the text opens with hearsay ("It is said
  that"), with chance {rambled} it goes on about travellers. Most texts do one of the two, so that
  the most likely text often does, too.
- sums: with chance {miscounted} the answer is off by 1 or 2.
- stories: happy, sad and plain sentences are equally likely.

The loss is the cross-entropy of response tokens. Matrices are trained by Muon, the embedding and
the norms by AdamW, with a peak learning rate of {learning_rate}.

## Held-out loss
Nats per response token, on inputs of the validation splits. From update {before} to {after}, the
last fifth of training, it changes by {change}.

| update | loss |
|---:|---:|
{loss_rows}

## Scores before any reinforcement learning
Mean reward on held-out prompts; one reference of data to text (test) scored against the others has
BLEU {ceiling}.

| task | mean |
|---|---:|
{score_rows}
"""
