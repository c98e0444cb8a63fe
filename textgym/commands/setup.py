"""From options to objects: prompts, rewards and environments, shared by all commands."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro

from textgym.commands.errors import UsageError
from textgym.prompts import Prompts
from textgym.registry import ENVIRONMENTS
from textgym.rewards import Reward, Schedule, parse_reward

Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class TaskArgs:
    """Which task, on whose prompts, for which reward."""

    env: str = "TextGen-v0"
    """Environment id (`textgym list` shows them)."""
    env_args: str = "{}"
    """Arguments of the environment as JSON, for example '{"max_facts": 3}'."""
    model: str = "embedded"
    """Folder or hub name of the model and its tokenizer, or "embedded"."""
    prompts: str | None = None
    """Your own prompts: a .csv, .tsv, .jsonl or .parquet file, or a dataset's hub name."""
    prompt_column: str = "prompt"
    """Column of the prompts."""
    reference_column: str | None = None
    """Column of the references; rows with one prompt become one prompt with several references."""
    template: str | None = None
    """How a prompt is written from the columns, for example "{mr}\\n"; backslash escapes count."""
    heldout_prompts: str | None = None
    """A file like --prompts to evaluate on; default is a share of --prompts."""
    holdout: float = 0.1
    """Share of the distinct prompts that is held out when there is no --heldout-prompts."""
    split_seed: int = 0
    """Key of that split."""
    reward: str | None = None
    """For example "bleu", "0.5*bleu + 0.5*rougeL" or "my_module:my_function"."""
    max_new_tokens: int | None = None
    """Budget of a response; default is the environment's."""
    max_prompt_tokens: int | None = None
    """Longest prompt; default is the longest there is."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Cut longer prompts on this side; without it they are an error."""
    stop: Names = ()
    """A stop string; may be given several times."""


def reward_of(expression: str) -> Reward | Schedule:
    """Read `--reward`; `module:object` is also looked for in the working directory.

    Raises:
        ValueError: The expression cannot be read, or names what does not exist.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)  # where `python -m` looks, and a console script does not
    try:
        return parse_reward(expression)
    finally:
        sys.path.remove(here)


def load_prompts(args: TaskArgs) -> tuple[Prompts, Prompts] | None:
    """Training and held-out prompts from the user's files; None where the environment has its own.

    Raises:
        ValueError, OSError: A file is not there or is broken, or a column is missing.
    """
    if args.prompts is None:
        if args.heldout_prompts is not None:
            raise UsageError("--heldout-prompts needs --prompts")
        return None
    train = _table(args.prompts, args)
    if args.heldout_prompts is None:
        return train.split(args.holdout, seed=args.split_seed)
    from textgym.prompts import link

    return train, link(train, _table(args.heldout_prompts, args))[1]


def _table(source: str, args: TaskArgs) -> Prompts:
    template = args.template
    return Prompts.load(
        source,
        prompt=args.prompt_column,
        references=args.reference_column,
        template=None if template is None else template.encode().decode("unicode_escape"),
    )


class TaskMaker:
    """Makes environments of one task, on its training or on its held-out prompts.

    Args:
        args: The options.

    Raises:
        UsageError: The environment is unknown, or options do not go together.
        ValueError, OSError: The prompts cannot be read.
    """

    def __init__(self, args: TaskArgs) -> None:
        self.id = args.env
        known = [entry.id for entry in ENVIRONMENTS]
        if args.env not in gym.registry:
            raise UsageError(f"no environment {args.env!r}; there are {', '.join(known)}")
        try:
            self.knobs: dict[str, Any] = json.loads(args.env_args)
        except json.JSONDecodeError as error:
            raise UsageError(f"--env-args is not JSON ({error}): {args.env_args!r}") from error
        if not isinstance(self.knobs, dict):
            raise UsageError(f"--env-args must be a JSON object, got {args.env_args!r}")
        self.tables = load_prompts(args)
        given = {
            "reward": None if args.reward is None else reward_of(args.reward),
            "max_new_tokens": args.max_new_tokens,
            "max_prompt_tokens": args.max_prompt_tokens,
            "truncate_prompt": args.truncate_prompt,
            "stop": args.stop or None,
            "tokenizer": None if args.model == "embedded" else args.model,
        }
        self.knobs |= {name: value for name, value in given.items() if value is not None}
        if self.tables is not None and args.env != "TextGen-v0":
            raise UsageError(f"--prompts are for TextGen-v0; {args.env} makes its own")

    def arguments(self, *, heldout: bool) -> dict[str, Any]:
        """Arguments of `gym.make` and `gym.make_vec`."""
        if self.tables is not None:
            return {**self.knobs, "prompts": self.tables[int(heldout)]}
        if "split" in self.knobs or self.id == "TextGen-v0":
            return dict(self.knobs)
        return {**self.knobs, "split": "validation" if heldout else "train"}

    def vector(self, num_envs: int, *, heldout: bool = False) -> Any:
        """A vector environment as `collect` wants it."""
        return gym.make_vec(
            self.id,
            num_envs,
            "vector_entry_point",
            autoreset_mode="Disabled",
            **self.arguments(heldout=heldout),
        ).unwrapped

    def single(self, *, heldout: bool = False, render_mode: str | None = None) -> Any:
        """A single environment."""
        arguments = self.arguments(heldout=heldout)
        return gym.make(self.id, render_mode=render_mode, **arguments).unwrapped
