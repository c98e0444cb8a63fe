"""BLEU from counts: the n-grams of the references, and cursors over growing texts."""

from __future__ import annotations

from collections.abc import Sequence

from textgym.rewards.bleu_formula import Formula, brevity_penalty
from textgym.rewards.bleu_words import Splitter, Words, joins


class Target:
    """The n-grams of references, as an automaton that finds those that end at each word.

    A node is an n-gram of a reference; node 0 is the empty one. Every suffix of an n-gram of a
    reference is one too, so all that end at a word are the longest one's suffixes (Aho & Corasick
    1975).

    Args:
        references: The words of each reference.
        max_order: The longest n.

    Attributes:
        edges: From a node and a word to the node that is one word longer.
        shorter: For each node the one that lacks its first word.
        matches: For each node the n-grams that end with it: of 1 word, of 2, up to itself.
        resume: For each node where to go on from: itself, or one that can still grow.
        limits: For each node the most often that one reference has it.
        lengths: The references' lengths in words.
        longest: The greatest of them.
    """

    def __init__(self, references: Sequence[Words], max_order: int) -> None:
        self.max_order = max_order
        self.edges: dict[tuple[int, str], int] = {}
        self.shorter, self.resume, self.limits = [0], [0], [0]
        self.matches: list[tuple[int, ...]] = [()]
        self.lengths = [len(words) for words in references]
        self.longest = max(self.lengths)
        self._penalties: dict[int, float] = {}
        for words in references:
            self._add(words)

    def _add(self, words: Words) -> None:
        counts: dict[int, int] = {}
        previous: tuple[int, ...] = ()  # the n-grams that end at the last word, of 1 word, of 2 ...
        for word in words:
            shorter, found = 0, []
            for start in (0, *previous[: self.max_order - 1]):
                node = self.edges.get((start, word))
                if node is None:
                    node = self.edges[start, word] = len(self.limits)
                    self.limits.append(0)
                    self.shorter.append(shorter)
                    self.matches.append((*self.matches[shorter], node))
                    full = len(self.matches[node]) == self.max_order
                    self.resume.append(shorter if full else node)
                counts[node] = counts.get(node, 0) + 1
                found.append(node)
                shorter = node
            previous = tuple(found)
        for node, count in counts.items():
            self.limits[node] = max(self.limits[node], count)

    def closest(self, length: int) -> int:
        """Give the reference length nearest to `length`, the shorter of two."""
        return min(self.lengths, key=lambda other: (abs(other - length), other))

    def penalty(self, length: int) -> float:
        """Give the brevity penalty of a text of that many words."""
        if length >= self.longest:
            return 1.0
        penalty = self._penalties.get(length)
        if penalty is None:
            penalty = self._penalties[length] = brevity_penalty(length, self.closest(length))
        return penalty


class Count:
    """How a text's n-grams match those of references, word by word.

    Args:
        target: The references, shared; not changed.

    Attributes:
        correct: Matched n-grams, `[N]`.
        length: Words.
        state: The node of the longest n-gram that ends the text and can grow.
        seen: How often each n-gram has matched.
    """

    __slots__ = ("correct", "length", "seen", "state", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.correct = [0] * target.max_order
        self.length = self.state = 0
        self.seen: dict[int, int] = {}

    def add(self, words: Words) -> list[int]:
        """Append words; give the nodes that matched."""
        target, state, seen, correct = self.target, self.state, self.seen, self.correct
        edges, limits = target.edges, target.limits
        added = []
        for word in words:
            node = edges.get((state, word))
            if node is None:
                if (0, word) not in edges:
                    state = 0
                    continue
                while node is None:
                    state = target.shorter[state]
                    node = edges.get((state, word))
            for n, gram in enumerate(target.matches[node]):
                count = seen.get(gram, 0)
                if count < limits[gram]:
                    seen[gram] = count + 1
                    correct[n] += 1
                    added.append(gram)
            state = target.resume[node]
        self.state = state
        self.length += len(words)
        return added

    def remove(self, added: list[int], words: int, state: int) -> None:
        """Take back what `add` appended.

        Args:
            added: What it gave.
            words: How many words they were.
            state: The state before.
        """
        matches = self.target.matches
        for gram in added:
            self.seen[gram] -= 1
            self.correct[len(matches[gram]) - 1] -= 1
        self.length -= words
        self.state = state

    def value(self, formula: Formula) -> float:
        """Give BLEU, from 0 to 1."""
        length = self.length
        return formula.of_text(self.correct, length, self.target.penalty(length))

    def copy(self) -> Count:
        """Give an independent copy."""
        twin = Count(self.target)
        twin.correct, twin.seen = list(self.correct), dict(self.seen)
        twin.length, twin.state = self.length, self.state
        return twin


class BleuCursor:
    """BLEU of a text that grows.

    The count covers the whole text. The words after the last sure break are the `open` ones: when
    they change, what they had added is taken back first; when a break follows, they stay.

    Args:
        target: The references, shared; not changed.
        formula: How BLEU is computed.
        splitter: How texts are split into words.
    """

    __slots__ = (
        *("added", "clean", "count", "first", "formula", "quick", "splitter"),
        *("start", "tail", "value", "width"),
    )

    def __init__(self, target: Target, formula: Formula, splitter: Splitter) -> None:
        self.formula, self.splitter = formula, splitter
        self.count = Count(target)
        self.quick = splitter.alone and not splitter.characters
        self.tail = ""  # the text since the last sure break
        self.clean = True  # ... and there is no space in it
        self.first = True  # ... and no break before it
        self.added: list[int] = []  # what the open words matched
        self.width = 0  # how many they are
        self.start = 0  # the count's state before them
        self.value = 0.0

    def push(self, piece: str) -> float:
        """Append `piece` and give the BLEU of the text so far, from 0 to 1."""
        if self.clean and self.quick:
            parts = piece.split()
            if len(parts) == 1:
                part = parts[0]
                before = len(piece) - len(part)
                if before == 0:
                    self.tail += part
                    return self._reopen(self.tail)
                if before == 1 and piece[0] == " ":
                    self._close()
                    self.tail = part
                    return self._reopen(part)
        return self._push_any(piece)

    def _push_any(self, piece: str) -> float:
        splitter, text = self.splitter, self.tail + piece
        end = text.rstrip()
        cut = splitter.last_break(end)
        if cut is not None:
            self._reopen(text[:cut], last=False)
            self._close()
            self.first = False
            text, end = text[cut:], end[cut:]
        self.tail = text
        self._reopen(end)
        space = text[len(end) :]
        self.clean = text.split() in ([], [text])
        if self.quick and space and not joins(end, space[0]):
            self._close()
            self.tail, self.clean = "", True
        return self.value

    def _close(self) -> None:
        """Count the open words for good."""
        self.added, self.width, self.start = [], 0, self.count.state

    def _reopen(self, text: str, last: bool = True) -> float:
        """Let the open words be those of `text`; give the value."""
        splitter, count = self.splitter, self.count
        words: Words
        if splitter.plain and text.isalnum():
            words = (text,)
        elif splitter.alone:
            words = splitter.split(text)
        else:
            words = splitter.split(text, self.first, last)
        before, width = self.added, self.width
        if width:
            count.remove(before, width, self.start)
        self.added, self.width = count.add(words), len(words)
        if self.added or before or self.width != width:
            self.value = count.value(self.formula)
        return self.value

    def copy(self) -> BleuCursor:
        """Give an independent copy."""
        twin = BleuCursor(self.count.target, self.formula, self.splitter)
        twin.count = self.count.copy()
        twin.tail, twin.clean, twin.first = self.tail, self.clean, self.first
        twin.added, twin.width, twin.start = list(self.added), self.width, self.start
        twin.value = self.value
        return twin
