"""A child of `bench_e2e.py`: GRPOTrainer of TRL.

Its loss, sampling and optimizer are its defaults. Set are what the workload says (batch, groups,
lengths, learning rate, `beta`, `bf16`), what only costs time here (gradient checkpointing off), and
what ours does too (log every update, no learning rate schedule). The reference, where there is a
price of KL, is loaded by TRL from the folder of the model.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl_parts import Marks, make_tokenizer
from workload import Meter, Workload, from_command_line, one_thread, prompts, save_model


def trainer_class(meter: Meter) -> type[GRPOTrainer]:
    """GRPOTrainer that tells the meter which part is sampling and scoring."""

    class Trainer(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with meter.rollout():
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with meter.rollout():
                return super()._calculate_rewards(*args, **kwargs)

    return Trainer


def main(work: Workload) -> None:
    """Train, and print the JSON line."""
    one_thread(work)
    meter = Meter(work)
    rows = [" ".join(f"s{i}" for i in ids) for ids in prompts(work)]
    with tempfile.TemporaryDirectory() as folder:
        save_model(work, f"{folder}/model")
        config = GRPOConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=work.microbatch,
            gradient_accumulation_steps=work.episodes // work.microbatch,
            num_generations=work.group_size,
            max_completion_length=work.response_tokens,
            beta=work.kl_coef,
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            max_steps=work.warmup + work.updates,
            bf16=work.dtype == "bfloat16",
            use_cpu=work.device == "cpu",
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trainer_class(meter)(
            model=f"{folder}/model",
            reward_funcs=meter.reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=make_tokenizer(work.vocab_size),
            callbacks=[Marks(meter)],
        )
        trainer.remove_callback(PrinterCallback)
        meter.ready(trainer.model)
        trainer.train()
        meter.report("torch", "transformers", "trl", "accelerate")


if __name__ == "__main__":
    main(from_command_line(__doc__))
