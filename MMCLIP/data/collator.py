"""Samples -> batch. All randomness of masks and augmentation is drawn here, from each sample's (seed, epoch, index)."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..text.entities import Entity
from ..text.prompts import negative_prompts, positive_prompts
from ..text.vocabulary import LABEL_KINDS, canonical_label
from .augmentation import RadiographAugmentation
from .dataset import AUGMENTATION_STREAM, BATCH_STREAM, COLLATOR_STREAM, sample_generator


logger = logging.get_logger(__name__)
IGNORE = -100
_WORD = re.compile(r"\w+|[^\w\s]")


class MMCLIPCollator:
    """Makes samples of `MMCLIPDataset` one batch; its keys are the arguments of `MMCLIPForPreTraining.forward`.

    One key is not, and goes no further than `MMCLIPTrainer`, which augments the images where the batch then is:
    `augmentation_draws` (B, 9), there when `augmentation` changes anything.

    | key | shape, values |
    | --- | --- |
    | `pixel_values`, `has_image` | (B, C, height, width), zeros for a text-only row; (B,) bool |
    | `input_ids`, `attention_mask` | (B, T) |
    | `input_ids_masked`, `mlm_labels` | (B, T); hidden tokens are [MASK] in one, themselves in the other, else -100 |
    | `entity_mask` | (B, T) bool, what the text says is there (see below) |
    | `group_ids` | (B,) int64, equal for texts that differ in case and blanks at most |
    | `mim_noise` | (B, N) uniform in [0, 1) |
    | `prompt_input_ids`, `prompt_attention_mask` | (2F, Tp), rows 2f and 2f + 1 are label f's pair |
    | `prompt_labels` | (B, F) 1 present, 0 absent, -100 unknown |

    The prompt keys exist only with `prompt_labels`; row 2f is the positive prompt. Whole entities are hidden, every
    word piece of them, at least one in each text that has one; in a text without entities one whole word is.
    `entity_mask` marks the findings, diseases and devices that are present or uncertain, or all but the special tokens
    where a text has none. A text longer than `max_length` is cut, with one warning, and an entity not whole any more is
    left alone.

    Args:
        processor: Has `image_processor` and a fast `tokenizer` with a mask token.
        num_patches: N, patch tokens of one image.
        mlm_masking: "entity", or "random" for whole words at random that make up as many tokens.
        mlm_ratio: Share of a text's entities that is hidden, in (0, 1].
        prompt_labels: Labels for which each batch carries a prompt pair.
        max_length: Tokens of a text at most; the tokenizer's `model_max_length` when None.
        augmentation: What its draws are made for.
    """

    def __init__(
        self,
        processor,
        num_patches: int,
        mlm_masking: str = "entity",
        mlm_ratio: float = 0.5,
        prompt_labels: Sequence[str] = (),
        max_length: int | None = None,
        augmentation: RadiographAugmentation | None = None,
    ):
        tokenizer = processor.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which entity masking "
                "needs. Load the fast one, for example with AutoTokenizer."
            )
        if tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token; add one, or take a BERT-like tokenizer.")
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token; set tokenizer.pad_token.")
        if mlm_masking not in ("entity", "random"):
            raise ValueError(f"mlm_masking is {mlm_masking!r}, expected 'entity' or 'random'.")
        if not 0 < mlm_ratio <= 1:
            raise ValueError(f"mlm_ratio is {mlm_ratio}, expected a share in (0, 1]. mlm_weight 0 switches EntMLM off.")
        if num_patches < 1:
            raise ValueError(f"num_patches is {num_patches}, expected at least 1.")
        max_length = max_length if max_length is not None else tokenizer.model_max_length
        if not 3 <= max_length <= 1_000_000:
            raise ValueError(
                f"Texts may be {max_length} tokens long, expected 3 to 1,000,000; "
                "give max_length, as the tokenizer states none that can be used."
            )
        self.processor = processor
        self.num_patches = num_patches
        self.mlm_masking = mlm_masking
        self.mlm_ratio = mlm_ratio
        self.max_length = max_length
        self.augmentation = augmentation
        self.prompt_labels = tuple(canonical_label(label, where="prompt_labels") for label in prompt_labels)
        self._prompt_pairs = [
            list(zip(positive_prompts(label), negative_prompts(label), strict=True)) for label in self.prompt_labels
        ]

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        texts = [sample["text"] for sample in samples]
        encoded = self._tokenize(texts)
        input_ids, special = encoded["input_ids"], encoded["special_tokens_mask"].astype(bool)  # (B, T)
        hidden = np.zeros_like(special)
        entity_mask = np.zeros_like(special)
        mim_noise = np.empty((len(samples), self.num_patches), dtype=np.float32)
        for row, sample in enumerate(samples):
            generator = sample_generator(sample["sample_seed"], COLLATOR_STREAM)
            mim_noise[row] = generator.random(self.num_patches, dtype=np.float32)
            words = _TokenWords(sample["text"], encoded["offset_mapping"][row], special[row])
            hidden[row] = self._hidden_tokens(words, sample["entities"], generator)
            entity_mask[row] = words.tokens_of_entities(
                entity for entity in sample["entities"] if entity.kind in LABEL_KINDS and entity.assertion != "absent"
            )
            if not entity_mask[row].any():
                entity_mask[row] = ~special[row]
        batch = {
            **self._images(samples),
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(encoded["attention_mask"]),
            "input_ids_masked": torch.from_numpy(np.where(hidden, self.processor.tokenizer.mask_token_id, input_ids)),
            "mlm_labels": torch.from_numpy(np.where(hidden, input_ids, IGNORE)),
            "entity_mask": torch.from_numpy(entity_mask),
            "group_ids": torch.tensor([group_id(text) for text in texts], dtype=torch.int64),
            "mim_noise": torch.from_numpy(mim_noise),
        }
        if self.augmentation is not None and not self.augmentation.is_off:
            generators = [sample_generator(sample["sample_seed"], AUGMENTATION_STREAM) for sample in samples]
            draws = np.stack([self.augmentation.draw(generator) for generator in generators])
            batch["augmentation_draws"] = torch.from_numpy(draws)
        if self.prompt_labels:
            batch.update(self._prompts(samples))
        return batch

    def _tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask`, `special_tokens_mask` (B, T) int64 and `offset_mapping` (B, T, 2)."""
        encoded = self.processor.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        if any(encoding.overflowing for encoding in encoded.encodings):
            logger.warning_once(f"Texts longer than {self.max_length} tokens are cut to that length.")
        names = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping")
        return {name: np.asarray(encoded[name], dtype=np.int64) for name in names}

    def _images(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        has_image = torch.tensor([sample["image"] is not None for sample in samples])
        images = [sample["image"] for sample in samples if sample["image"] is not None]
        # a batch of texts alone still needs the shape
        shown = images or [Image.new("L", (8, 8))]
        found = self.processor.image_processor(images=shown, return_tensors="pt")["pixel_values"]
        if len(images) == len(samples):
            return {"pixel_values": found, "has_image": has_image}
        pixel_values = found.new_zeros((len(samples), *found.shape[1:]))
        if images:
            pixel_values[has_image] = found
        return {"pixel_values": pixel_values, "has_image": has_image}

    def _hidden_tokens(
        self, words: "_TokenWords", entities: Sequence[Entity], generator: np.random.Generator
    ) -> np.ndarray:
        """(T,) bool: the tokens of one text that EntMLM hides."""
        spans = [found for entity in entities if (found := words.whole_words(entity)) is not None]
        if spans:
            count = max(1, round(self.mlm_ratio * len(spans)))
            chosen = np.concatenate([spans[i] for i in generator.permutation(len(spans))[:count]])
        else:
            chosen = words.draw(1, generator)
        hidden = words.tokens(chosen)
        if self.mlm_masking == "random":
            hidden = words.tokens(words.draw(int(hidden.sum()), generator))
        return hidden

    def _prompts(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        generator = sample_generator(samples[0]["sample_seed"], BATCH_STREAM)
        texts = [text for pairs in self._prompt_pairs for text in pairs[generator.integers(len(pairs))]]
        encoded = self._tokenize(texts)
        labels = torch.full((len(samples), len(self.prompt_labels)), float(IGNORE))
        for row, sample in enumerate(samples):
            for column, label in enumerate(self.prompt_labels):
                if label in sample["present"]:
                    labels[row, column] = 1.0
                elif label in sample["absent"]:
                    labels[row, column] = 0.0
        return {
            "prompt_input_ids": torch.from_numpy(encoded["input_ids"]),
            "prompt_attention_mask": torch.from_numpy(encoded["attention_mask"]),
            "prompt_labels": labels,
        }


class _TokenWords:
    """Which words of one text its tokens belong to, for any tokenizer that gives character offsets.

    A word is a run of letters, digits and underscores, or one other sign. `token_word` (T,) holds its number, -1 for
    special tokens; `whole` lists the words of which no piece was cut off.
    """

    def __init__(self, text: str, offsets: np.ndarray, special: np.ndarray):
        matches = [match.span() for match in _WORD.finditer(text)]
        # blanks count to the word after them: some tokenizers put the blank into the token
        self.char_word = np.full(len(text) + 1, len(matches))
        begin = 0
        for number, (_, end) in enumerate(matches):
            self.char_word[begin:end] = number
            begin = end
        kept = ~special & (offsets[:, 1] > offsets[:, 0])
        self.token_word = np.where(kept, self.char_word[np.minimum(offsets[:, 0], len(text))], -1)
        self.token_word[self.token_word == len(matches)] = -1
        ends = np.array([end for _, end in matches], dtype=np.int64)
        reached = int(offsets[kept, 1].max()) if kept.any() else 0
        is_letters = np.array([text[end - 1].isalnum() for _, end in matches], dtype=bool)
        present = np.zeros(len(matches), dtype=bool)
        present[self.token_word[self.token_word >= 0]] = True
        self.is_whole = present & (ends <= reached)
        self.whole = np.flatnonzero(self.is_whole)
        self._letters = np.flatnonzero(self.is_whole & is_letters)

    def whole_words(self, entity: Entity) -> np.ndarray | None:
        """Numbers of the words that `entity` touches; None when one of them was cut off."""
        first, last = self.char_word[entity.start], self.char_word[entity.end - 1]
        if last >= len(self.is_whole) or not self.is_whole[first : last + 1].all():
            return None
        return np.arange(first, last + 1)

    def tokens(self, words: np.ndarray) -> np.ndarray:
        """(T,) bool: every token of the given words."""
        chosen = np.zeros(len(self.is_whole) + 1, dtype=bool)  # the last is that of special tokens, number -1
        chosen[words] = True
        return chosen[self.token_word]

    def tokens_of_entities(self, entities) -> np.ndarray:
        spans = [found for entity in entities if (found := self.whole_words(entity)) is not None]
        return self.tokens(np.concatenate(spans)) if spans else np.zeros(len(self.token_word), dtype=bool)

    def draw(self, num_tokens: int, generator: np.random.Generator) -> np.ndarray:
        """Random whole words, until they hold at least `num_tokens` tokens; signs only in a text of nothing else."""
        order = generator.permutation(self._letters if len(self._letters) else self.whole)
        tokens_of = np.bincount(self.token_word[self.token_word >= 0], minlength=len(self.is_whole))
        held = np.cumsum(tokens_of[order])
        return order[: int(np.searchsorted(held, num_tokens)) + 1]


def group_id(text: str) -> int:
    """Stable number of 63 bits for a text; case and the amount of blanks do not matter."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
