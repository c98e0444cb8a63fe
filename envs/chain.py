"""Chain: five exact tokens, paid only if all are right. Does a potential help to bootstrap?"""

from __future__ import annotations

from typing import Literal

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split
from textgym.rewards import Reward, TextBatch, dense, terminal
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

OPTIMUM = 1.0


def random_return(symbols: int = 4, size: int = 5) -> float:
    """Expected return of a uniform random policy: one response of `symbols ** size` is right."""
    return float(symbols) ** -size


class RightPrefix(Reward):
    """Share of the chain that is right from its start; with `whole`, 1 for all of it, else 0."""

    cheap = True
    reads_only = True

    def __init__(self, chain: tuple[int, ...], *, whole: bool) -> None:
        self.chain = chain
        self.whole = whole
        self.name = "whole_chain" if whole else "right_prefix"

    def score(self, batch: TextBatch) -> list[float]:
        """Value of each response; tokens, not text, are compared."""
        shares = []
        for ids in batch.token_ids:
            right = 0
            for token, wanted in zip(ids, self.chain, strict=False):
                if token != wanted:
                    break
                right += 1
            shares.append(right / len(self.chain))
        return [float(share == 1.0) for share in shares] if self.whole else shares


def chain_task(
    *,
    split: str = "train",
    symbols: int = 4,
    size: int = 5,
    schedule: Literal["dense", "terminal"] = "terminal",
) -> Task:
    """Build the task.

    Args:
        split: Every split is the same.
        symbols: Size of the vocabulary, 2 to 26.
        size: Length k of the chain.
        schedule: `"dense"`: potential-based with the share of the prefix that is right;
            `"terminal"`: the outcome alone.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if not 2 <= symbols <= 26 or size < 1:
        raise ValueError(f"expected symbols in 2..26 and size >= 1, got {symbols} and {size}")
    if schedule not in ("dense", "terminal"):
        raise ValueError(f"schedule must be 'dense' or 'terminal', got {schedule!r}")
    chain = tuple((3 * i + 1 + i * i) % symbols for i in range(size))
    outcome = RightPrefix(chain, whole=True)
    potential = RightPrefix(chain, whole=False)
    return Task(
        prompts=[{"prompt": "a"}],
        tokenizer=symbol_tokenizer([chr(ord("a") + i) for i in range(symbols)], bos=None, eos=None),
        reward=dense(outcome, potential=potential) if schedule == "dense" else terminal(outcome),
        max_new_tokens=size,
        stop=(),
    )


class ChainEnv(TextGenEnv):
    """Five exact tokens of four symbols; aimed at sparse rewards, potentials and bootstrapping.

    ## Description
    The prompt is always `a`. The outcome is 1 only if all five tokens are right. Optimum **1**,
    uniform random policy **4^-5 = 0.00098**, under either schedule.

    ## Observation Space
    That of `TextGenEnv` with V = 4 and L = 6.

    ## Action Space
    `Discrete(4)`.

    ## Rewards
    `schedule="dense"`: after each token the change of the potential (the share of the chain that is
    right from its start); on the last token the outcome less the potential so far (Ng, Harada &
    Russell 1999). `schedule="terminal"`: the outcome on the last token. The sums are equal, so the
    optimum is the same.

    ## Episode End
    Terminated after five tokens (`stop_reason` is `"length"`).

    ## Information
    That of `TextGenEnv`; the component is `whole_chain`, and with the dense schedule its potential.

    ## Arguments
    `symbols=4`, `size=5`, `schedule="terminal"`; `split` changes nothing.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(chain_task)


class ChainVectorEnv(TextGenVectorEnv):
    """N rows of `ChainEnv`."""

    make_task = staticmethod(chain_task)
