"""Tiny models for every test, and a home of its own for caches, so that no test reads what another run left."""

import os
from pathlib import Path

import pytest
import torch
from MMCLIP.configuration_mmclip import MMCLIPConfig
from MMCLIP.modeling_mmclip import MMCLIPModel
from MMCLIP.processing_mmclip import MMCLIPImageProcessor, MMCLIPProcessor


os.environ.setdefault("HF_HUB_OFFLINE", "1")


def tiny_config(vocab_size: int = 100, image_size: int = 32, **fields) -> MMCLIPConfig:
    """4 x 4 patches, two layers, 32 wide: a model of 100 thousand parameters. Every loss counts, for every row."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    fields = {
        "vision_config": {
            "model_type": "vit", "num_channels": 1, "image_size": image_size, "patch_size": image_size // 4, **shape,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "text_config": {
            "model_type": "bert", "vocab_size": vocab_size, "max_position_embeddings": 64, **shape,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "projection_dim": 16,
        "decoder_hidden_size": 24,
        "decoder_num_heads": 2,
        **dict.fromkeys(("mim_weight", "mlm_weight", "prompt_weight", "local_weight", "side_weight"), 1.0),
        "mim_row_ratio": 1.0, "mlm_row_ratio": 1.0,
        **fields,
    }  # fmt: skip
    return MMCLIPConfig(**fields)


def tiny_processor() -> MMCLIPProcessor:
    """What fits [`tiny_config`], with the vocabulary of its tokenizer: images of 32 pixels, texts of 64 tokens."""
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=32))
    processor.tokenizer.model_max_length = 64
    return processor


def save_tiny(folder: Path, seed: int = 0, **fields) -> Path:
    """A model that is not trained, and its processor, saved in `folder`."""
    processor = tiny_processor()
    torch.manual_seed(seed)
    MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer), **fields)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_batch(batch_size: int = 4, num_tokens: int = 10, num_findings: int = 3, seed: int = 0) -> dict:
    """A batch as the collator makes it: the last row has text only, two words are masked in each text."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 100, (batch_size, num_tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, -3:] = 0
    mlm_labels = torch.full_like(input_ids, -100)
    mlm_labels[:, 2:4] = input_ids[:, 2:4]
    entity_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    entity_mask[:, 2:5] = True
    has_image = torch.ones(batch_size, dtype=torch.bool)
    has_image[-1] = False
    prompt_labels = torch.randint(0, 2, (batch_size, num_findings), generator=generator).float()
    prompt_labels[0, 0] = -100
    side_labels = torch.randint(0, 2, (batch_size, 2), generator=generator).float()
    side_labels[0, 1] = -100
    num_prompts = 2 * (num_findings + 2)
    return {
        "pixel_values": torch.randn(batch_size, 1, 32, 32, generator=generator) * has_image[:, None, None, None],
        "has_image": has_image,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "input_ids_masked": input_ids.masked_fill(mlm_labels != -100, 4),
        "mlm_labels": mlm_labels,
        "entity_mask": entity_mask,
        "group_ids": torch.arange(batch_size),
        "mim_noise": torch.rand(batch_size, 16, generator=generator),
        "prompt_input_ids": torch.randint(5, 100, (num_prompts, 6), generator=generator),
        "prompt_attention_mask": torch.ones(num_prompts, 6, dtype=torch.long),
        "prompt_labels": prompt_labels,
        "side_labels": side_labels,
    }


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def batch():
    return tiny_batch()
