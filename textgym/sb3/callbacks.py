"""What stable-baselines3's logger does not know of text: components, ends, lengths, samples."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textgym.learning import UNSCORED_LIMIT, UnscoredError
from textgym.metrics import spread
from textgym.task import STOP_REASONS


class TextMetricsCallback(BaseCallback):
    """Log, for each rollout: rewards and their components, length, ends, unscored episodes, speed.

    Under the names of textgym's own agents: `rollout/reward_mean` and `rollout/reward_std`,
    `reward/<component>` (means over episodes), `rollout/response_length` (tokens),
    `rollout/<stop reason>` (shares), `rollout/unscored` (share) and `time/tokens_per_s`. Of the
    episodes that ended in the rollout; those that go on count where they end, also in a later call
    of `learn(reset_num_timesteps=False)`.

    Raises:
        UnscoredError: If more than 20 % of the episodes of a rollout have no score. A
            `SequenceRolloutBuffer` refuses such a rollout itself; with a stock buffer nobody else
            would.
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._parts: list[dict[str, float]] = []
        self._tokens = self._scores = np.zeros(0)

    def _on_training_start(self) -> None:
        rows = self.training_env.num_envs
        if not self.num_timesteps or len(self._parts) != rows:
            self._parts = [defaultdict(float) for _ in range(rows)]
            self._tokens, self._scores = np.zeros(rows, np.int64), np.zeros(rows)

    def _on_rollout_start(self) -> None:
        self._ended: list[dict[str, float]] = []
        self._found: list[tuple[float, int, str]] = []
        self._unscored = 0
        self._traceback = ""
        self._steps = 0
        self._began = time.perf_counter()

    def _on_step(self) -> bool:
        self._steps += self.training_env.num_envs
        self._tokens += 1
        self._scores += np.asarray(self.locals["rewards"])
        for i, (info, done) in enumerate(
            zip(self.locals["infos"], self.locals["dones"], strict=True)
        ):
            for name, value in info.get("reward", {}).items():
                self._parts[i][name] += float(value)
            if done:
                self._end(i, info)
        return True

    def _end(self, row: int, info: dict[str, Any]) -> None:
        """Note an episode."""
        if "reward_status" in info:
            self._unscored += 1
            self._traceback = self._traceback or info["reward_traceback"]
        else:
            self._ended.append(self._parts[row])
            # Monitors know the episode from its start, also where this callback was not there.
            known = info.get("episode", {"r": self._scores[row], "l": self._tokens[row]})
            reason = str(info.get("stop_reason"))
            self._found.append((float(known["r"]), int(known["l"]), reason))
        self._parts[row], self._tokens[row], self._scores[row] = defaultdict(float), 0, 0.0

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
        scores, lengths, reasons = zip(*self._found, strict=True)
        self.logger.record("rollout/reward_mean", float(np.mean(scores)))
        self.logger.record("rollout/reward_std", float(np.std(scores)))
        self.logger.record("rollout/response_length", float(np.mean(lengths)))
        for reason in STOP_REASONS:
            self.logger.record(f"rollout/{reason}", reasons.count(reason) / len(reasons))
        for name in {name for parts in self._ended for name in parts}:
            values = [parts[name] for parts in self._ended if name in parts]
            self.logger.record(f"reward/{name}", float(np.mean(values)))

    def state_dict(self) -> dict[str, Any]:
        """What is known of the episodes that are not over."""
        return {
            "parts": [dict(parts) for parts in self._parts],
            "tokens": self._tokens.tolist(),
            "scores": self._scores.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._parts = [defaultdict(float, parts) for parts in state["parts"]]
        self._tokens = np.array(state["tokens"], np.int64)
        self._scores = np.array(state["scores"], np.float64)


class SampleTextCallback(BaseCallback):
    """Write a few completions of each rollout to a JSON-lines file, token by token.

    A line holds `timesteps`, `prompt`, `text`, `stop_reason`, `score`, and for each token its text,
    reward, value and log-probability: `tokens`, `token_rewards`, `token_values`, `token_logprobs`.

    Args:
        path: The file; lines are appended. None: they are only in `records`.
        every: Rollouts between two writings.
        samples: Completions of one writing, spread over those that ended in the rollout.
        verbose: As in SB3.

    Attributes:
        records: The lines of the last writing.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        every: int = 1,
        samples: int = 4,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.path = None if path is None else Path(path)
        self.every, self.samples = every, samples
        self.records: list[dict[str, Any]] = []
        self._open: list[list[tuple[Any, ...]]] = []
        self._rollout = 0

    def _on_training_start(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer = self.training_env.get_attr("task")[0].tokenizer
        rows = self.training_env.num_envs
        if not self.num_timesteps or len(self._open) != rows:
            self._open = [[] for _ in range(rows)]

    def _on_rollout_start(self) -> None:
        self._rollout += 1
        self._ended: list[tuple[dict[str, Any], list[tuple[Any, ...]], int]] = []
        if (self._rollout - 1) % self.every == 0:
            self.records = []
            if self.every > 1:  # what was not watched to its end is none of the episodes now open
                self._open = [[] for _ in self._open]

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
                # Scored and whole completions only: what began in a rollout that is not written is
                # not known from its start.
                if info.get("episode", {}).get("l") == len(tokens):
                    self._ended.append((info, tokens, self.num_timesteps))
        return True

    def _on_rollout_end(self) -> None:
        for k in spread(len(self._ended), self.samples):
            self._write(*self._ended[k])
        self._ended = []

    def state_dict(self) -> dict[str, Any]:
        """What is known of the episodes that are not over."""
        return {"open": self._open, "rollout": self._rollout}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._open = [list(tokens) for tokens in state["open"]]
        self._rollout = state["rollout"]

    def _write(self, info: dict[str, Any], tokens: list[tuple[Any, ...]], timesteps: int) -> None:
        ids, rewards, values, logprobs = zip(*tokens, strict=True)
        last = info["terminal_observation"]
        prompt = last["input_ids"][: int(last["prompt_length"][0])]
        record = {
            "timesteps": timesteps,
            "prompt": self._tokenizer.decode(prompt.tolist()),
            "text": info.get("text"),
            "stop_reason": info.get("stop_reason"),
            "score": sum(rewards),
            "tokens": [self._tokenizer.piece(int(token)) for token in ids],
            "token_rewards": rewards,
            "token_values": values,
            "token_logprobs": logprobs,
        }
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
