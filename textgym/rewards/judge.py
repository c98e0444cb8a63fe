"""A language model behind an HTTP endpoint as a judge."""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import Prompt, TextBatch
from textgym.rewards.errors import TextFailure, check_column, missing_column
from textgym.rewards.judge_http import Endpoint, JudgeUnavailable, JudgeUsage, http_client
from textgym.rewards.judge_prompt import Question, read_verdict, write_question
from textgym.rewards.service import Service

OPTIONS = {"temperature": 0.0, "max_tokens": 512}


class HTTPJudge(Reward):
    """The score that a model behind an OpenAI-compatible endpoint gives by a rubric, in [0, 1].

    The judge answers in JSON; its score on `scale` is mapped to 0 (worst) to 1 (best). What the
    judged text can and cannot do to the verdict is written in `textgym.rewards.judge_prompt`. A
    judge may still be *persuaded* by what it reads: look at what a policy learns to write, and
    multiply with a gate (length, format) where a rule can be stated.

    Cost: one request for each distinct text, in parallel. Statuses: `"text: too long for the
    judge"` and `"text: refused by the judge"` (its filter) earn 0. All else (no connection, a
    timeout, an HTTP error, an answer without a verdict) is the service's fault: repeated as
    `service` says, then unscored. It needs a running server, so it has no `examples()`.

    Args:
        url: Base of the API, as `"http://localhost:8000/v1"`, or the whole address of its
            `/chat/completions`.
        model: The name of the model.
        rubric: What makes a good response, in words.
        scale: The worst and the best score, whole numbers.
        columns: Columns of the prompt table that the judge is shown, such as `("references",)`.
        show_prompt: Show the judge the prompt.
        api_key_env: Name of the environment variable with the key. It is read at each request and
            is never kept, logged or pickled. None: no key is sent.
        options: Fields of the request besides model and messages; by default temperature 0 and at
            most 512 tokens.
        structured: Ask for JSON by `response_format`: a schema; if the server refuses, a JSON
            object; if it refuses that too, by words alone.
        price: What a million prompt tokens and a million completion tokens cost, for `usage.cost`.
        max_chars: A longer text is not sent.
        max_bytes: A longer answer is not read.
        cache: How many verdicts are remembered; 0 for none. The same text on the same prompt is
            then judged once, also where the judge would waver.
        service: Timeout, concurrency, retries and breaker; by default 60 s, 8 at a time, 3 retries,
            a breaker after 16 failures in a row. `service.counts` has calls and times.
        seed: Key of the fences and ids in the prompt.
        name: The name of the component.

    Raises:
        ValueError: If the address, the scale or a limit makes no sense, or the variable with the
            key is not set.
    """

    reads_only = True

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        *,
        scale: tuple[int, int] = (1, 10),
        columns: Sequence[str] = (),
        show_prompt: bool = True,
        api_key_env: str | None = None,
        options: Mapping[str, Any] | None = None,
        structured: bool = True,
        price: tuple[float, float] = (0.0, 0.0),
        max_chars: int = 20_000,
        max_bytes: int = 1_000_000,
        cache: int = 4096,
        service: Service | None = None,
        seed: int = 0,
        name: str = "judge",
    ) -> None:
        low, high = scale
        if not (isinstance(low, int) and isinstance(high, int) and low < high):
            raise ValueError(f"scale must be two whole numbers, the worst first, got {scale}")
        if min(max_chars, max_bytes) < 1 or cache < 0:
            raise ValueError(
                "max_chars and max_bytes must be at least 1 and cache at least 0, got "
                f"{max_chars}, {max_bytes} and {cache}"
            )
        if isinstance(columns, str):
            raise ValueError(f"columns must be a list of names, got the string {columns!r}")
        http_client()  # says now how to install it, not after a batch was sampled
        self.name, self.rubric, self.scale, self.seed = name, rubric, (low, high), seed
        self.columns, self.show_prompt = tuple(columns), show_prompt
        self.max_chars, self.cache = max_chars, cache
        self.endpoint = Endpoint(
            url,
            model,
            api_key_env=api_key_env,
            options=OPTIONS if options is None else options,
            structured=structured,
            price=price,
            max_bytes=max_bytes,
        )
        self.service = service or Service(
            timeout=60.0,
            max_concurrency=8,
            retries=3,
            retry_on=(JudgeUnavailable, TimeoutError),
            break_after=16,
        )
        # Used on the event loop alone, so that no lock is needed.
        self._verdicts: OrderedDict[bytes, float] = OrderedDict()

    @property
    def usage(self) -> JudgeUsage:
        """Tokens so far and what they cost; a copy."""
        return self.endpoint.usage

    def check(self, columns: Collection[str]) -> None:
        """Check that what the judge is to be shown is there."""
        for column in self.columns:
            check_column(f"reward {self.name!r}", column, columns)

    def score(self, batch: TextBatch) -> list[Any]:
        """Ask about each distinct text, in parallel."""
        from textgym.rewards.background import raise_interrupts, run

        items = [self._question(batch, i) for i in range(len(batch))]
        questions = {item.key: item for item in items if isinstance(item, Question)}
        if not questions:
            return items
        verdicts = run(lambda: self._ask(questions))
        raise_interrupts(list(verdicts.values()))
        return [verdicts[item.key] if isinstance(item, Question) else item for item in items]

    def _question(self, batch: TextBatch, i: int) -> Question | Exception:
        text, row = batch.texts[i], batch.rows[i]
        if len(text) > self.max_chars:
            return TextFailure("too long for the judge")
        material = {}
        if self.show_prompt:
            prompt = batch.prompts[i]
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
                return ValueError(
                    f"reward {self.name!r} cannot show a prompt of token ids to the judge: give "
                    "its text in a column and use show_prompt=False, columns=[...]"
                )
            material["The prompt"] = _prompt_text(prompt)
        for column in self.columns:
            if column not in row:
                return missing_column(f"reward {self.name!r}", column, row)
            material[f"The {column}"] = _shown(row[column])
        return write_question(text, material, rubric=self.rubric, scale=self.scale, seed=self.seed)

    async def _ask(self, questions: dict[bytes, Question]) -> dict[bytes, Any]:
        """Give each question its verdict, or the exception that it came to."""
        from textgym.rewards.background import gather

        verdicts: dict[bytes, Any] = {
            key: self._verdicts[key] for key in questions if key in self._verdicts
        }
        fresh = [key for key in questions if key not in verdicts]
        async with self.endpoint.client() as client:
            calls = [functools.partial(self._verdict, client, questions[key]) for key in fresh]
            verdicts |= zip(fresh, await gather(calls, self.service), strict=True)
        for key, value in verdicts.items():
            if isinstance(value, float):
                self._verdicts[key] = value
                self._verdicts.move_to_end(key)
        while len(self._verdicts) > self.cache:
            self._verdicts.popitem(last=False)
        return verdicts

    async def _verdict(self, client: Any, question: Question) -> float:
        """Ask one question and read the verdict, in [0, 1]."""
        answer = await self.endpoint.complete(client, question)
        low, high = self.scale
        try:
            return (read_verdict(answer, question.id, self.scale) - low) / (high - low)
        except ValueError as error:
            raise JudgeUnavailable(self.endpoint.clean(f"no verdict: {error}")) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_verdicts": OrderedDict()}


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(
        f"{message.get('role')}: {message.get('content')}"
        for message in prompt
        if isinstance(message, dict)
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return "\n".join(f"{i}. {item}" for i, item in enumerate(value, start=1))
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
