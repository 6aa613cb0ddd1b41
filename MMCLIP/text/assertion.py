"""What a report says of an entity: present, absent or uncertain, and which words say so.

After NegEx (Chapman et al. 2001): cues before or after an entity act up to the border of its clause, and never across
the end of a sentence. The rules see words and spans alone, so they serve every recogniser.
"""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from .lexicon import Match, PhraseIndex, Word, longest
from .vocabulary import LABEL_KINDS


ASSERTIONS = ("present", "absent", "uncertain")


class Cue(NamedTuple):
    """What a phrase of `cues.yaml` does: `says` is "absent", "uncertain" or another group there."""

    says: str
    stands: str  # see there; "" where it acts on no entity


class Verdict(NamedTuple):
    """The assertion of an entity, and the words `first` to `stop` (exclusive) of the cue that made it, if one did."""

    assertion: str
    first: int | None = None
    stop: int | None = None


PRESENT = Verdict("present")

CUES_FILE = Path(__file__).with_name("cues.yaml")
_FINITE = frozenset("is are was were has have had shows reveals appears appear remains remain there".split())
_MODALS = frozenset("may might could".split())
_DETERMINERS = frozenset("the a an there this it".split())
# After a comma these begin a statement of its own ("No effusion, small nodule."), unless the list goes on to an "or".
_STATEMENT_STARTS = frozenset(
    "small mild moderate large severe tiny minimal stable unchanged persistent increased marked new trace".split()
)
_HEDGES = frozenset("possible possibly likely probable probably suspected questionable".split())
# "No mass, edema is seen" goes on denying, "No mass, the heart is large" and "No mass, lungs are hyperinflated" do not.
_PERCEIVED = frozenset(
    "seen identified noted demonstrated visualized evident appreciated present detected visible".split()
)
_NEGATORS = frozenset("no not without".split())
_LIST_GAP = 4  # words at most between an alternative and its "or"


class _Item(NamedTuple):
    """A step of the walk over a sentence: an entity (`cue` is None) or a cue, and its words."""

    first: int
    stop: int
    entity: int
    is_label: bool
    cue: Cue | None


def add_cues(index: PhraseIndex) -> PhraseIndex:
    """Let `index` find the cues of `cues.yaml`, as `Cue`s, besides what it has."""
    cues = yaml.safe_load(CUES_FILE.read_text(encoding="utf-8"))
    groups = {Cue(says, stands): lists for says in ("absent", "uncertain") for stands, lists in cues[says].items()}
    groups.update({Cue(says, ""): cues[says] for says in ("pseudo", "unchanged", "end", "cause")})
    for cue, lists in groups.items():
        for phrase in itertools.chain.from_iterable(lists):
            index.add(phrase, cue)
    return index


def assert_spans(
    words: Sequence[Word],
    sentence_of: Sequence[int],
    spans: Sequence[tuple[int, int]],
    kinds: Sequence[str],
    cues: Sequence[Match],
) -> list[Verdict]:
    """The verdict on each span of words (first, stop), which are in order and do not overlap; `kinds` are theirs.

    `sentence_of` numbers the sentence of each word; a span lies in one. `cues` are the matches of an index with
    `add_cues`; of those that overlap the longest counts, and none that overlaps a span.
    """
    verdicts = [PRESENT] * len(spans)
    sentences: dict[int, list[_Item]] = {}
    cued = set()
    for number, (first, stop) in enumerate(spans):
        is_label = kinds[number] in LABEL_KINDS
        sentences.setdefault(sentence_of[first], []).append(_Item(first, stop, number, is_label, None))
        if kinds[number] == "normal" and words[first].text in _NEGATORS:  # "no bone lesion or effusion"
            sentences[sentence_of[first]].append(_Item(first, first + 1, -1, False, Cue("absent", "before")))
            cued.add(sentence_of[first])
    for match in longest(cues, sentence_of, spans):
        sentence = sentence_of[match.first]
        if sentence in sentences:
            sentences[sentence].append(_Item(match.first, match.stop, -1, False, match.value))
            if match.value.says in ("absent", "uncertain"):
                cued.add(sentence)
    for number in cued:
        items = sorted(sentences[number], key=_order)
        first = bisect.bisect_left(sentence_of, number)
        stop = bisect.bisect_right(sentence_of, number)
        borders = _clause_borders(items, words, first, stop)
        last_label = None
        for begin, end in zip(borders, borders[1:], strict=False):
            clause = [item for item in items if begin <= item.first < end]
            last_label = _assert_clause(clause, last_label, verdicts)
    return verdicts


def _order(item: _Item) -> tuple[int, bool]:
    """From left to right; of cues in one place the one that acts backwards comes first."""
    return item.first, item.cue is not None and item.cue.stands == "before"


def _clause_borders(items: list[_Item], words: Sequence[Word], first: int, stop: int) -> list[int]:
    """Word positions at which a new clause begins, `first` and `stop` included."""
    inside = set()  # an entity or a cue borders nothing within
    for item in items:
        if item.cue is None or item.cue.stands != "between":
            inside.update(range(item.first, item.stop))
    borders = [first]
    for previous, item in zip([None, *items], items, strict=False):
        says = item.cue.says if item.cue is not None else ""
        follows_cue = (
            previous is not None
            and previous.cue is not None
            and previous.cue.says == "uncertain"
            and item.first - previous.stop <= 1
        )
        if (says == "end" or (says == "cause" and not follows_cue)) and item.first > first:
            borders.append(item.first)
    borders += [i for i in range(first + 1, stop) if words[i].text == ":" and i not in inside]
    alternatives = [i for i in range(first, stop) if words[i].text in ("or", "nor") and i not in inside]
    last_alternative = alternatives[-1] if alternatives else -1
    separators = [i for i in range(first, stop) if words[i].text in (",", "and") and i not in inside]
    for rank, position in enumerate(separators):
        begin = max(border for border in borders if border <= position)
        following = words[position + 1].text if position + 1 < stop else ""
        if following == "and" and words[position].text == ",":
            following = words[position + 2].text if position + 2 < stop else ""
        limit = separators[rank + 1] if rank + 1 < len(separators) else stop
        if limit == position + 1:
            limit = separators[rank + 2] if rank + 2 < len(separators) else stop
        left = any(words[i].text in _FINITE for i in range(begin, position))
        right = any(words[i].text in _FINITE for i in range(position + 1, limit))
        if (
            (left and right)
            or any(words[i].text in _MODALS for i in range(position + 1, limit))
            or (following in _HEDGES and last_alternative < position)
            or (
                right
                and last_alternative < position
                and not any(words[i].text in _PERCEIVED for i in range(position, stop))
            )
            or following in _DETERMINERS
            or following in _NEGATORS
            or (following in _STATEMENT_STARTS and last_alternative < position)
        ):
            borders.append(position)
    return sorted({*borders, stop})


def _assert_clause(items: list[_Item], last_label: _Item | None, verdicts: list[Verdict]) -> _Item | None:
    """Write the verdicts on the entities of one clause; `last_label` is the last label before and after the call."""
    if last_label is not None and all(item.cue is not None for item in items):
        for item in items:  # "..., which has resolved"
            if item.cue.stands == "after":
                verdicts[last_label.entity] = Verdict(item.cue.says, item.first, item.stop)
        return last_label
    current = PRESENT
    seen: list[int] = []  # entities so far
    alternative = None  # of the label that comes next, and where
    hedged = 0  # how many of them stand before the last hedge, which parts what follows from what it explains
    unchanged = any(item.cue is not None and item.cue.says == "unchanged" for item in items)
    before, last_label = last_label, None
    for item in items:
        if item.cue is None:
            verdicts[item.entity] = current
            seen.append(item.entity)
            if item.is_label:
                if alternative is not None and item.first - alternative.stop <= _LIST_GAP and current is PRESENT:
                    verdicts[item.entity] = verdicts[last_label.entity] = alternative
                last_label, alternative = item, None
            continue
        says, stands = item.cue
        verdict = Verdict(says, item.first, item.stop)
        if stands == "before" and not (says == "uncertain" and current.assertion == "absent"):
            # "resolved" may stand on either side of what it is said of; after an entity it acts backwards only
            backwards = any(
                other.first == item.first and other.cue is not None and other.cue.stands == "after" for other in items
            )
            if not (backwards and says == "absent" and seen):
                current = verdict
                if says == "uncertain":
                    hedged = len(seen)
        elif stands == "after":
            for entity in seen if says == "absent" else seen[hedged:]:
                if verdicts[entity].assertion != "absent" or says == "absent":
                    verdicts[entity] = verdict
        elif stands == "nearest" and last_label is not None:
            if verdicts[last_label.entity] is PRESENT and last_label.entity in seen[hedged:]:
                verdicts[last_label.entity] = verdict
        elif stands == "between" and last_label is not None and item.first - last_label.stop <= _LIST_GAP:
            if verdicts[last_label.entity] is PRESENT and not unchanged:
                alternative = verdict
    return last_label or before
