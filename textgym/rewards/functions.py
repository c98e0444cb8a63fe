"""Any callable is a reward: its parameter names say what it is given.

| names | shape |
|---|---|
| `prompt`, `text` or `completion`, `token_ids`, `stop_reason` | one text a call |
| `prompts`, `texts` or `completions`, `completion_ids`, `stop_reasons` | the whole batch |

`prompt_ids` goes with both shapes; every other name is a column of the prompt table. `**kwargs`
receives all columns. A reward function written for TRL works as it is: where the prompt is a list
of chat messages, `completions` holds message lists too (`texts` is always plain text).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from textgym.rewards.base import Reward, check_bounds
from textgym.rewards.batch import TextBatch, private
from textgym.rewards.errors import missing_column
from textgym.rewards.scores import FloatArray, Scores
from textgym.rewards.service import Service

Getter = Callable[[TextBatch], list[Any]]


def _completions(batch: TextBatch) -> list[Any]:
    return [
        [{"role": "assistant", "content": text}]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
        else text
        for prompt, text in zip(batch.prompts, batch.texts, strict=True)
    ]


PER_ITEM: dict[str, Getter] = {
    "prompt": lambda batch: batch.prompts,
    "text": lambda batch: batch.texts,
    "completion": _completions,
    "token_ids": lambda batch: batch.token_ids,
    "stop_reason": lambda batch: batch.stop_reasons,
}
PER_BATCH: dict[str, Getter] = {
    "prompts": lambda batch: batch.prompts,
    "texts": lambda batch: batch.texts,
    "completions": _completions,
    "completion_ids": lambda batch: batch.token_ids,
    "stop_reasons": lambda batch: batch.stop_reasons,
}
EITHER: dict[str, Getter] = {"prompt_ids": lambda batch: batch.prompt_ids}


def as_reward(
    x: Any,
    *,
    name: str | None = None,
    low: float | None = None,
    high: float | None = None,
    timeout: float | None = None,
    max_concurrency: int | None = None,
    retries: int | None = None,
    service: Service | None = None,
    strict: bool = False,
) -> Reward:
    """Turn a callable, or the name of a reward, into a `Reward`; a `Reward` is given back.

    Args:
        x: A callable (`textgym.rewards.functions` has the table of what its parameters may be;
            `async def` runs concurrently), a `Reward`, or what `parse_reward` reads: `"bleu"`,
            `"0.5*bleu + 0.5*rougeL"`, `"module:object"`.
        name: The name of the component; the callable's own by default.
        low: The worst value that the callable gives; 0 by default.
        high: The best value that it gives; 1 by default.
        timeout: Seconds that one attempt of an async callable may take; no limit by default.
        max_concurrency: How many calls of an async callable run at a time; 32 by default.
        retries: How often a failed call of an async callable is repeated, with growing pauses; 0 by
            default.
        service: Instead of these three, all that can be said of how an async callable is called
            (which failures are repeated, the pauses, a circuit breaker); rewards may share one.
        strict: Raise failures at once.

    Raises:
        TypeError: If `x` is none of these, or its parameters do not say what it wants.
        ValueError: If the bounds are not finite, or there is a timeout on what cannot be stopped.
    """
    if isinstance(x, str):
        from textgym.rewards.registry import parse_reward

        x = parse_reward(x)
    if isinstance(x, type) and issubclass(x, Reward):
        raise TypeError(f"expected a reward, got the class {x.__name__}: write {x.__name__}()")
    if isinstance(x, Reward):
        calling = (timeout, max_concurrency, retries, service)
        if strict or any(option is not None for option in (low, high, *calling)):
            raise TypeError(
                "low, high, strict and how a callable is called (timeout, retries, ...) are for "
                f"callables; {x!r} is a reward and has its own. For strict, use "
                "as_schedule(reward, strict=True)."
            )
        return x if name is None else x.named(name)
    if not callable(x):
        from textgym.rewards.schedules import Schedule

        hint = " A schedule says when a reward is paid; it is not a reward."
        raise TypeError(
            "expected a reward, a callable or the name of a reward, "
            f"got {type(x).__name__}: {x!r:.200}." + (hint if isinstance(x, Schedule) else "")
        )
    return FunctionReward(
        x,
        name=name,
        low=0.0 if low is None else low,
        high=1.0 if high is None else high,
        timeout=timeout,
        max_concurrency=max_concurrency,
        retries=retries,
        service=service,
        strict=strict,
    )


class FunctionReward(Reward):
    """A callable as a reward; made by `as_reward`, whose arguments it has.

    Attributes:
        service: How an async callable is called; `service.counts` says what its calls came to.
    """

    # The arguments are copied one by one, so that the batch itself needs no copy.
    reads_only = True

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        low: float = 0.0,
        high: float = 1.0,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        retries: int | None = None,
        service: Service | None = None,
        strict: bool = False,
    ) -> None:
        self.function = function
        self.name = name or _name_of(function)
        self.low, self.high = check_bounds(low, high)
        self.is_async = is_async(function)
        options: dict[str, Any] = {
            "timeout": timeout,
            "max_concurrency": max_concurrency,
            "retries": retries,
        }
        given = {key: value for key, value in options.items() if value is not None}
        if service is not None and given:
            raise TypeError(
                f"reward {self.name!r}: give {', '.join(given)} to the service, as in "
                "Service(timeout=30, retries=3)"
            )
        if not self.is_async and (timeout is not None or retries or service is not None):
            raise ValueError(
                f"reward {self.name!r}: a timeout, retries or a service need an async callable; a "
                "plain function cannot be stopped in its own process"
            )
        self.service = service or Service(**given)
        self.strict = strict
        self._inspect()

    def _inspect(self) -> None:
        """Read the parameters: the shape, the fields, the columns."""
        bound = self.function.keywords if isinstance(self.function, functools.partial) else {}
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            raise TypeError(
                f"reward {self.name!r}: its parameters cannot be read; wrap it, as in "
                "`lambda text: f(text)`"
            ) from None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = [p.name for p in named if p.name not in bound]
        self.takes_all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = [p.name for p in named if p.default is p.empty and p.name not in bound]
        unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        single = [n for n in names if n in PER_ITEM]
        plural = [n for n in names if n in PER_BATCH]
        if single and plural:
            raise TypeError(
                f"reward {self.name!r} mixes {single}, which are of one text, with {plural}, which "
                "are of the whole batch; use one kind"
            )
        if unnamed or not (names or self.takes_all_columns):
            raise TypeError(
                f"reward {self.name!r} must name what it is given, as in `def f(text)`, "
                f"`def f(prompt, text, answer)` or `def f(texts)`; its parameters are "
                f"{[p.name for p in parameters]}"
            )
        self.batched = bool(plural) or (self.takes_all_columns and not single)
        self.fields = (PER_BATCH if self.batched else PER_ITEM) | EITHER
        self.columns = [n for n in names if n not in self.fields]
        self.required = [n for n in required if n not in self.fields]
        self.names = names

    def check(self, columns: Collection[str]) -> None:
        """Check that every parameter is a field or a column.

        Raises:
            RewardColumnError: If one is neither.
        """
        for column in self.required:
            if column not in columns:
                raise missing_column(f"reward {self.name!r}", column, columns, also=self.fields)

    def evaluate(self, batch: TextBatch, *, optional: bool = False, strict: bool = False) -> Scores:
        """Score as every reward does; one made with `strict=True` always raises."""
        return super().evaluate(batch, optional=optional, strict=strict or self.strict)

    def score(self, batch: TextBatch) -> Sequence[Any] | FloatArray:
        """Call the function: once, or once a text, where an exception is that text's item."""
        if len(batch) == 0:
            return []
        arguments = self._arguments(batch)
        if self.batched:
            if self.is_async:
                return cast(Sequence[Any], self._run([arguments])[0])
            return cast(Sequence[Any], _not_awaitable(self.function(**arguments)))
        calls = [{n: values[i] for n, values in arguments.items()} for i in range(len(batch))]
        if self.is_async:
            return self._run(calls, raise_first=False)
        items: list[Any] = []
        for call in calls:
            try:
                items.append(_not_awaitable(self.function(**call)))
            except Exception as error:
                items.append(error)
        return items

    def _run(self, calls: list[dict[str, Any]], *, raise_first: bool = True) -> list[Any]:
        from textgym.rewards.background import gather, raise_interrupts, run

        asked = [functools.partial(self.function, **call) for call in calls]
        results = raise_interrupts(run(lambda: gather(asked, self.service)))
        if raise_first and isinstance(results[0], Exception):
            raise results[0]
        return results

    def _arguments(self, batch: TextBatch) -> dict[str, list[Any]]:
        """Collect the argument lists, `n` values each, copied so that a call may change its own."""
        wanted = [name for name in self.names if name in self.fields]
        columns = list(self.columns)
        if self.takes_all_columns:
            wanted += [name for name in self.fields if name not in wanted]
            every = {column: None for row in batch.rows for column in row}
            columns += [c for c in every if c not in columns and c not in HIDDEN | set(self.fields)]
        arguments = {name: private(self.fields[name](batch)) for name in wanted}
        for column in columns:
            if column in self.required or all(column in row for row in batch.rows):
                arguments[column] = private(batch.column(column))
            elif column not in self.columns:
                arguments[column] = private([row.get(column) for row in batch.rows])
        return arguments

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["fields"]  # getters, found again from the shape
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.fields = (PER_BATCH if self.batched else PER_ITEM) | EITHER


# The prompt is passed as the field of that name, never a second time as a column.
HIDDEN = {"prompt", "completion"}


def is_async(function: Any) -> bool:
    """Tell whether a callable is declared `async def`, itself or as the `__call__` of its class."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def _not_awaitable(value: Any) -> Any:
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("the reward returned a coroutine: declare the reward itself `async def`")
    return value


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return str(name).strip("<>")
