"""Chat completions over HTTP: one request, what can go wrong with it, and what it used."""

from __future__ import annotations

import email.utils
import importlib
import json
import math
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from textgym.rewards.errors import TextFailure
from textgym.rewards.judge_prompt import ANSWER_SCHEMA, Question

SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": ANSWER_SCHEMA},
}
# How a request asks for JSON, and whether it is one message; what a server refuses is followed by
# the next. A 400 does not say which field it is about, so the words of the error are not searched.
FORMATS: tuple[tuple[dict[str, Any] | None, bool], ...] = (
    (SCHEMA, False),
    ({"type": "json_object"}, False),
    (None, False),
    (None, True),
)
UNSTRUCTURED = 2
NOT_UNDERSTOOD = {400, 422, 501}
# How servers say that a request is longer than their model can read.
TOO_LONG = re.compile(rb"context.?(?:length|size|window)|too (?:long|large)", re.I)
TRY_AGAIN = {408, 409, 425, 429}
LONGEST_MESSAGE = 300


class JudgeError(RuntimeError):
    """The judge gave no verdict, and asking again would not help."""


class JudgeUnavailable(JudgeError):
    """The judge gave no verdict this time.

    Attributes:
        retry_after: Seconds to wait, if the server said so.
    """

    retry_after: float | None = None


@dataclass
class JudgeUsage:
    """What a judge has used so far, answers that could not be read included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """A model behind an OpenAI-compatible endpoint; the arguments are those of `HTTPJudge`.

    Raises:
        ValueError: If the address is none, or the variable with the key is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None,
        options: Mapping[str, Any],
        structured: bool,
        price: tuple[float, float],
        max_bytes: int,
    ) -> None:
        self.url, self.model = _address(url), model
        self.api_key_env, self.options = api_key_env, dict(options)
        self.structured, self.price, self.max_bytes = structured, price, max_bytes
        self._key()
        self._begin()

    def _begin(self) -> None:
        self._usage = JudgeUsage()
        self._format = 0 if self.structured else UNSTRUCTURED
        self._tls: Any = None

    @property
    def usage(self) -> JudgeUsage:
        """A copy of what was used so far."""
        return replace(self._usage)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """Open a client for the requests of one batch.

        Nothing is left to be closed at the end, and nothing is shared after a fork. The time limit
        is that of the `Service`, which holds for the whole request: an answer that comes byte by
        byte would never trip a limit on each read.
        """
        http = http_client()
        if self._tls is None:  # loading the certificates takes 50 ms
            self._tls = http.create_ssl_context() if self.url.startswith("https:") else False
        limits = http.Limits(max_connections=None)
        async with http.AsyncClient(timeout=None, limits=limits, verify=self._tls) as client:
            yield client

    async def complete(self, client: Any, question: Question) -> str:
        """Ask one question and give the judge's message.

        Raises:
            JudgeUnavailable: If asking again may help.
            JudgeError: If it would not.
            TextFailure: If the judge's filter refused the text.
        """
        for k in range(self._format, len(FORMATS)):
            response_format, one_message = FORMATS[k]
            body = {
                "model": self.model,
                "messages": question.payload(one_message=one_message),
                **self.options,
                **({} if response_format is None else {"response_format": response_format}),
            }
            status, headers, content = await self._post(client, body)
            if status == 200:
                self._format = max(self._format, k)  # what was refused is not tried again
                return self._message(content)
            if status == 400 and b"content_filter" in content:
                raise TextFailure("refused by the judge")
            if status in {413, *NOT_UNDERSTOOD} and TOO_LONG.search(content):
                # No other format would be shorter, and a refusal of the text is none of a format.
                if question.is_mostly_text():
                    raise TextFailure("too long for the judge")
                break
            if status not in NOT_UNDERSTOOD:
                break
        raise self._error(status, headers, content)

    async def _post(
        self, client: Any, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = self._key()
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = bytearray()
        try:
            async with client.stream(
                "POST", self.url, content=json.dumps(body), headers=headers
            ) as response:
                async for chunk in response.aiter_raw():  # raw: nothing unpacks to gigabytes
                    content += chunk
                    if len(content) > self.max_bytes:
                        raise JudgeUnavailable(f"the answer is longer than {self.max_bytes} bytes")
                return response.status_code, response.headers, bytes(content)
        except http_client().HTTPError as error:
            said = f": {error}" if str(error) else ""
            raise JudgeUnavailable(self.clean(f"{type(error).__name__}{said}")) from None

    def _message(self, content: bytes) -> str:
        """Take the judge's message out of a completion, and count what it used."""
        try:
            completion = json.loads(content)
            choice = completion["choices"][0]
            message = choice["message"]
            usage, refusal = completion.get("usage"), message.get("refusal")
            filtered, answer = choice.get("finish_reason") == "content_filter", message["content"]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            said = self.clean(repr(content[:LONGEST_MESSAGE]))
            raise JudgeUnavailable(f"expected a chat completion, got {said}") from None
        self._count(usage if isinstance(usage, dict) else {})
        if filtered or refusal:
            raise TextFailure("refused by the judge")
        if not isinstance(answer, str):
            raise JudgeUnavailable(
                self.clean(f"expected a message with text, got {message!r:.200}")
            )
        return answer

    def _count(self, usage: Mapping[str, Any]) -> None:
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        asked, answered = (n if type(n) is int and 0 <= n < 10**9 else 0 for n in tokens)
        self._usage.prompt_tokens += asked
        self._usage.completion_tokens += answered
        self._usage.cost += (asked * self.price[0] + answered * self.price[1]) / 1e6

    def _error(self, status: int, headers: Mapping[str, str], content: bytes) -> JudgeError:
        message = self.clean(f"HTTP {status} {content[:2000].decode('utf-8', 'replace')}")
        if status in (401, 403) and self.api_key_env:
            message += f" (the key is read from the environment variable {self.api_key_env})"
        elif status in (401, 403):
            message += " (no key is sent: name the variable that holds it with api_key_env)"
        if status < 500 and status not in TRY_AGAIN:
            return JudgeError(message)
        error = JudgeUnavailable(message)
        error.retry_after = _retry_after(headers.get("retry-after", ""))
        return error

    def _key(self) -> str | None:
        """Read the key.

        Raises:
            ValueError: If it is not set, or cannot be sent; the message does not show it.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"the environment variable {self.api_key_env}, which holds the judge's key, is "
                + ("not set" if not key else "not a key: it holds characters that no key has")
            )
        return key

    def clean(self, message: str) -> str:
        """Give a message on one short line, without the key, which a server might repeat."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        if key:
            message = message.replace(key, "***")
        return " ".join(message.split())[:LONGEST_MESSAGE]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def http_client() -> ModuleType:
    """Import the HTTP client that huggingface_hub brings: httpx2, or httpx in older releases."""
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError('HTTPJudge needs an HTTP client: pip install "textgym[judge]"')


def _address(url: str) -> str:
    """Give the address of the chat completions.

    Raises:
        ValueError: If it is not an http(s) address, or holds a password, which would be logged.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must be an address as 'http://localhost:8000/v1', got {url!r}")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "url must hold no user, password or query, which would end up in logs: put the key "
            "into an environment variable and name it with api_key_env"
        )
    base = url.rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def _retry_after(value: str) -> float | None:
    """Read a Retry-After header, seconds or a date, as seconds from now."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
