"""The text of a response that grows token by token, at a cost that does not grow with it.

A tokenizer turns ids into text in one go. What a dense reward, a process reward or a stop string
asks for is the text after every token, and decoding everything again each time costs O(T²) ids. A
`TextStream` decodes every id once.

The text so far is a function of the ids alone: what the tokenizer decodes them to, less a character
that has only begun. A token may end inside a character (its first byte of three); decoded by
itself, that is U+FFFD, and it is held back until its last byte is there or cannot come any more.

Nearly always the text so far extends the one before it. The exception is a tokenizer with byte
fallback (SentencePiece): there, a byte that fits no character spoils the whole run of byte tokens
that it is in, and the characters of that run are withdrawn.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import tokenizers as tk

BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """The text of one response.

    Attributes:
        text: The text so far, without a character that has only begun.
    """

    text: str

    @property
    def read(self) -> int:
        """Ids read so far."""

    def push(self, ids: Sequence[int]) -> str:
        """Read the next ids; give the text so far."""


class Detokenizer:
    """How a tokenizer's ids become text one by one.

    Args:
        backend: The fast tokenizer.
        decode: Ids to text, special tokens skipped; what the streams agree with.
        exact: `decode` is what the backend does and nothing besides (no cleaning up of spaces).
    """

    def __init__(
        self, backend: tk.Tokenizer, decode: Callable[[Sequence[int]], str], *, exact: bool
    ) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}
        self._pieces: dict[int, Any] = {}
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._replace: list[tuple[str, str]] = []
        self._strip = 0
        self._piece: Callable[[str], Any] = str
        self._begin: Callable[[], TextStream] = lambda: _Whole(decode)
        if not exact:
            return
        if decoder is None or decoder["type"] == "Metaspace":
            self._piece, self._begin = self._joined, lambda: _Joined(self.piece)
        elif decoder["type"] == "ByteLevel":
            self._piece, self._begin = self._bytes, lambda: _Bytes(self.piece)
        elif decoder["type"] == "Sequence" and self._reads_fallback(decoder["decoders"]):
            self._piece, self._begin = self._fallback, lambda: _Fallback(self.piece, self._strip)

    def stream(self) -> TextStream:
        """Begin an empty response."""
        return self._begin()

    def piece(self, token_id: int) -> Any:
        """What one id adds, made once; None for what is skipped."""
        try:
            return self._pieces[token_id]
        except KeyError:
            token = self._backend.id_to_token(token_id)
            if token is None or token in self._special:
                piece = None
            else:
                piece = self._piece(token)
            self._pieces[token_id] = piece
            return piece

    def _joined(self, token: str) -> tuple[str, str]:
        """The token as the first of a text, and as a later one."""
        decoder = self._backend.decoder
        if decoder is None:
            return token, f" {token}"
        return decoder.decode([token]), decoder.decode(["", token])

    def _bytes(self, token: str) -> bytes:
        alphabet = _byte_alphabet()
        try:
            return bytes([alphabet[character] for character in token])
        except KeyError:  # an added token that is plain text
            return token.encode()

    def _fallback(self, token: str) -> str | int:
        for old, new in self._replace:
            token = token.replace(old, new)
        byte = _BYTE.fullmatch(token)
        return token if byte is None else int(byte[1], 16)

    def _reads_fallback(self, decoders: list[dict[str, Any]]) -> bool:
        """Read Replace…, ByteFallback, Fuse, Strip; tell whether it is these, in this order."""
        rest = list(decoders)
        while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
            replace = rest.pop(0)
            self._replace.append((replace["pattern"]["String"], replace["content"]))
        if [step["type"] for step in rest[:2]] != ["ByteFallback", "Fuse"]:
            return False
        if len(rest) == 3:
            strip = rest[2]
            if strip["type"] != "Strip" or strip["content"] != " " or strip["stop"]:
                return False
            self._strip = int(strip["start"])
        return len(rest) <= 3


class _Joined:
    """Tokens that are text by themselves, the first one apart: words, Metaspace."""

    def __init__(self, piece: Callable[[int], tuple[str, str] | None]) -> None:
        self.piece, self.read, self.text, self._first = piece, 0, "", True

    def push(self, ids: Sequence[int]) -> str:
        self.read += len(ids)
        for i in ids:
            forms = self.piece(i)
            if forms is not None:
                self.text += forms[0] if self._first else forms[1]
                self._first = False
        return self.text


class _Bytes:
    """Tokens that are bytes of UTF-8."""

    def __init__(self, piece: Callable[[int], bytes | None]) -> None:
        self.piece, self.read, self.text = piece, 0, ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        self.read += len(ids)
        for i in ids:
            self.text += self._utf8.decode(self.piece(i) or b"")
        return self.text


class _Fallback:
    """Tokens that are text, or one byte of a run that is text only if all of it is UTF-8."""

    def __init__(self, piece: Callable[[int], str | int | None], strip: int) -> None:
        self.piece, self.read, self.text, self._strip = piece, 0, "", strip
        self._settled = ""  # what comes before the run
        self._run = bytearray()

    def push(self, ids: Sequence[int]) -> str:
        self.read += len(ids)
        for i in ids:
            piece = self.piece(i)
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece is not None:
                if self._run:
                    self._settled += _run_text(self._run, over=True)
                    self._run.clear()
                self._settled += piece
        text = self._settled
        if self._run:
            text += _run_text(self._run, over=False)
        cut = 0
        while cut < self._strip and text[cut : cut + 1] == " ":
            cut += 1
        self.text = text[cut:]
        return self.text


class _Whole:
    """Any other tokenizer: everything is decoded again."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.ids, self.text = decode, list[int](), ""

    @property
    def read(self) -> int:
        return len(self.ids)

    def push(self, ids: Sequence[int]) -> str:
        if len(ids):
            self.ids += ids
            self.text = self.decode(self.ids).rstrip(BROKEN)
        return self.text


def _run_text(run: bytearray, *, over: bool) -> str:
    """The text of a run of byte tokens; while it is not over, its last character may be open."""
    try:
        return codecs.utf_8_decode(run, "strict", over)[0]
    except UnicodeDecodeError:
        return BROKEN * len(run)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (Radford et al. 2019, GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others for characters from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + k): byte for k, byte in enumerate(others)}
