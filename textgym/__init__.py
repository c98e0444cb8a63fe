"""textgym: Gymnasium environments in which a language model writes, and agents that train it.

Importing this package registers every environment id with Gymnasium and imports neither torch nor
transformers; the names in `__all__` are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.registry import register_all
from textgym.version import __version__

if TYPE_CHECKING:
    from textgym.prompts import Prompts as Prompts
    from textgym.rewards import as_reward as as_reward
    from textgym.rewards import dense as dense
    from textgym.rewards import terminal as terminal
    from textgym.tokens import load_tokenizer as load_tokenizer

_WHERE = {
    "Prompts": "textgym.prompts",
    "as_reward": "textgym.rewards",
    "dense": "textgym.rewards",
    "load_tokenizer": "textgym.tokens",
    "terminal": "textgym.rewards",
}

__all__ = ["Prompts", "__version__", "as_reward", "dense", "load_tokenizer", "terminal"]


def _find_rooms_of_a_checkout() -> None:
    """Let `textgym.envs` and `textgym.agents` be found beside `textgym/`, as in a checkout.

    An install maps them; but at the root of a checkout `python -m ...` puts the working directory
    first on the path, and this folder then hides the installed package.
    """
    here = Path(__file__).resolve().parent
    root = here.parent
    if not (here / "envs").is_dir() and (root / "envs" / "__init__.py").is_file():
        __path__.append(str(root))


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})


_find_rooms_of_a_checkout()
register_all()
