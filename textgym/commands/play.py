"""`textgym play`: a person writes the response and sees what it is paid.

This is the one place where a person's text is turned into response ids, because a person has no ids
to give: the environment gets them as actions, and from then on ids are the truth again, so the
response shown is decoded from them and may differ from what was typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textgym.commands.errors import UsageError, reported
from textgym.commands.setup import Split, TaskArgs, TaskMaker
from textgym.tokens import Tokenizer

HELP = """Type text and press Enter to append it to the response; a new word begins with a space.
An empty line ends the response.
  #17 18     append token ids
  :undo      take back the last line
  :model     let the model write the rest (:model 5 for five tokens)
  :skip      another prompt
  :quit      leave"""


@dataclass(frozen=True)
class PlayArgs(TaskArgs):
    """Write responses yourself and see their reward."""

    by: Literal["line", "token"] = "line"
    """Whether a line of input may hold many tokens or must be exactly one."""
    prompt_row: int | None = None
    """Which prompt to begin with; default is drawn."""
    split: Split = "train"
    """Whose prompts are played."""
    seed: int = 0
    """Seed of the environment and of the model's draws."""
    episodes: int | None = None
    """Stop after so many responses; default is when you quit."""


class Game:
    """One person, one environment.

    Args:
        args: The options.
        console: Where to write, and where input comes from.
    """

    def __init__(self, args: PlayArgs, console: Console) -> None:
        self.args, self.console = args, console
        with reported():
            if args.allowed_tokens is not None:
                raise ValueError("play forbids no tokens: leave out --allowed-tokens")
            maker = TaskMaker(args)
            self.env = maker.single(args.split)
        self.model = maker.model
        self.tokenizer: Tokenizer = self.env.task.tokenizer
        self.rewards: list[float] = []
        self.components: list[dict[str, float]] = []
        self.pieces: list[str] = []
        self.undo: list[tuple[Any, int]] = []
        self.policy: Any = None
        self.stream: Any = 0
        self.observation: Any = None

    def start(self, prompt_row: int | None = None) -> None:
        """Show the next prompt."""
        first = self.observation is None
        options = None if prompt_row is None else {"prompt_row": prompt_row}
        with reported():
            self.observation, info = self.env.reset(
                seed=self.args.seed if first else None, options=options
            )
        self.stream = info["stream"]
        self.rewards, self.components, self.pieces, self.undo = [], [], [], []
        prompt = self.env.task.prompt_text(info["prompt_row"])
        text = prompt if isinstance(prompt, str) else "\n".join(map(_message, prompt))
        self.console.rule(f"prompt {info['prompt_row']}", align="left")
        self.console.print(escape(text))

    def ids_of(self, line: str) -> list[int]:
        """Token ids of a typed line.

        Raises:
            UsageError: It is not what was asked for; the game goes on.
        """
        if line.startswith("#"):
            try:
                ids = [int(word) for word in line[1:].replace("#", " ").split()]
            except ValueError:
                raise UsageError(f"expected token ids after #, got {line!r}") from None
        elif not line:
            if not self.env.task.stop_ids:
                raise UsageError(
                    "this task has no stop id; write a stop string or use the budget up"
                )
            ids = [self.env.task.stop_ids[0]]
        else:
            ids = self.encoded(line)
        if self.args.by == "token" and len(ids) != 1:
            pieces = ", ".join(f"#{i} {self.tokenizer.piece(i)!r}" for i in ids)
            raise UsageError(f"that is {len(ids)} tokens ({pieces}); give one at a time")
        bad = [i for i in ids if not 0 <= i < self.env.task.vocab_size]
        if bad:
            raise UsageError(f"id {bad[0]} is outside the vocabulary of {self.env.task.vocab_size}")
        return ids

    def encoded(self, line: str) -> list[int]:
        """Ids of typed text, without special tokens."""
        try:
            return self.tokenizer.encode_plain(line)
        except ValueError as error:
            some = ", ".join(repr(self.tokenizer.piece(i)) for i in range(5))
            raise UsageError(f"no tokens for {line!r} ({error}); tokens are {some}, ...") from error

    def append(self, ids: Sequence[int]) -> bool:
        """Step through token ids; returns whether the response has ended."""
        self.undo.append((self.env.get_state(), len(self.rewards)))
        for token in ids:
            self.observation, reward, terminated, truncated, info = self.env.step(token)
            self.rewards.append(float(reward))
            self.components.append(info.get("reward", {}))
            self.pieces.append(self.tokenizer.piece(token))
            if terminated or truncated:
                self.finish(info)
                return True
        self.console.print(f"[dim]so far:[/] {escape(self.env.mdp.response_text(0))}")
        return False

    def take_back(self) -> None:
        """Undo the last line."""
        if not self.undo:
            raise UsageError("there is nothing to undo")
        state, count = self.undo.pop()
        self.observation = self.env.set_state(state)
        del self.rewards[count:], self.components[count:], self.pieces[count:]
        self.console.print(f"[dim]so far:[/] {escape(self.env.mdp.response_text(0))}")

    def write(self, count: int | None) -> bool:
        """Let the model write `count` tokens, or the rest; returns whether the response ended."""
        if self.policy is None:
            from textgym.commands.models import load_policy

            with reported(), self.console.status("loading the model"):
                self.policy = load_policy(self.model, self.env.task, seed=self.args.seed)
        left = 1 << 30 if count is None else count
        while left > 0:
            batched = {k: v[None] for k, v in self.observation.items()}
            chosen = self.policy.act(batched, [self.stream])
            if self.append([int(chosen.action[0])]):
                return True
            left -= 1
        return False

    def finish(self, info: dict[str, Any]) -> None:
        """Show response, reward of each token and components."""
        self.console.print(f"\n[bold]response[/] ({info.get('stop_reason', 'time limit')})")
        self.console.print(escape(str(info.get("text", self.env.mdp.response_text(0)))))
        table = Table("token", "reward", box=None, pad_edge=False)
        for piece, reward in zip(self.pieces, self.rewards, strict=True):
            table.add_row(escape(repr(piece)), f"{reward:+.4f}" if reward else "[dim]0[/]")
        self.console.print(table)
        for name in dict.fromkeys(name for parts in self.components for name in parts):
            value = sum(parts.get(name, 0.0) for parts in self.components)
            self.console.print(f"{name}: {value:.4f}")
        if "reward_status" in info:
            self.console.print(f"unscored: {escape(info['reward_status'])}")
        self.console.print(f"[bold]total reward {sum(self.rewards):.4f}[/]")

    def turn(self, line: str) -> bool:
        """Do what a line asks; returns whether the response has ended."""
        command, *rest = line.split() if line.startswith(":") else [""]
        if command == ":undo":
            self.take_back()
        elif command == ":model":
            if rest and not rest[0].isdigit():
                raise UsageError(f"expected a number of tokens after :model, got {rest[0]!r}")
            return self.write(int(rest[0]) if rest else None)
        elif command:
            raise UsageError(f"unknown command {command!r}\n{HELP}")
        else:
            return self.append(self.ids_of(line))
        return False


def run(arguments: Sequence[str]) -> int:
    """Play until the person quits or the responses asked for are written."""
    args = tyro.cli(PlayArgs, args=arguments, prog="textgym play")
    console = Console(highlight=False)
    game = Game(args, console)
    console.print(f"[dim]{escape(HELP)}[/]")
    game.start(args.prompt_row)
    played = 0
    while args.episodes is None or played < args.episodes:
        try:
            line = console.input("> ")
        except EOFError:
            console.print()
            return 0
        if line.strip() in (":quit", ":q"):
            return 0
        try:
            ended = line.strip() != ":skip" and game.turn(line)
        except UsageError as error:
            console.print(f"[red]{escape(str(error))}[/]")
            continue
        played += ended
        if (ended and played != args.episodes) or line.strip() == ":skip":
            game.start()
    return 0


def _message(message: Any) -> str:
    return f"{message['role']}: {message['content']}"
