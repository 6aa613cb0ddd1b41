"""Which tokens of a text belong to a word, for any fast tokenizer, and how much of a text EntMLM hid."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np


_WORD = re.compile(r"\w+|[^\w\s]")
_WITHIN_WORDS = ("Mn", "Mc", "Me", "Cf")  # accents that stand alone, soft hyphens, joiners
_COORDINATORS = frozenset(("and", "or", "nor"))

# What the collator counts in every text; a sum over texts gives `masking_rates`.
MASKING_COUNTS = (
    "texts",
    "tokens",
    "hidden_tokens",
    "texts_with_entity",
    "hidden_entities",
    "hidden_entities_with_cue",
    "hidden_entities_with_hidden_cue",
)


class TokenWords:
    """The words of one text and the tokens of each, from the tokens' character offsets.

    A word is a run of letters, digits and underscores with the accents and joiners among them, or one other sign.
    Words that one token reaches into are one ("a🫁mass" where it is a single unknown token), so that hiding whole words
    never hides or leaves half a token. A token of blanks alone belongs to the word after it. Words are numbered from 0.

    `offsets` (T, 2) are characters of `text`, `special` (T,) is True for tokens that stand for no text. `cut_before`
    and `cut_after` are the offsets of the tokens next to those kept, where truncation took some away on that side.
    """

    def __init__(
        self,
        text: str,
        offsets: np.ndarray,
        special: np.ndarray,
        cut_before: tuple[int, int] | None = None,
        cut_after: tuple[int, int] | None = None,
    ):
        if not text.isascii():
            text = "".join("_" if unicodedata.category(sign) in _WITHIN_WORDS else sign for sign in text)
        self.text = text  # as long as it was, which the offsets need
        spans = np.array([match.span() for match in _WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)
        self.starts, self.ends = spans[:, 0].copy(), spans[:, 1].copy()
        first, stop = self._touched(offsets[:, 0], offsets[:, 1])
        across = ~special & (stop > first + 1)
        if across.any():
            self._join(first[across], stop[across])
            first, _ = self._touched(offsets[:, 0], offsets[:, 1])
        num_words = len(self.starts)
        self.token_word = np.where(special | (first == num_words), -1, first)  # (T,), -1 for tokens of no word
        self._num_tokens = np.bincount(self.token_word + 1, minlength=num_words + 1)[1:]
        self._tokens_before = np.concatenate([[0], np.cumsum(self._num_tokens)])
        # the words from `_low` to before `_high` have lost no token
        self._low, self._high = 0, num_words
        if cut_before is not None:
            first, stop = self._touched(*cut_before)
            self._low = max(first + 1, stop)
        if cut_after is not None:
            self._high = self._touched(*cut_after)[0]

    def _touched(self, start, end):
        """First word that the characters `start` to `end` touch, blanks before it included, and the one to stop at."""
        return self.ends.searchsorted(start, side="right"), self.starts.searchsorted(end, side="left")

    def _join(self, first: np.ndarray, stop: np.ndarray) -> None:
        begins = np.ones(len(self.starts), dtype=bool)
        for begin, end in zip(first, stop, strict=True):
            begins[begin + 1 : end] = False
        self.starts = self.starts[begins]
        self.ends = self.ends[np.append(begins[1:], True)]

    def spans(self, places: Sequence[tuple[int, int]]) -> list[slice | None]:
        """For each (start, end) in characters the words that it touches, None where they have no token or lost one."""
        if not places:
            return []
        first, stop = self._touched(*np.array(places, dtype=np.int64).T)
        whole = (first >= self._low) & (stop <= self._high) & (self._tokens_before[stop] > self._tokens_before[first])
        return [
            slice(*span) if kept else None for *span, kept in zip(first.tolist(), stop.tolist(), whole, strict=True)
        ]

    def tokens(self, words: Iterable[slice | np.ndarray]) -> np.ndarray:
        """(T,) bool: every token of the given words, and no other."""
        chosen = np.zeros(len(self.starts) + 1, dtype=bool)  # the last is that of special tokens, number -1
        for index in words:
            chosen[index] = True
        return chosen[self.token_word]

    def coordinators(self, start: int, end: int, outside: Sequence[slice]) -> np.ndarray:
        """Numbers of the words "and", "or" and "nor" from `start` to `end`, but for those in the spans `outside`."""
        first, stop = self._touched(start, end)
        within = {number for span in outside for number in range(span.start, span.stop)}
        words = [
            number
            for number in range(max(first, self._low), min(stop, self._high))
            if number not in within and self.text[self.starts[number] : self.ends[number]].lower() in _COORDINATORS
        ]
        return np.array(words, dtype=np.int64)

    def draw(self, num_tokens: int, generator: np.random.Generator) -> np.ndarray:
        """Random whole words, until they hold at least `num_tokens` tokens; signs only in a text of nothing else."""
        whole = np.flatnonzero(self._num_tokens[self._low : self._high]) + self._low
        letters = [
            number
            for number in whole.tolist()
            if any(sign.isalnum() for sign in self.text[self.starts[number] : self.ends[number]])
        ]
        order = generator.permutation(np.array(letters, dtype=np.int64) if letters else whole)
        held = np.cumsum(self._num_tokens[order])
        return order[: int(np.searchsorted(held, num_tokens)) + 1]


def masking_rates(counts: dict[str, float]) -> dict[str, float]:
    """What is logged of sums of `MASKING_COUNTS`.

    `mlm_token_ratio` is the share of tokens, special ones apart, that was hidden; `mlm_entity_text_ratio` the share of
    texts with an entity to hide; `mlm_entities_per_text` how many were chosen in a text, 0 with words at random;
    `mlm_hidden_cue_ratio` the share of cues hidden among those of the chosen entities, there when cues were counted.
    """
    rates = {
        "mlm_token_ratio": counts["hidden_tokens"] / max(counts["tokens"], 1),
        "mlm_entity_text_ratio": counts["texts_with_entity"] / max(counts["texts"], 1),
        "mlm_entities_per_text": counts["hidden_entities"] / max(counts["texts"], 1),
    }
    if counts["hidden_entities_with_cue"]:
        rates["mlm_hidden_cue_ratio"] = counts["hidden_entities_with_hidden_cue"] / counts["hidden_entities_with_cue"]
    return rates
