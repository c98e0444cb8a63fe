"""The embedded model: small, plain, its tokenizer exact, and no worse or better than its card."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from textgym.envs.data_to_text import DataToTextVectorEnv, ferry_row
from textgym.envs.splits import table
from textgym.tokens import assets_folder, load_tokenizer

FOLDER = assets_folder()


def test_the_folder_is_small_and_the_card_gives_the_sizes() -> None:
    weights = (FOLDER / "model.safetensors").stat().st_size
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 4_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"weights {weights:,} bytes" in card
    assert "python scripts/pretrain_tiny.py" in card


def test_the_loss_had_settled() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    losses = [float(x) for x in re.findall(r"^\| \d+ \| ([\d.]+) \|$", card, re.MULTILINE)]
    assert len(losses) == 10
    assert abs(losses[-1] - losses[-3]) / losses[-3] < 0.01


def test_text_of_the_tasks_survives_the_tokenizer() -> None:
    tokenizer = load_tokenizer()
    for row in table(ferry_row, "test")[:50]:
        for text in (row["prompt"], *row["references"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("Crème brûlée 東京 ?!\n")) == "Crème brûlée 東京 ?!\n"
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_plain_transformers_loads_the_folder() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ours = load_tokenizer()
    assert model.config.vocab_size == len(tokenizer) == ours.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ours.stop_ids[0]
    assert tokenizer.encode("name Heron | fare 4 =") == ours.encode("name Heron | fare 4 =")
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_samples_leave_room_below_the_ceiling(split: str) -> None:
    from textgym.policies import CausalLMPolicy
    from textgym.runs import evaluate_policy

    policy = CausalLMPolicy(str(FOLDER), value_head=False, device="cpu")
    envs = DataToTextVectorEnv(num_envs=50, autoreset_mode="Disabled", split=split)
    metrics, _ = evaluate_policy(policy, envs, 200, seed=3)
    assert 0.35 < metrics["eval/reward_mean"] < 0.52
    rows = envs.task.prompts
    assert np.mean([len(row["references"]) for row in rows]) > 7.9
