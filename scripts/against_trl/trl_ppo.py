"""A child of `bench_e2e.py`: PPOTrainer of TRL, which 1.12.0 has last.

It trains a second model of the same size for the value, and takes a reward model only: here a
module without weights that counts ids. Set are what the workload says, sampling at temperature 1 as
ours (its default is 0.7), and what only costs time here (gradient checkpointing and sample
generations off); the rest are its defaults.
"""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_parts import Marks, make_tokenizer
from workload import Meter, Workload, from_command_line, one_thread, prompts, save_model


class Ids(torch.nn.Module):
    """A backbone whose hidden states are the ids."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Give [B, T]."""
        return SimpleNamespace(hidden_states=(input_ids,))


class CountedReward(torch.nn.Module):
    """The meter's reward in the form of a reward model; TRL reads its last column."""

    base_model_prefix = "backbone"

    def __init__(self, meter: Meter) -> None:
        """Keep the meter."""
        super().__init__()
        self.backbone, self.meter = Ids(), meter

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """Give [B, T, 1], the same in every column."""
        with self.meter.rollout():
            scores = self.meter.reward(ids[:, self.meter.work.prompt_tokens :].tolist())
            found = torch.tensor(scores, device=ids.device)
        return found[:, None, None].expand(*ids.shape, 1)


def mark_generation(meter: Meter) -> None:
    """Let the function that samples tell the meter."""
    generate = ppo_trainer.batch_generation

    def timed(*args: Any, **kwargs: Any) -> Any:
        with meter.rollout():
            return generate(*args, **kwargs)

    ppo_trainer.batch_generation = timed


def main(work: Workload) -> None:
    """Train, and print the JSON line."""
    one_thread(work)
    if work.dtype == "bfloat16":
        # What `accelerate launch --mixed_precision bf16` sets. The flag of PPOConfig alone does
        # nothing: PPOTrainer makes its accelerator without it.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    meter = Meter(work)
    mark_generation(meter)
    rows = Dataset.from_dict({"input_ids": prompts(work)})
    with tempfile.TemporaryDirectory() as folder:
        save_model(work, f"{folder}/model")
        policy = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
        value = AutoModelForSequenceClassification.from_pretrained(
            f"{folder}/model", dtype=torch.float32, num_labels=1
        )
        config = PPOConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=work.microbatch,
            gradient_accumulation_steps=work.episodes // work.microbatch,
            local_rollout_forward_batch_size=work.episodes,
            num_ppo_epochs=work.epochs,
            num_mini_batches=1,
            total_episodes=work.episodes * (work.warmup + work.updates),
            response_length=work.response_tokens,
            temperature=1.0,
            kl_coef=work.kl_coef,
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            bf16=work.dtype == "bfloat16",
            use_cpu=work.device == "cpu",
            gradient_checkpointing=False,
            num_sample_generations=0,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=make_tokenizer(work.vocab_size),
            model=policy,
            ref_model=None,
            reward_model=CountedReward(meter),
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows.select(range(work.episodes)),
            callbacks=[Marks(meter)],
        )
        trainer.remove_callback(PrinterCallback)
        meter.ready(policy)
        trainer.train()
        meter.report("torch", "transformers", "trl", "accelerate")


if __name__ == "__main__":
    main(from_command_line(__doc__))
