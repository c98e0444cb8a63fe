"""`textgym list`: what there is, read without importing torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

import textgym.agents
from textgym.registry import ENVIRONMENTS
from textgym.rewards import REWARDS, make_reward


@dataclass(frozen=True)
class ListArgs:
    """List environments, rewards and agents."""


def run(arguments: Sequence[str]) -> int:
    """Print the three tables."""
    tyro.cli(ListArgs, args=arguments, prog="textgym list")
    console = Console()
    console.print(environments())
    console.print(rewards())
    console.print(agents())
    return 0


def environments() -> Table:
    """Ids, what each is for, the best return and that of a uniform random policy."""
    table = _table("Environments", "environment", "for", "optimum", "random")
    for entry in ENVIRONMENTS:
        table.add_row(entry.id, entry.purpose, entry.optimum, entry.random)
    return table


def rewards() -> Table:
    """Names that `--reward` knows."""
    table = _table("Rewards (--reward)", "reward", "what")
    for name in REWARDS:
        table.add_row(name, (make_reward(name).__doc__ or "").split("\n", 1)[0])
    return table


def agents() -> Table:
    """Names that `--agent` knows, and the first line of their files."""
    table = _table("Agents (--agent)", "agent", "what")
    for name in agent_names():
        table.add_row(name, purpose_of(f"textgym.agents.{module_of(name)}"))
    return table


def agent_names() -> list[str]:
    """What `--agent` may be: the modules of `textgym.agents`, written as options are."""
    return sorted(module.replace("_", "-") for module in set(textgym.agents.WHERE.values()))


def module_of(agent: str) -> str:
    """Module of `textgym.agents` that holds an agent."""
    return agent.replace("-", "_")


def purpose_of(module: str) -> str:
    """First line of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


def _table(title: str, *columns: str) -> Table:
    return Table(
        *columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False
    )
