"""Samples -> batch. All randomness of masks and augmentation is drawn here, from each sample's (seed, epoch, index)."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..text.entities import Entity
from ..text.masking import MASKING_COUNTS, TokenWords
from ..text.prompts import attribute_nouns, has_side, negative_prompts, positive_prompts, statement
from ..text.vocabulary import KINDS, LABEL_KINDS, canonical_label
from .augmentation import RadiographAugmentation
from .dataset import AUGMENTATION_STREAM, BATCH_STREAM, COLLATOR_STREAM, sample_generator


logger = logging.get_logger(__name__)
IGNORE = -100


class MMCLIPCollator:
    """Makes samples of `MMCLIPDataset` one batch; its keys are the arguments of `MMCLIPForPreTraining.forward`.

    Three keys are not, and go no further than `MMCLIPTrainer`: `augmentation_draws` (B, 9), there when `augmentation`
    changes anything, with which it augments the images where the batch then is; and with `for_trainer` the
    `masking_counts` (B, 7) int64, columns as in `MASKING_COUNTS`, that it logs, and the `row_ids`, a list of B texts
    that an error names.

    | key | shape, values |
    | --- | --- |
    | `pixel_values`, `has_image` | (B, C, height, width), zeros for a text-only row; (B,) bool |
    | `input_ids`, `attention_mask` | (B, T) |
    | `input_ids_masked`, `mlm_labels` | (B, T); hidden tokens are [MASK] in one, themselves in the other, else -100 |
    | `entity_mask` | (B, T) bool, what the text says is there (see below) |
    | `group_ids` | (B,) int64, equal for texts that differ in case and blanks at most |
    | `mim_noise` | (B, N) uniform in [0, 1) |
    | `prompt_input_ids`, `prompt_attention_mask` | (2F + 2S, Tp), rows 2f and 2f + 1 are a pair of prompts |
    | `prompt_labels`, `side_labels` | (B, F), (B, S): 1 where the first of a pair holds, 0 the second, -100 unknown |

    The prompt keys exist only with `prompt_labels`. First come "there is X" and "there is no X" of each; then, with
    `prompt_sides`, "left X" and "right X" of the S that have sides. Whole entities are hidden, every
    word piece of them, at least one in each text that has one; in a text without entities one whole word is.
    `entity_mask` marks the findings, diseases and devices that are present or uncertain, or all but the special tokens
    where a text has none. A text longer than `max_length` is cut, with one warning, and an entity not whole any more is
    left alone.

    A hidden cue ("no", "may represent") takes the "and", "or" and "nor" of its list with it: "No effusion or edema."
    becomes "[MASK] [MASK] [MASK] edema." The list's other entities stay: whether they are there is for the image to
    say. Not closed: a cue that is hidden is one more mask than a present entity has, and a "nor" of its own acts alone.

    Args:
        processor: Has `image_processor` and a fast `tokenizer` with a mask token.
        num_patches: N, patch tokens of one image.
        mlm_masking: "entity", or "random" for whole words at random that make up as many tokens.
        mlm_ratio: Share of a text's entities that is hidden, in (0, 1].
        mlm_kinds: Kinds of entities that are hidden, all when empty. A text with none of them has others hidden.
        mlm_cue_ratio: Share, in [0, 1], of the hidden entities with a cue that have it hidden too. One draw for each
            cue, so that entities that share it agree; the entities that are hidden do not depend on it.
        prompt_labels: Labels for which each batch carries a prompt pair.
        prompt_sides: And a second one for their sides; unknown where a finding is on both sides or absent.
        max_length: Tokens of a text at most; the tokenizer's `model_max_length` when None.
        augmentation: What its draws are made for.
        for_trainer: Add `masking_counts` and `row_ids`.
    """

    def __init__(
        self,
        processor,
        num_patches: int,
        mlm_masking: str = "entity",
        mlm_ratio: float = 0.5,
        mlm_kinds: Sequence[str] = (),
        mlm_cue_ratio: float = 0.0,
        prompt_labels: Sequence[str] = (),
        prompt_sides: bool = False,
        max_length: int | None = None,
        augmentation: RadiographAugmentation | None = None,
        for_trainer: bool = False,
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
        if unknown := [kind for kind in mlm_kinds if kind not in KINDS]:
            raise ValueError(f"mlm_kinds: unknown kind {unknown[0]!r}, expected some of {', '.join(KINDS)}.")
        if not 0 <= mlm_cue_ratio <= 1:
            raise ValueError(f"mlm_cue_ratio is {mlm_cue_ratio}, expected a share in [0, 1].")
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
        self.mlm_kinds = tuple(mlm_kinds)
        self.mlm_cue_ratio = mlm_cue_ratio
        self.max_length = max_length
        self.augmentation = augmentation
        self.for_trainer = for_trainer
        self._special_ids = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        self.prompt_labels = tuple(canonical_label(label, where="prompt_labels") for label in prompt_labels)
        self._prompt_pairs = [
            list(zip(positive_prompts(label), negative_prompts(label), strict=True)) for label in self.prompt_labels
        ]
        self.side_labels = tuple(label for label in self.prompt_labels if prompt_sides and has_side(label))
        self._prompt_pairs += [
            [
                tuple(map(statement, nouns))
                for nouns in zip(*(attribute_nouns(label, side, None) for side in ("left", "right")), strict=True)
            ]
            for label in self.side_labels
        ]

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        texts = [sample["text"] for sample in samples]
        encoded, cuts = self._tokenize(texts)
        input_ids = encoded["input_ids"]  # (B, T)
        # a text may hold "[SEP]" itself, which tokenizers take for their own
        special = encoded["special_tokens_mask"].astype(bool) | np.isin(input_ids, self._special_ids)
        hidden = np.zeros_like(special)
        entity_mask = np.zeros_like(special)
        mim_noise = np.empty((len(samples), self.num_patches), dtype=np.float32)
        counts = np.empty((len(samples), len(MASKING_COUNTS)), dtype=np.int64)
        for row, sample in enumerate(samples):
            generator = sample_generator(sample["sample_seed"], COLLATOR_STREAM)
            mim_noise[row] = generator.random(self.num_patches, dtype=np.float32)
            words = TokenWords(sample["text"], encoded["offset_mapping"][row], special[row], *cuts[row])
            entities = sample["entities"]
            spans = words.spans([(entity.start, entity.end) for entity in entities])
            whole = [(entity, span) for entity, span in zip(entities, spans, strict=True) if span is not None]
            hidden[row], counts[row] = self._hidden_tokens(words, whole, generator)
            named = [span for entity, span in whole if entity.kind in LABEL_KINDS and entity.assertion != "absent"]
            entity_mask[row] = words.tokens(named) if named else ~special[row]
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
        if self.for_trainer:
            batch["masking_counts"] = torch.from_numpy(counts)
            batch["row_ids"] = [sample["row_id"] for sample in samples]
        if self.augmentation is not None and not self.augmentation.is_off:
            generators = [sample_generator(sample["sample_seed"], AUGMENTATION_STREAM) for sample in samples]
            draws = np.stack([self.augmentation.draw(generator) for generator in generators])
            batch["augmentation_draws"] = torch.from_numpy(draws)
        if self.prompt_labels:
            batch.update(self._prompts(samples))
        return batch

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, np.ndarray], list[tuple]]:
        """`input_ids`, `attention_mask`, `special_tokens_mask` (B, T) int64 and `offset_mapping` (B, T, 2); and for
        each text the offsets of the tokens cut off right before and right after the others, None where none was."""
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        cuts = []
        for encoding in encoded.encodings:
            cuts.append((None, None))
            if rest := encoding.overflowing:
                logger.warning_once(f"Texts longer than {self.max_length} tokens are cut to that length.")
                pairs = zip(rest[0].offsets, rest[0].special_tokens_mask, strict=True)
                lost = [offsets for offsets, special in pairs if not special]
                cuts[-1] = (lost[-1], None) if tokenizer.truncation_side == "left" else (None, lost[0])
        names = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping")
        return {name: np.asarray(encoded[name], dtype=np.int64) for name in names}, cuts

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
        self, words: TokenWords, whole: list[tuple[Entity, slice]], generator: np.random.Generator
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """(T,) bool: the tokens of one text that EntMLM hides, of the entities and their words or others; and the
        numbers of `MASKING_COUNTS`."""
        candidates = [pair for pair in whole if pair[0].kind in self.mlm_kinds] or whole
        num_entities = num_cued = num_hidden_cues = 0
        if candidates:
            num_entities = max(1, round(self.mlm_ratio * len(candidates)))
            chosen = [candidates[i] for i in generator.permutation(len(candidates))[:num_entities]]
            indices = [span for _, span in chosen]
            if self.mlm_cue_ratio > 0:
                cues, num_cued, num_hidden_cues = self._hidden_cues(words, whole, chosen, generator)
                indices += cues
        else:
            indices = [words.draw(1, generator)]
        hidden = words.tokens(indices)
        if self.mlm_masking == "random":
            hidden = words.tokens([words.draw(int(hidden.sum()), generator)])
            num_entities = num_cued = num_hidden_cues = 0
        num_tokens = int(np.count_nonzero(words.token_word >= 0))
        num_hidden = int(np.count_nonzero(hidden))
        return hidden, (1, num_tokens, num_hidden, int(bool(candidates)), num_entities, num_cued, num_hidden_cues)

    def _hidden_cues(
        self,
        words: TokenWords,
        whole: list[tuple[Entity, slice]],
        chosen: list[tuple[Entity, slice]],
        generator: np.random.Generator,
    ) -> tuple[list, int, int]:
        """Words to hide beside the chosen entities; how many of these have a cue, and how many one that is hidden."""
        cued = defaultdict(int)  # cue -> number of entities that are hidden under it
        for entity, _ in chosen:
            if entity.cue_start is not None:
                cued[entity.cue_start, entity.cue_end] += 1
        in_text = [(cue, span) for cue, span in zip(cued, words.spans(list(cued)), strict=True) if span is not None]
        indices, num_hidden = [], 0
        for (cue, span), draw in zip(in_text, generator.random(len(in_text)), strict=True):
            if draw < self.mlm_cue_ratio:
                num_hidden += cued[cue]
                under = [entity for entity, _ in whole if (entity.cue_start, entity.cue_end) == cue]
                start = min(cue[0], *(entity.start for entity in under))
                end = max(cue[1], *(entity.end for entity in under))
                indices += [span, words.coordinators(start, end, [span for _, span in whole])]
        return indices, sum(cued[cue] for cue, _ in in_text), num_hidden

    def _prompts(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        generator = sample_generator(samples[0]["sample_seed"], BATCH_STREAM)
        texts = [text for pairs in self._prompt_pairs for text in pairs[generator.integers(len(pairs))]]
        encoded, _ = self._tokenize(texts)
        labels = torch.full((len(samples), len(self.prompt_labels)), float(IGNORE))
        sides = torch.full((len(samples), len(self.side_labels)), float(IGNORE))
        for row, sample in enumerate(samples):
            for column, label in enumerate(self.prompt_labels):
                if label in sample["present"]:
                    labels[row, column] = 1.0
                elif label in sample["absent"]:
                    labels[row, column] = 0.0
            for column, label in enumerate(self.side_labels):
                side = sample["sides"].get(label)
                if side in ("left", "right"):
                    sides[row, column] = float(side == "left")
        return {
            "prompt_input_ids": torch.from_numpy(encoded["input_ids"]),
            "prompt_attention_mask": torch.from_numpy(encoded["attention_mask"]),
            "prompt_labels": labels,
            "side_labels": sides,
        }


def group_id(text: str) -> int:
    """Stable number of 63 bits for a text; case and the amount of blanks do not matter."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
