"""What stable-baselines3's logger does not know of text: components, ends, lengths, samples."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textgym.learning import UNSCORED_LIMIT, UnscoredError


class TextMetricsCallback(BaseCallback):
    """Log, for each rollout: reward components, response length, ends, unscored episodes, speed.

    Under the names of textgym's own agents: `reward/<component>` (means over episodes),
    `rollout/response_length` (tokens), `rollout/<stop reason>` (shares), `rollout/unscored` (share)
    and `time/tokens_per_s`.

    Raises:
        UnscoredError: If more than 20 % of the episodes of a rollout have no score. A
            `SequenceRolloutBuffer` refuses such a rollout itself; with a stock buffer nobody else
            would.
    """

    def _on_training_start(self) -> None:
        rows = self.training_env.num_envs
        self._parts: list[dict[str, float]] = [defaultdict(float) for _ in range(rows)]
        self._tokens = np.zeros(rows, np.int64)

    def _on_rollout_start(self) -> None:
        self._ended: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._unscored = 0
        self._traceback = ""
        self._steps = 0
        self._began = time.perf_counter()

    def _on_step(self) -> bool:
        self._steps += self.training_env.num_envs
        self._tokens += 1
        for i, (info, done) in enumerate(
            zip(self.locals["infos"], self.locals["dones"], strict=True)
        ):
            for name, value in info.get("reward", {}).items():
                self._parts[i][name] += value
            if done:
                if "reward_status" in info:
                    self._unscored += 1
                    self._traceback = self._traceback or info["reward_traceback"]
                else:
                    reason = info.get("stop_reason")
                    self._ended.append({"stop_reason": reason, **self._parts[i]})
                    self._lengths.append(int(self._tokens[i]))
                self._parts[i], self._tokens[i] = defaultdict(float), 0
        return True

    def _on_rollout_end(self) -> None:
        seconds = time.perf_counter() - self._began
        episodes = len(self._ended) + self._unscored
        self.logger.record("time/tokens_per_s", self._steps / seconds)
        if not episodes:
            return
        self.logger.record("rollout/unscored", self._unscored / episodes)
        if self._unscored > UNSCORED_LIMIT * episodes:
            raise UnscoredError(
                f"{self._unscored} of {episodes} episodes have no score, more than "
                f"{UNSCORED_LIMIT:.0%}; the first failure:\n{self._traceback}"
            )
        self.logger.record("rollout/response_length", float(np.mean(self._lengths)))
        for reason in {str(e["stop_reason"]) for e in self._ended}:
            share = np.mean([e["stop_reason"] == reason for e in self._ended])
            self.logger.record(f"rollout/{reason}", float(share))
        for name in {n for e in self._ended for n in e if n != "stop_reason"}:
            values = [e[name] for e in self._ended if name in e]
            self.logger.record(f"reward/{name}", float(np.mean(values)))


class SampleTextCallback(BaseCallback):
    """Write a few completions of each rollout to a JSON-lines file, token by token.

    A line holds `timesteps`, `text`, `stop_reason`, `score`, and for each token its text, reward,
    value and log-probability: `tokens`, `token_rewards`, `token_values`, `token_logprobs`.

    Args:
        path: The file; lines are appended.
        every: Rollouts between two writings.
        samples: Completions of one writing.
        verbose: As in SB3.
    """

    def __init__(
        self, path: str | Path, *, every: int = 1, samples: int = 4, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.path = Path(path)
        self.every, self.samples = every, samples
        self._rollout = 0

    def _on_training_start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer = self.training_env.get_attr("task")[0].tokenizer
        self._open: list[list[tuple[Any, ...]]] = [[] for _ in range(self.training_env.num_envs)]

    def _on_rollout_start(self) -> None:
        self._rollout += 1
        self._written = 0

    def _on_step(self) -> bool:
        here = self.locals
        if (self._rollout - 1) % self.every:
            return True
        values, logprobs = (here[n].detach().cpu().numpy() for n in ("values", "log_probs"))
        for i, done in enumerate(here["dones"]):
            numbers = (here["actions"][i], here["rewards"][i], values[i], logprobs[i])
            self._open[i].append(tuple(np.asarray(x).item() for x in numbers))
            if done:
                info, tokens = here["infos"][i], self._open[i]
                self._open[i] = []
                # Whole completions only: what began before this rollout is not known.
                if self._written < self.samples and len(tokens) == info["episode"]["l"]:
                    self._write(info, tokens)
        return True

    def _write(self, info: dict[str, Any], tokens: list[tuple[Any, ...]]) -> None:
        self._written += 1
        ids, rewards, values, logprobs = zip(*tokens, strict=True)
        record = {
            "timesteps": self.num_timesteps,
            "text": info.get("text"),
            "stop_reason": info.get("stop_reason"),
            "score": sum(rewards),
            "tokens": [self._tokenizer.piece(int(token)) for token in ids],
            "token_rewards": rewards,
            "token_values": values,
            "token_logprobs": logprobs,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
