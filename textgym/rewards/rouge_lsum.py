"""ROUGE-Lsum of texts that grow: the union of longest common subsequences, line by line.

Lin 2004, section 3.2, as rouge-score computes it. Lines are sentences. Of each sentence of a
reference those words count that are in the longest common subsequence with any sentence of the
text, but no word more often than the text has it. Where there are several longest common
subsequences, rouge-score's choice is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from textgym.rewards.rouge_counts import LcsTarget, RougeCursor, Split, Words


class LsumTarget:
    """The sentences of references.

    Args:
        references: The words of each sentence of each reference.

    Attributes:
        lines: All sentences of all references.
        wholes: For each reference, the positions of its words.
        sizes: How many words each reference has.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.lines = LcsTarget([words for lines in references for words in lines if words])
        self.sizes = [sum(len(words) for words in lines) for lines in references]
        fields = iter(self.lines.fields)
        self.wholes: list[int] = []
        for lines in references:
            whole = 0
            for _ in filter(None, lines):
                start, field = next(fields)
                whole |= field << start
            self.wholes.append(whole)


class Column:
    """One word of the current sentence, against all sentences of all references.

    Attributes:
        row: The row of the dynamic program after it (see `LcsTarget.extend`).
        here: The positions of the word.
        paths: For each sentence of a reference where the last path back passed through, and the
            positions that it took from there on.
    """

    __slots__ = ("here", "paths", "row")

    def __init__(self, row: int, here: int, lines: int) -> None:
        self.row, self.here = row, here
        self.paths = [(-1, 0)] * lines


class LsumCursor(RougeCursor):
    """ROUGE-Lsum of a text that grows.

    Args:
        target: The references, shared; not changed.
        split: Gives the words of runs.
        mean: Average over the references; else take the best.
    """

    __slots__ = ("columns", "counts", "opened", "target", "union", "width")

    def __init__(self, target: LsumTarget, split: Split, mean: bool) -> None:
        super().__init__(target.sizes, split, mean)
        self.target = target
        self.columns: list[Column] = []  # the current sentence
        self.counts: dict[str, int] = {}  # how often the text has the words of references
        self.union = 0  # the positions that finished sentences took
        self.opened: Words = ()
        self.width = 0

    def push(self, piece: str) -> float:
        """Append `piece` and give the F-measure of the text so far, from 0 to 1."""
        first, *rest = piece.split("\n")
        super().push(first)
        for line in rest:
            self._close()
            self.tail = ""
            self.union |= self._taken()
            self.columns = []
            super().push(line)
        return self.value

    def _close(self) -> None:
        self.opened, self.width = (), 0

    def _reopen(self, words: Words) -> float:
        lines, counts, columns = self.target.lines, self.counts, self.columns
        if words == self.opened:
            return self.value
        for word in self.opened:
            if word in counts:
                counts[word] -= 1
        del columns[len(columns) - self.width :]
        row = columns[-1].row if columns else lines.full
        for word in words:
            here = lines.bits.get(word, 0)
            if here:
                row = lines.extend(row, word)
                counts[word] = counts.get(word, 0) + 1
            columns.append(Column(row, here, len(lines.fields)))
        self.length += len(words) - self.width
        self.opened, self.width = words, len(words)
        union = self.union | self._taken()
        hits = [
            sum(
                min(count, (union & whole & lines.bits[word]).bit_count())
                for word, count in counts.items()
            )
            for whole in self.target.wholes
        ]
        self.value = self._score(hits, self.length)
        return self.value

    def _taken(self) -> int:
        """Give the positions that the current sentence takes, in all sentences of references."""
        taken = 0
        for k, (start, field) in enumerate(self.target.lines.fields):
            taken |= self._path(k, start, field) << start
        return taken

    def _path(self, k: int, start: int, field: int) -> int:
        """Walk rouge-score's way back through the table of one sentence of a reference.

        From the last word of both it takes a position where the words are equal; else it drops the
        text's last word where the length stays that of the row above plus 1 (a bit of 0), or else
        the reference's. As soon as it meets the last path, it goes on as that one did.
        """
        columns, passed = self.columns, []
        below, taken = field, 0  # the positions that are left
        for j in range(len(columns) - 1, -1, -1):
            column = columns[j]
            known, then = column.paths[k]
            if known == below:
                taken = then
                break
            here = column.here >> start & below
            at = (here | (~(column.row >> start) & below)).bit_length()
            position = here & (1 << at >> 1)
            passed.append((column, below, position))
            below = (1 << at >> (1 if position else 0)) - 1
            if not below:
                break
        for column, left, position in reversed(passed):
            taken |= position
            column.paths[k] = (left, taken)
        return taken
