"""From options to objects: prompts, rewards and environments, shared by all commands."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro
from gymnasium.envs.registration import load_env_creator

from textgym.commands.errors import UsageError
from textgym.commands.models import RANDOM
from textgym.prompts import Prompts, link
from textgym.registry import ENVIRONMENTS
from textgym.rewards import Reward, Schedule, parse_reward
from textgym.tokens import EMBEDDED
from textgym.vector_wrappers import AllowedTokens
from textgym.wrappers import reference_tokens

Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskArgs:
    """Which task, on whose prompts, for which reward."""

    env: str | None = None
    """Environment id (see `textgym list`); default is textgym/DataToText-v0, or TextGen-v0 with
    --prompts."""
    env_args: str = "{}"
    """Arguments of the environment as JSON, for example '{"max_facts": 3}'."""
    model: str | None = None
    """Folder or hub name of model and tokenizer, folder of a run, "embedded" or "random"; default
    is "embedded", and "random" for environments with a tokenizer of their own."""
    prompts: str | None = None
    """Your own prompts: a .csv, .tsv, .jsonl or .parquet file, or a dataset's hub name."""
    prompt_column: str = "prompt"
    """Column of the prompts."""
    reference_column: str | None = None
    """Column of the references; rows with one prompt become one prompt with several references."""
    template: str | None = None
    """How a prompt is written from the columns, for example "{mr}\\n"; backslash escapes count."""
    validation_prompts: str | None = None
    """A file like --prompts to choose the best checkpoint on; default is a share of --prompts."""
    test_prompts: str | None = None
    """A file like --prompts to report on; default is a share of --prompts."""
    holdout: float = 0.1
    """Share of the distinct prompts that is kept for validation, and for test."""
    split_seed: int = 0
    """Key of these splits."""
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
    allowed_tokens: Literal["references"] | None = None
    """Forbid agents all tokens that the references of training prompts are not written with."""


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


def load_tables(args: TaskArgs) -> tuple[Prompts, Prompts, Prompts] | None:
    """Prompts for training, validation and test from the user's files.

    Returns:
        The three tables, one family; None where the environment has its own prompts.

    Raises:
        ValueError, OSError: A file is not there or is broken, or a column is missing.
    """
    if args.prompts is None:
        for option in ("validation_prompts", "test_prompts"):
            if getattr(args, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')} needs --prompts")
        return None
    train, test = _set_aside(_table(args.prompts, args), args.test_prompts, args)
    train, validation = _set_aside(train, args.validation_prompts, args)
    link(train, validation, test)
    return train, validation, test


def _set_aside(table: Prompts, source: str | None, args: TaskArgs) -> tuple[Prompts, Prompts]:
    """A table and what is kept from it: the prompts of another file, or a share of its own."""
    if source is None:
        return table.split(args.holdout, seed=args.split_seed)
    return table, _table(source, args)


def _table(source: str, args: TaskArgs) -> Prompts:
    template = args.template
    return Prompts.load(
        source,
        prompt=args.prompt_column,
        references=args.reference_column,
        template=None if template is None else template.replace("\\n", "\n"),
    )


class TaskMaker:
    """Makes environments of one task, on any of its splits.

    Args:
        args: The options.

    Raises:
        UsageError: The environment is unknown, or options do not go together.
        ValueError, OSError: The prompts cannot be read.
    """

    def __init__(self, args: TaskArgs) -> None:
        self.tables = load_tables(args)
        self.allowed_tokens = args.allowed_tokens
        self._allowed: list[int] | None = None
        own = self.tables is not None
        self.id = args.env or ("TextGen-v0" if own else "textgym/DataToText-v0")
        if self.id not in [entry.id for entry in ENVIRONMENTS]:
            known = ", ".join(entry.id for entry in ENVIRONMENTS)
            raise UsageError(f"no environment {self.id!r}; there are {known}")
        if own != (self.id == "TextGen-v0"):
            raise UsageError(
                "--prompts and TextGen-v0 go together; other environments have prompts"
            )
        given = {
            "reward": None if args.reward is None else reward_of(args.reward),
            "max_new_tokens": args.max_new_tokens,
            "max_prompt_tokens": args.max_prompt_tokens,
            "truncate_prompt": args.truncate_prompt,
            "stop": args.stop or None,
        }
        self.knobs = _json_object(args.env_args)
        self.knobs |= {name: value for name, value in given.items() if value is not None}
        self.model = args.model or default_model(self.id)
        if self.model not in (EMBEDDED, RANDOM) and takes_tokenizer(self.id):
            from textgym.policies.loading import find_model

            found = find_model(self.model)
            if not Path(found).exists():
                print(
                    f"looking for {found} on the Hugging Face hub "
                    "(HF_HUB_OFFLINE=1 looks among what was downloaded only)",
                    file=sys.stderr,
                )
            self.knobs.setdefault("tokenizer", found)

    def arguments(self, split: Split) -> dict[str, Any]:
        """Arguments of `gym.make` and `gym.make_vec`."""
        if self.tables is not None:
            return {**self.knobs, "prompts": self.tables[SPLITS.index(split)]}
        return {"split": split, **self.knobs}

    def vector(self, split: Split, num_envs: int, autoreset_mode: str = "Disabled") -> Any:
        """A vector environment; `collect` wants it as it is by default."""
        arguments = {**self.arguments(split), "autoreset_mode": autoreset_mode}
        envs: Any = gym.make_vec(self.id, num_envs, "vector_entry_point", **arguments).unwrapped
        if self.allowed_tokens is None:
            return envs
        if self._allowed is None:
            self._allowed = reference_tokens(self.single("train").task)
        return AllowedTokens(envs, self._allowed)

    def single(self, split: Split) -> Any:
        """A single environment."""
        return gym.make(self.id, **self.arguments(split)).unwrapped


def takes_tokenizer(env_id: str) -> bool:
    """Whether an environment is played with any model's tokenizer, or has one of its own."""
    environment: Any = load_env_creator(str(gym.spec(env_id).entry_point))
    return "tokenizer" in inspect.signature(environment.make_task).parameters


def default_model(env_id: str | None) -> str:
    """What `--model` is where it is not given."""
    if env_id is None or env_id not in gym.registry:
        return EMBEDDED
    return EMBEDDED if takes_tokenizer(env_id) else RANDOM


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--env-args is not JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise UsageError(f"--env-args must be a JSON object, got {text!r}")
    return value
