"""A saved MMCLIP for use, from a folder or the Hub, by the classes of this package: no code of the folder is run."""

import os

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig

from ..evaluation.checkpoints import check_checkpoint, load_whole
from ..modeling_mmclip import MMCLIPModel
from ..processing_mmclip import MMCLIPProcessor


def load_model(
    name: str | os.PathLike, revision: str | None = None, device: str | torch.device | None = None
) -> tuple[MMCLIPModel, MMCLIPProcessor]:
    """(model, processor) of a folder or a Hub id `OWNER/NAME`, in eval mode on `device` (a GPU where there is one).

    `revision` is a branch, tag or commit of a Hub repository. Raises `ValueError`, saying what to do, for what is no
    MMCLIP, cannot be reached or read, or lacks weights; weights that MMCLIP has no place for are named in a warning.
    """
    name = os.fspath(name)
    check_checkpoint(name, "model")
    if revision is not None and os.path.isdir(name):
        raise ValueError(f"model: {name} is a folder, which has no revision {revision!r}; leave the revision out.")
    source = {"revision": revision} if revision is not None else {}
    device = _checked_device(device)
    try:
        found = PretrainedConfig.get_config_dict(name, **source)[0].get("model_type")
        if found != "mmclip":
            raise ValueError(f"model: {name} holds a model of the type {found!r}, expected 'mmclip'.")
        model = load_whole(MMCLIPModel, name, **source)
        processor = MMCLIPProcessor.from_pretrained(name, trust_remote_code=False, **source)  # else it would ask
    except (OSError, SafetensorError, StrictDataclassError) as error:
        is_taken = revision is None and not os.path.isdir(name)
        here = " (there is no such folder here, so it was taken for a Hub id)" if is_taken else ""
        raise ValueError(f"model: {name}{here} cannot be loaded: {_first_lines(error)}") from error
    model.processor = processor  # checks that they fit; `encode` would look for one without the revision
    return model.to(device).eval(), processor


def _checked_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device} cannot be used here: {_first_lines(error)}") from error
    return device


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:400]
