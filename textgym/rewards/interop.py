"""Rewards of other libraries as ours, and ours as theirs.

| from | how |
|---|---|
| a TRL reward function | `as_reward(f)`: it works as it is |
| a `verifiers` rubric, or a function written for one | `from_rubric(rubric)` |
| a textgym reward, for TRL's trainers | `reward.trl()` |

Neither library is needed for any of this.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.compose import Sum
from textgym.rewards.errors import RewardColumnError
from textgym.rewards.functions import as_reward, is_async
from textgym.rewards.scores import text_at_fault
from textgym.rewards.service import Service

# What verifiers gives a function besides the columns of its dataset.
GIVEN = {"prompt", "completion", "state", "task"}
GROUP = {"prompts", "completions", "answers", "states", "tasks", "infos"}


class TRLFunction:
    """A reward as TRL calls one: `f(prompts, completions, completion_ids, **columns)`.

    The columns are those of the training set; what else TRL passes (`trainer_state`, `log_extra`,
    ...) is left out. A chat completion is read as what its assistant messages say. A text that is
    at fault gets the worst value; one that could not be scored, or to which the reward does not
    apply, gets None, which TRL leaves out of the sum of its rewards.

    It is an object and no closure, so that it can be sent to other processes.

    Args:
        reward: The reward. Its name is the function's, under which TRL logs it.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__name__ = reward.name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch.

        Raises:
            RewardColumnError: If the reward reads a column that is not there.
            ValueError: If there are not as many completions, or values of a column, as prompts; or
                the reward counts tokens and there are no `completion_ids`.
        """
        n = len(prompts)
        if len(completions) != n:
            raise ValueError(f"expected {n} completions, one per prompt, got {len(completions)}")
        table = {
            name: values
            for name, values in columns.items()
            if isinstance(values, list | tuple) and len(values) == n and name != "prompt"
        }
        if completion_ids is None and self.reward.reads_tokens:
            raise ValueError(f"reward {self.reward.name!r} counts tokens: pass completion_ids")
        try:
            self.reward.check(["prompt", *table])
        except RewardColumnError as error:
            other = {k: len(v) for k, v in columns.items() if isinstance(v, list) and len(v) != n}
            if not other:
                raise
            raise ValueError(
                f"expected {n} values a column, one per prompt, got {other}"
            ) from error
        batch = TextBatch.from_texts(
            [text_of(completion) for completion in completions],
            [
                {"prompt": prompts[i], **{name: values[i] for name, values in table.items()}}
                for i in range(n)
            ],
        )
        if completion_ids is not None:
            batch.token_ids[:] = [[int(token) for token in ids] for ids in completion_ids]
        scores = self.reward.evaluate(batch, optional=True)
        return [
            float(value)
            if math.isfinite(value) and (status is None or text_at_fault(status))
            else None
            for value, status in zip(scores.values, scores.status, strict=True)
        ]


def text_of(completion: Any) -> str:
    """Give the text of a completion: a string, or what the assistant says in chat messages.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple):
        raise TypeError(
            f"expected a completion as a string or chat messages, got {type(completion).__name__}"
        )
    said = []
    for message in completion:
        content = message.get("content") if message.get("role", "assistant") == "assistant" else ""
        if isinstance(content, list):  # parts, of which some may be images
            content = "".join(part.get("text") or "" for part in content)
        said.append(content or "")
    return "\n".join(part for part in said if part)


def from_rubric(rubric: Any, *, chat: bool = True, service: Service | None = None) -> Reward:
    """Give a `verifiers` rubric as the weighted sum of its functions.

    The functions are called as `verifiers` calls them: with those of `prompt`, `completion`,
    `answer`, `info`, `task`, `state`, the rubric's objects (`parser`, ...) and the columns that
    they name. `state` is a dict of these; it has no trajectory. Two differences: a column that a
    function needs must be there, `answer` too; and an exception is a failure and not a 0.

    Args:
        rubric: A rubric (`funcs` and `weights`), a group of them (`rubrics`), or one function, sync
            or async. A function of weight 0 is a metric.
        chat: Give prompt and completion as chat messages, as `verifiers` does by default.
        service: How async functions are called.

    Raises:
        TypeError: If it is none of these, or if a function compares all responses to one prompt
            (it names `completions`, `states`, ...), which is no reward of a text.
    """
    terms = _terms(rubric, chat, service)
    if not terms:
        raise TypeError(f"expected a rubric with functions, got one without: {rubric!r:.200}")
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return Sum(terms)


def _terms(rubric: Any, chat: bool, service: Service | None) -> list[tuple[float, Reward]]:
    members = getattr(rubric, "rubrics", None)
    if members is not None:
        return [term for member in members for term in _terms(member, chat, service)]
    functions = getattr(rubric, "funcs", getattr(rubric, "reward_funcs", None))
    weights = getattr(rubric, "weights", getattr(rubric, "reward_weights", None))
    objects: dict[str, Any] = dict(getattr(rubric, "class_objects", {}))
    if functions is None:
        if not callable(rubric):
            raise TypeError(
                f"expected a rubric or a function, got {type(rubric).__name__}: {rubric!r:.200}"
            )
        functions, weights = [rubric], [1.0]
    elif getattr(rubric, "parser", None) is not None:
        objects.setdefault("parser", rubric.parser)
    return [
        (float(weight), _as_reward(function, objects, chat, service))
        for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True)
    ]


def _as_reward(
    function: Callable[..., Any], objects: dict[str, Any], chat: bool, service: Service | None
) -> Reward:
    waits = is_async(function)
    call = (_AsyncRubricCall if waits else _RubricCall)(function, objects, chat)
    return as_reward(call, service=service if waits else None)


class _RubricCall:
    """A function of a rubric with a signature that `as_reward` understands."""

    def __init__(self, function: Callable[..., Any], objects: dict[str, Any], chat: bool) -> None:
        self.function, self.objects, self.chat = function, objects, chat
        bare = function.func if isinstance(function, functools.partial) else function
        self.__name__ = str(getattr(bare, "__name__", type(bare).__name__))
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name for p in named}
        if self.names & GROUP:
            raise TypeError(
                f"the rubric function {self.__name__!r} compares all responses to one prompt (it "
                f"names {sorted(self.names & GROUP)}); a reward gives a value to one text"
            )
        self.columns = [
            p.name
            for p in named
            if p.default is p.empty and p.name not in GIVEN and p.name not in objects
        ]
        wanted = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("prompt", "text")]
        wanted += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in self.columns]
        rest = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
        self.__signature__ = inspect.Signature([*wanted, rest])

    def arguments(self, prompt: Any, text: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Give what the function is called with."""
        asked: Any = prompt
        if self.chat and isinstance(prompt, str):
            asked = [{"role": "user", "content": prompt}]
        in_chat = self.chat or (isinstance(prompt, list) and isinstance(prompt[0], dict))
        answered: Any = [{"role": "assistant", "content": text}] if in_chat else text
        available = {"answer": "", "info": {}, "task": "default", **columns}
        available |= {"prompt": asked, "completion": answered}
        available |= {"state": dict(available), **self.objects}
        if self.takes_all:
            return available
        return {name: value for name, value in available.items() if name in self.names}

    def __call__(self, *, prompt: Any, text: str, **columns: Any) -> Any:
        return self.function(**self.arguments(prompt, text, columns))


class _AsyncRubricCall(_RubricCall):
    async def __call__(self, *, prompt: Any, text: str, **columns: Any) -> Any:
        return await self.function(**self.arguments(prompt, text, columns))
