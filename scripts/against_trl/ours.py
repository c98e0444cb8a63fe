"""A child of `bench_e2e.py`: GRPO or PPO of textgym.

Logging, checks and stop handling are as users run them. There is no held-out evaluation, as TRL
makes none, and no checkpoint between the measured updates, as TRL's default saves none so early.
"""

from __future__ import annotations

import tempfile
from typing import Any

from workload import Meter, Workload, from_command_line, one_thread, prompts, save_model

from textgym.agents import GRPO, PPO, GRPOConfig, PPOConfig
from textgym.policies import CausalLMPolicy
from textgym.runs import Run
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv


def mark(meter: Meter) -> None:
    """Let a run tell the meter when a rollout and an update are done."""
    rollout_done, finish_update = Run.rollout_done, Run.finish_update

    def sampled(run: Run) -> None:
        rollout_done(run)
        meter.rollout_done()

    def finished(run: Run, *args: Any, **kwargs: Any) -> None:
        finish_update(run, *args, **kwargs)
        meter.update_done()

    Run.rollout_done, Run.finish_update = sampled, finished  # type: ignore[method-assign]


def main(work: Workload) -> None:
    """Train, and print the JSON line."""
    one_thread(work)
    meter = Meter(work)
    envs = TextGenVectorEnv(
        num_envs=work.episodes,
        autoreset_mode="Disabled",
        prompts=[{"prompt": row} for row in prompts(work)],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(work.vocab_size)], bos=None, eos=None),
        reward=meter.reward,
        max_new_tokens=work.response_tokens,
        stop=(),
    )
    common: dict[str, Any] = {
        "episodes": work.episodes,
        "microbatch": None if work.microbatch == work.episodes else work.microbatch,
        "lr": work.lr,
        "kl_coef": work.kl_coef,
        "eval_every": 0,
        "checkpoint_every": 1_000_000,
    } | work.options
    with tempfile.TemporaryDirectory() as folder:
        save_model(work, f"{folder}/model")
        policy = CausalLMPolicy(
            f"{folder}/model",
            device=work.device,
            compute_dtype=None if work.dtype == "float32" else work.dtype,
            value_head=work.algorithm == "ppo",
        )
        meter.ready(policy.model)
        agent: GRPO | PPO
        if work.algorithm == "grpo":
            config = GRPOConfig(group_size=work.group_size, kl_in="loss", **common)
            agent = GRPO(policy, envs, config, folder=f"{folder}/run")
        else:
            settings = PPOConfig(epochs=work.epochs, minibatches=1, **common)
            agent = PPO(policy, envs, settings, folder=f"{folder}/run")
        mark(meter)
        # One update more: the last of a run saves a checkpoint, which is no part of the others.
        updates = work.warmup + work.updates + 1
        agent.learn(updates * work.episodes * work.response_tokens, quiet=True)
        meter.report("torch", "transformers", "textgym")


if __name__ == "__main__":
    main(from_command_line(__doc__))
