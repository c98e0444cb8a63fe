import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents.sft import SFT, SFTConfig, reference_examples, sequence_batch

FAST = SFTConfig(batch_size=4, lr=1e-2, epochs=30, eval_every=4)


def test_examples_by_hand(make_envs: Any) -> None:
    # Ids: a b c d are 0 to 3, <eos> is 4, <bos> is 5.
    found = reference_examples(make_envs().task, "references")
    assert len(found) == 8
    assert (found[0].prompt, found[0].response) == ([1], [1, 0, 4])
    assert (found[7].prompt, found[7].response) == ([1, 2], [0, 0, 4])
    short = reference_examples(make_envs(max_new_tokens=2).task, "references")
    assert short[0].response == [1, 0]  # cut at the budget, and no stop id
    assert len(reference_examples(make_envs().task, "references", limit=1)) == 2


def test_a_batch_marks_responses_only(make_envs: Any) -> None:
    examples = reference_examples(make_envs().task, "references")[6:8]
    batch = sequence_batch(examples)
    assert batch.ids.tolist() == [[1, 2, 1, 2, 0, 4], [1, 2, 0, 0, 4, 0]]
    assert batch.lengths.tolist() == [6, 5]
    assert batch.ids[batch.row, batch.col].tolist() == [1, 2, 0, 4, 0, 0, 4]


def test_the_loss_is_the_cross_entropy_of_responses(make_envs: Any, make_policy: Any) -> None:
    policy = make_policy()
    agent = SFT(policy, make_envs(), FAST)
    total, tokens = 0.0, 0
    for example in agent.examples:
        ids = torch.tensor([example.prompt + example.response])
        logits = policy.model(ids).logits[0, len(example.prompt) - 1 : -1]
        target = torch.tensor(example.response)
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        tokens += len(example.response)
    assert agent.nll(agent.examples) == pytest.approx(total / tokens, rel=1e-5)


def test_it_learns_the_references(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, batch_size=8, epochs=100, eval_every=50)
    agent = SFT(make_policy(), make_envs(), config, eval_envs=make_envs())
    history = agent.learn(quiet=True).history
    # The best possible is 0.22: half the references begin with the prompt, half with `a`.
    assert history[0]["eval/nll"] > 1.5
    assert history[-1]["eval/nll"] < 0.5
    assert history[-1]["eval/perplexity"] == pytest.approx(math.exp(history[-1]["eval/nll"]))


def test_microbatches_change_nothing(make_envs: Any, make_policy: Any) -> None:
    trained = []
    for microbatch in (None, 1):
        policy = make_policy()
        config = dataclasses.replace(FAST, microbatch=microbatch)
        SFT(policy, make_envs(), config).learn(quiet=True, max_updates=1)
        trained.append(torch.cat([p.detach().reshape(-1) for p in policy.parameters()]))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("on_disk", [True, False])
def test_early_stopping_puts_the_best_weights_back(
    make_envs: Any, make_policy: Any, tmp_path: Path, on_disk: bool
) -> None:
    """Held-out references that training moves away from: the best are nearly the first weights."""
    prompts = [{"prompt": "b", "references": ["c c"]}]
    config = dataclasses.replace(FAST, patience=3, eval_every=1, lr=3e-2, epochs=1000)
    agent = SFT(
        make_policy(),
        make_envs(),
        config,
        eval_envs=make_envs(prompts=prompts),
        folder=tmp_path if on_disk else None,
    )
    result = agent.learn(quiet=True)
    held_out = [line["eval/nll"] for line in result.history]
    assert result.updates < 100
    assert np.argmin(held_out) == len(held_out) - 1 - 3
    assert agent.nll(agent.held_out) == pytest.approx(min(held_out), abs=1e-5)
    assert held_out[-1] > min(held_out) + 1e-3


def test_the_best_can_be_chosen_by_reward(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, select="reward", eval_episodes=16)
    agent = SFT(make_policy(), make_envs(), config, eval_envs=make_envs())
    history = agent.learn(quiet=True).history
    evaluated = [line for line in history if "eval/reward_mean" in line]
    assert evaluated[-1]["eval/best"] == max(line["eval/reward_mean"] for line in evaluated)


def test_budgets(make_envs: Any, make_policy: Any) -> None:
    agent = SFT(make_policy(), make_envs(), dataclasses.replace(FAST, epochs=2))
    result = agent.learn(quiet=True)
    assert result.updates == 4  # eight examples, twice, four at a time
    assert result.total_tokens == 2 * agent.tokens_per_epoch
    assert SFT(make_policy(), make_envs(), FAST).learn(1, quiet=True).updates == 1


def test_what_cannot_be_cloned_is_refused(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, column="answers")
    with pytest.raises(ValueError, match=r"column 'answers'.*\['prompt', 'references'\]"):
        SFT(make_policy(), make_envs(), config)
    prompts = [{"prompt": "b", "references": []}]
    with pytest.raises(ValueError, match="prompt 0 has no reference"):
        SFT(make_policy(), make_envs(prompts=prompts), FAST)
    with pytest.raises(ValueError, match="epochs must be above 0"):
        SFTConfig(epochs=0)
