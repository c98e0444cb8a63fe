"""METEOR's alignment of two texts: which word of the one matches which word of the other.

Denkowski & Lavie 2014 ("Meteor universal: language specific translation evaluation for any target
language"), section 2: of all alignments in which every word is matched at most once, the one
(1) that covers the most words, (2) in the fewest chunks (runs of matches that are adjacent and in
the same order in both texts), (3) with the smallest sum of distances between matched positions.
Found by a beam search over the words of the text, as METEOR 1.5 does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

BEAM = 40  # partial alignments that are kept, as in METEOR 1.5
LONGEST = 250  # words of a text that are aligned, or twice its reference's, if that is more

EXACT, STEM, SYNONYM = range(3)


class Match(NamedTuple):
    """Two words that are matched: their positions, and the stage that did it."""

    here: int
    there: int
    stage: int


# A partial alignment; the first three say how good it is, less being better: words of the text left
# without a match, chunks, sum of distances. Then the last match (position here, position there),
# bits of the reference's words that are matched, and all matches as a chain (match, earlier ones).
_Partial = tuple[int, int, int, int, int, int, Any]
_ORDER = itemgetter(0, 1, 2, 3, 4, 5)  # the last three part equals, so that results repeat


def align(
    words: Sequence[str],
    reference: Sequence[str],
    stem: Callable[[str], str],
    synonyms: Callable[[str], Collection[object]] | None = None,
) -> tuple[list[Match], int]:
    """Align a text with a reference; words of the text past `LONGEST` have no match.

    Args:
        words: The words of the text.
        reference: The words of the reference.
        stem: Gives the stem of a word.
        synonyms: Gives the sets of synonyms that a word is in; None leaves this stage out.

    Returns:
        The matches in the order of the text, and the number of chunks.
    """
    words = words[: max(LONGEST, 2 * len(reference))]
    options = _options(words, reference, stem, synonyms)
    rivals = [0] * len(reference)
    for found in options:
        for there, _ in found:
            rivals[there] += 1
    beam: list[_Partial] = [(0, 0, 0, -2, -2, 0, None)]
    for here, found in enumerate(options):
        if not found:
            continue
        # A match without alternatives on either side is in every alignment of the most words.
        forced = len(found) == 1 and rivals[found[0][0]] == 1
        grown: dict[tuple[int, int, int], _Partial] = {}
        for state in beam:
            unmatched, chunks, distance, last_here, last_there, used, path = state
            if not forced:
                # Two alignments that can go on in the same ways: the better one does.
                key = (used, last_here, last_there)
                if key not in grown or (unmatched + 1, chunks, distance) < grown[key][:3]:
                    grown[key] = (unmatched + 1, *state[1:])
            for there, stage in found:
                bit = 1 << there
                if used & bit:
                    continue
                new = chunks + (here != last_here + 1 or there != last_there + 1)
                far = distance + abs(here - there)
                key = (used | bit, here, there)
                if key not in grown or (unmatched, new, far) < grown[key][:3]:
                    chain = (Match(here, there, stage), path)
                    grown[key] = (unmatched, new, far, here, there, used | bit, chain)
        beam = sorted(grown.values(), key=_ORDER)[:BEAM]
    matches, chain = [], beam[0][-1]
    while chain is not None:
        match, chain = chain
        matches.append(match)
    return matches[::-1], beam[0][1]


def _options(
    words: Sequence[str],
    reference: Sequence[str],
    stem: Callable[[str], str],
    synonyms: Callable[[str], Collection[object]] | None,
) -> list[list[tuple[int, int]]]:
    """List for each word what it can be matched with: (position, stage), the first stage's only."""
    exact: dict[str, list[int]] = {}
    stems: dict[str, list[int]] = {}
    senses: dict[object, list[int]] = {}
    for there, word in enumerate(reference):
        exact.setdefault(word, []).append(there)
        stems.setdefault(stem(word), []).append(there)
        for sense in synonyms(word) if synonyms else ():
            senses.setdefault(sense, []).append(there)
    options = []
    for word in words:
        found: dict[int, int] = {}
        for sense in synonyms(word) if synonyms else ():
            found.update(dict.fromkeys(senses.get(sense, ()), SYNONYM))
        found.update(dict.fromkeys(stems.get(stem(word), ()), STEM))
        found.update(dict.fromkeys(exact.get(word, ()), EXACT))
        options.append(sorted(found.items()))
    return options
