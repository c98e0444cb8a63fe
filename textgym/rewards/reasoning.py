"""Tasks of reasoning-gym (Stojanovski et al. 2025) as prompts with their reward."""

from __future__ import annotations

import ast
import difflib
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from textgym.prompts import Prompts
from textgym.rewards.base import Example
from textgym.rewards.reasoning_guard import vet
from textgym.rewards.verifiers.base import Ask, PooledVerifier, check_length

LONGEST_ANSWER = 20_000
# These walk over sets of strings, so their entries depend on Python's hash seed (0.1.25).
HASHED = {
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}


class ReasoningGym(PooledVerifier):
    """What the dataset's own `score_answer` gives an answer, in [0, 1]; partial credit is its own.

    The scorers are library code over hostile strings, so they run in the worker pool: an answer
    that makes one hang, fill the memory or raise gets 0. Some run the answer as Python; here none
    does (`textgym.rewards.reasoning_guard`). Some are lenient, which is left as it is:
    `game_of_life_halting` pays any answer, `coin_flip` pays 1.0 for `0`, the first digit of most
    answers, `puzzle24` any four numbers that make 24, and the integrations the question written
    back as an `Integral`. A NaN where none is due gets 0.

    Columns: `entry`, as `reasoning_gym_task` writes it. Cost: one call of the scorer; a worker
    starts in seconds. Statuses of what could not be judged: `too long` (over 20,000 characters),
    `timeout`, `memory`, `recursion`, `crash`, `killed`, `scorer: <exception>`.

    Args:
        dataset: The name of the dataset.
        config: Its configuration, size and seed included.
        answer_in: Where the answer is, see `reasoning_gym_task`.
        cpu_seconds: CPU time of one answer.
        shown: Rows of the prompts, for `examples()`.
    """

    setup = "textgym.rewards.reasoning_worker:score"

    def __init__(
        self,
        dataset: str,
        config: Mapping[str, Any],
        *,
        answer_in: Literal["either", "tag", "text"] = "either",
        cpu_seconds: float = 3.0,
        shown: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if answer_in not in ("either", "tag", "text"):
            raise ValueError(f"answer_in must be 'either', 'tag' or 'text', got {answer_in!r}")
        self.dataset, self.config, self.answer_in = dataset, repr(dict(config)), answer_in
        self.shown = tuple(row for row in shown if row["answer"] is not None)
        super().__init__(
            dataset,
            "entry",
            cpu_seconds=cpu_seconds,
            wall_seconds=20.0 + cpu_seconds,
            memory_mb=2048,
            workers=2,
        )

    def ask(self, text: str, row: Mapping[str, Any]) -> float | Ask:
        """Take the answer out of the text; no answer is worth 0."""
        answer = answer_of(text, self.answer_in)
        if not answer:
            return 0.0
        check_length(answer, LONGEST_ANSWER)
        return Ask((self.dataset, self.config, row["entry"], answer))

    def examples(self) -> tuple[Example, ...]:
        """Give the dataset's own answers to some of its questions, and no answer."""
        wrap = "{}" if self.answer_in == "text" else "<answer>{}</answer>"
        right = [Example(row, wrap.format(row["answer"]), 1.0) for row in self.shown]
        return (*right, *(Example(example.row, "", 0.0) for example in right[:1]))


def reasoning_gym_task(
    name: str,
    *,
    size: int = 500,
    seed: int = 0,
    template: str = "{question}",
    answer_in: Literal["either", "tag", "text"] = "either",
    cpu_seconds: float = 3.0,
    **config: Any,
) -> tuple[Prompts, ReasoningGym]:
    r"""Make the prompts and the reward of a reasoning-gym dataset.

    The columns are `prompt`, `question`, `answer` (None where the dataset gives none) and `entry`,
    which the reward reads. Rows can be split, shuffled and sent to other processes.

    Args:
        name: The name of the dataset, such as `"chain_sum"`.
        size: How many rows.
        seed: The dataset's seed.
        template: How a prompt is written from a question; say here how to answer, as in
            `"{question}\nAnswer inside <answer></answer>."`.
        answer_in: Where the answer is. `"tag"`: inside the last `<answer></answer>`; a text without
            one has no answer. `"text"`: the whole text without the space around it. `"either"`: the
            tag where there is one, else the whole text.
        cpu_seconds: CPU time that one answer may take to score.
        config: The dataset's own knobs.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such dataset, the template has no question, or the dataset
            refuses its knobs.
        TypeError: If it has no such knob, or a knob is not plain data.
        RuntimeError: If the dataset's code might run answers (`reasoning_guard` says why).
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            "reasoning_gym_task needs reasoning-gym, which is not installed: "
            'pip install "textgym[reasoning]"'
        ) from error
    if name not in DATASETS or name == "composite":
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near and name != "composite" else ""
        raise ValueError(f"reasoning-gym has no dataset {name!r} that stands for itself.{hint}")
    if "{question}" not in template:
        raise ValueError(f"the template must hold {{question}}, got {template!r}")
    if name in HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        warnings.warn(
            f"the entries of {name!r} depend on Python's hash seed: they are the same in every run "
            "only if the environment variable PYTHONHASHSEED is set, for example to 0",
            UserWarning,
            stacklevel=2,
        )
    knobs = {**config, "size": size, "seed": seed}
    if _literal(knobs) is None:
        raise TypeError(f"the knobs of {name!r} must be numbers, strings and lists, got {knobs}")
    with _global_draws_kept():
        dataset = reasoning_gym.create_dataset(name, **knobs)
        vet(dataset)
        rows = [_row(dataset[i], i, template) for i in range(size)]
    prompts = Prompts(rows, name=name)
    reward = ReasoningGym(name, knobs, answer_in=answer_in, cpu_seconds=cpu_seconds, shown=rows[:3])
    return prompts, reward


def answer_of(text: str, answer_in: str) -> str | None:
    """Take the answer out of a text; None if there is none."""
    if answer_in != "text":
        end = text.rfind("</answer>")
        begin = text.rfind("<answer>", 0, max(end, 0))
        if begin >= 0:
            return text[begin + len("<answer>") : end].strip()
    return None if answer_in == "tag" else text.strip()


def _row(entry: Mapping[str, Any], index: int, template: str) -> dict[str, Any]:
    question, answer = str(entry["question"]), entry["answer"]
    # Entries hold tuples and integer keys, which JSON would change. The few that hold objects are
    # made again in the worker.
    return {
        "prompt": template.replace("{question}", question),
        "question": question,
        "answer": None if answer is None else str(answer),
        "entry": _literal(dict(entry)) or repr({"index": index, "question": question}),
    }


def _literal(value: Any) -> str | None:
    """Write plain data as a Python literal; None if it is not plain."""
    written = repr(value)
    try:
        return written if ast.literal_eval(written) == value else None
    except (ValueError, SyntaxError):
        return None


@contextmanager
def _global_draws_kept() -> Iterator[None]:
    """Leave the global generators as they were: some datasets seed NumPy's."""
    python, array = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
