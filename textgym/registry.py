"""The environments that `import textgym` registers with Gymnasium.

They are registered by string, so that none is imported. To add one, write its family's file in
`envs/` and give it a line in `ENVIRONMENTS`; the contract tests and `textgym list` read that table.
"""

from __future__ import annotations

from dataclasses import dataclass

from gymnasium.envs.registration import register


@dataclass(frozen=True)
class Entry:
    """One registered environment."""

    id: str
    """Gymnasium id, for example `"textgym/Echo-v0"`."""
    module: str
    """Module of `textgym.envs` that holds both classes."""
    name: str
    """Class names are `<name>Env` and `<name>VectorEnv`."""
    purpose: str
    """What it is for, in a few words."""
    optimum: str = "unknown"
    """Best expected return, where it is known exactly."""
    random: str = "unknown"
    """Expected return of a uniform random policy, where it is known."""

    @property
    def entry_point(self) -> str:
        """Where Gymnasium finds the single environment."""
        return f"textgym.envs.{self.module}:{self.name}Env"

    @property
    def vector_entry_point(self) -> str:
        """Where Gymnasium finds the native vector environment."""
        return f"textgym.envs.{self.module}:{self.name}VectorEnv"


ENVIRONMENTS: tuple[Entry, ...] = (
    Entry("TextGen-v0", "generic", "Generic", "your own prompts, tokenizer and reward"),
    Entry("textgym/DataToText-v0", "data_to_text", "DataToText", "facts in, sentence out"),
    Entry("textgym/Arithmetic-v0", "arithmetic", "Arithmetic", "sums, checked by a verifier"),
    Entry("textgym/Continuation-v0", "continuation", "Continuation", "continue a story"),
    # Diagnostics: each is aimed at one class of bug. Numbers are for the default arguments.
    Entry(
        "textgym/Bandit-v0", "bandit", "Bandit", "signs: one token of 64 is right", "1", "0.0156"
    ),
    Entry("textgym/Echo-v0", "echo", "Echo", "credit across prompt and response", "1", "0.0625"),
    Entry(
        "textgym/StopEarly-v0", "stop_early", "StopEarly", "ends: stopping is right", "1", "0.2967"
    ),
    Entry("textgym/Chain-v0", "chain", "Chain", "a rare outcome, paid at the end", "1", "0.00098"),
    Entry(
        "textgym/HighLow-v0", "high_low", "HighLow", "turns: the environment answers", "1", "0.271"
    ),
)


def register_all() -> None:
    """Register every entry of `ENVIRONMENTS` with Gymnasium."""
    for entry in ENVIRONMENTS:
        register(entry.id, entry.entry_point, vector_entry_point=entry.vector_entry_point)
