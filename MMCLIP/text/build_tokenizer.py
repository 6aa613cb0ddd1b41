"""Makes the tokenizer that ships with MMCLIP: `python -m MMCLIP.text.build_tokenizer`.

A lower-case WordPiece vocabulary of our own words: words.txt, the names in vocabulary.yaml, the disease-kind prompts
and the phantom reports. Words of none of these fall apart into word beginnings and endings that are frequent among
ours, and at worst into characters, so ASCII text never becomes `[UNK]`. The same sources give the same file.
"""

import argparse
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..data.phantom import make_phantom
from .prompts import negative_prompts, positive_prompts
from .vocabulary import LABEL_KINDS, load_vocabulary


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # [PAD] is 0, as text towers expect
MAX_LENGTH = 256
NUM_PHANTOM_REPORTS = 1000  # the reports repeat their words long before
NUM_ENDINGS, NUM_BEGINNINGS = 1200, 600
# signs of notes that are not ASCII; other scripts may become [UNK]
OTHER_CHARACTERS = "°µμ×±≤≥≈–—‘’“”•…½²³→·"
LONGEST_WORD = 64  # longer runs of letters are cut: WordPiece would call one above 100 unknown
TEXT_FOLDER = Path(__file__).resolve().parent


def own_texts() -> Iterator[str]:
    """Every text of ours: the word list, the vocabulary, all prompts of its labels, and phantom reports."""
    for line in (TEXT_FOLDER / "words.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line
    labels = ["no finding"]
    for concept in load_vocabulary().values():
        yield from (*concept.wordings, *concept.abbreviations, *concept.labels)
        if concept.kind in LABEL_KINDS:
            labels.append(concept.name)
    for label in labels:
        yield from positive_prompts(label)
        yield from negative_prompts(label)
    for index in range(NUM_PHANTOM_REPORTS):
        yield make_phantom(seed=0, index=index, size=32).report


def build_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Token -> id: special tokens, characters, endings, beginnings, then the words, each group in a fixed order."""
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})
    characters = sorted(set(string.printable.lower()) - set(string.whitespace)) + list(OTHER_CHARACTERS)
    beginnings, endings = Counter(), Counter()
    for word in words:
        for start in range(len(word)):
            for length in range(2, 7):
                if start + length <= len(word):
                    (endings if start else beginnings)[word[start : start + length]] += 1
    tokens = list(SPECIAL_TOKENS)
    tokens += characters + [f"##{character}" for character in characters]
    tokens += [f"##{piece}" for piece in _worthiest(endings, NUM_ENDINGS)]
    tokens += _worthiest(beginnings, NUM_BEGINNINGS) + words
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _worthiest(counts: Counter, number: int) -> list[str]:
    """The pieces that save most characters' worth of tokens; equal ones in alphabetical order."""
    return sorted(counts, key=lambda piece: (-counts[piece] * (len(piece) - 1), piece))[:number]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A BERT-like fast tokenizer over `build_vocabulary(texts)`."""
    vocabulary = build_vocabulary(texts)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Split(Regex(rf"\S{{{LONGEST_WORD}}}"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=TEXT_FOLDER.parent.parent, help="default: the repository")
    arguments = parser.parse_args()
    tokenizer = build_tokenizer(own_texts())
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{len(tokenizer)} tokens -> {arguments.output_dir / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
