"""Saved models for evaluation: is it one, is it whole, and its model and processor."""

import os
import re
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging


logger = logging.get_logger(__name__)


def check_checkpoint(path: str | os.PathLike, option: str = "--model") -> None:
    """Raises `ValueError`, beginning with `option`, for a folder without a model or without its processor.

    What looks like OWNER/NAME, and has no folder OWNER here, is a Hub id and passes.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.exists():
        return
    for name, part in (("config.json", "model"), ("processor_config.json", "processor")):
        if not (Path(path) / name).is_file():
            raise ValueError(
                f"{option}: {path} has no {name}, so it holds no {part}. Give the folder of a saved model and its "
                "processor, X/checkpoint, or a Hub id, OWNER/NAME."
            )


def load_whole(model_class, path: str | os.PathLike, **options):
    """`model_class.from_pretrained(path)`; raises `ValueError` where the checkpoint lacks weights of it.

    Those would be made up at random, and differently at each loading. Weights that it has no place for, other than
    those of the heads of other MMCLIP classes, are named in a warning.
    """
    model, info = model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    if lacking := sorted({*info["missing_keys"], *mismatched}):
        raise ValueError(
            f"{path}: {len(lacking)} weights are missing or of another size, as {', '.join(lacking[:3])}. It is no "
            "whole MMCLIP: a fine-tuned classifier, for example, has no text tower. Give a checkpoint of pretraining, "
            "as run_pretrain.py saves it."
        )
    if extra := sorted(info["unexpected_keys"]):
        logger.warning(
            f"{path}: {len(extra)} weights have no place in MMCLIP and are left out, as {', '.join(extra[:3])}."
        )
    return model


def load_checkpoint(path: str | os.PathLike, device: str | torch.device):
    """(model, processor) of a checkpoint, on `device` and in eval mode. Runs the code that lies in it."""
    model = load_whole(AutoModel, path, trust_remote_code=True).to(device).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True)
