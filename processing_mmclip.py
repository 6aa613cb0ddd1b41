"""Images and reports -> `pixel_values`, `input_ids`, `attention_mask`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .configuration_mmclip import max_text_length
from .image_processing_mmclip import MMCLIPImageProcessor, MMCLIPImageProcessorKwargs


logger = logging.get_logger(__name__)

IMAGE_OPTIONS = frozenset(MMCLIPImageProcessorKwargs.__annotations__) - {"return_tensors"}
TEXT_OPTIONS = frozenset(
    "add_special_tokens padding padding_side pad_to_multiple_of truncation max_length stride verbose "
    "return_attention_mask return_length return_offsets_mapping return_overflowing_tokens return_special_tokens_mask "
    "return_token_type_ids".split()
)


def default_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that lies beside this file, made by `python -m MMCLIP.text.build_tokenizer` from our own words."""
    folder = Path(__file__).resolve().parent
    tokenizer_file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (tokenizer_file.is_file() and config_file.is_file()):
        raise ValueError(
            f"expected tokenizer.json and tokenizer_config.json beside {Path(__file__).name}, but {folder} lacks them "
            "(code loaded from the Hub is copied without them). Load the tokenizer of the saved folder, "
            "`AutoTokenizer.from_pretrained(folder)`, and pass it as `tokenizer`, or load `AutoProcessor` instead."
        )
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    for name in ("tokenizer_class", "backend"):
        settings.pop(name, None)
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **settings)


class MMCLIPProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer behind one call.

    image_processor ([`MMCLIPImageProcessor`], *optional*):
        Defaults to one with its default options (224 x 224).
    tokenizer ([`PreTrainedTokenizerBase`], *optional*):
        Any tokenizer with `[MASK]` and padding tokens. Defaults to the one shipped with this file.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        image_processor = MMCLIPImageProcessor() if image_processor is None else image_processor
        tokenizer = default_tokenizer() if tokenizer is None else tokenizer
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """`images` to `pixel_values` (B, 1, height, width), `text` to `input_ids` and `attention_mask` (B, T).

        Images are whatever `load_grayscale` reads, one or a list; texts a string or a list, none of them blank. Either
        may be left out. Texts are padded to the longest and cut to the tokenizer's `model_max_length`; the first cut
        is told by a warning. `return_tensors` defaults to "pt". Other options of the image processor
        (`size`, `do_pad`, ...) and of the tokenizer (`padding`, `max_length`, `return_offsets_mapping`, ...) hold for
        this call, flat or in `images_kwargs` and `text_kwargs`; an unknown one raises `TypeError`, one that is given
        both ways `ValueError`.
        """
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs `images`, `text` or both, got neither.")
        kwargs = {**(kwargs.pop("common_kwargs", None) or {}), **kwargs}
        return_tensors = kwargs.pop("return_tensors", "pt")
        image_options = dict(kwargs.pop("images_kwargs", None) or {})
        text_options = dict(kwargs.pop("text_kwargs", None) or {})
        for group in ("audio_kwargs", "videos_kwargs"):  # sentence-transformers gives them to every processor
            kwargs.pop(group, None)
        for name, value in kwargs.items():
            if name not in IMAGE_OPTIONS and name not in TEXT_OPTIONS:
                raise TypeError(
                    f"{type(self).__name__} knows no option {name}; images take {', '.join(sorted(IMAGE_OPTIONS))}, "
                    f"texts take {', '.join(sorted(TEXT_OPTIONS))}."
                )
            options, group = (image_options, "images") if name in IMAGE_OPTIONS else (text_options, "text")
            if name in options:
                raise ValueError(f"`{name}` is given twice, in `{group}_kwargs` and beside it. Leave one of them out.")
            options[name] = value

        data = {}
        if images is not None:
            data.update(self.image_processor(images, **{"return_tensors": return_tensors, **image_options}))
        if text is not None:
            data.update(self._tokenize(text, {"return_tensors": return_tensors, **text_options}))
        return BatchFeature(data)

    def _tokenize(self, text: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else list(text)
        for index, entry in enumerate(texts):
            if not isinstance(entry, str):
                raise ValueError(f"text {index}: expected a string, got {type(entry).__name__}.")
            if not entry.strip():
                raise ValueError(f"text {index}: expected words, got a blank text. Leave `text` out for images alone.")
        if not texts:
            raise ValueError("expected at least one text, got an empty list.")
        # two-segment ids mean nothing to a single text; ask for them where a tower wants them
        defaults = {"padding": True, "truncation": True, "return_token_type_ids": False}
        # what the tokenizer was made with, AutoTokenizer.from_pretrained(folder, max_length=77)
        made_with = self.tokenizer.init_kwargs
        defaults |= {name: made_with[name] for name in ("padding", "max_length", "truncation") if name in made_with}
        options = {**defaults, **options}
        encoded = self.tokenizer(texts, **options)
        if options["truncation"]:
            self._warn_of_truncation(texts, encoded, options)
        return dict(encoded)

    def _warn_of_truncation(self, texts: list[str], encoded: Any, options: dict[str, Any]) -> None:
        """Warns once per processor when a text was cut. Only a text that fills the limit is tokenized again."""
        limit = options.get("max_length") or self.tokenizer.model_max_length
        if getattr(self, "_told_truncation", False) or limit > np.shape(encoded["input_ids"][0])[0]:
            return
        for index, entry in enumerate(texts):
            length = len(self.tokenizer(entry, verbose=False)["input_ids"])
            if length > limit:
                logger.warning(
                    f"text {index} of a call has {length} tokens and was cut to the first {limit}; "
                    "later texts over the limit are cut without another warning."
                )
                self._told_truncation = True
                return

    def check_tokenizer(self, config: Any) -> None:
        """Raises `ValueError` when the tokenizer does not fit the text tower of `config` (or a text config itself), or
        the one channel of the images not its vision tower."""
        num_channels = getattr(getattr(config, "vision_config", None), "num_channels", 1)
        if num_channels != 1:
            raise ValueError(
                f"the images have one channel, but the vision tower takes {num_channels}. Set `num_channels` of "
                "`vision_config` to 1; from_vision_text_pretrained folds the kernel of a pretrained tower by itself."
            )
        text_config = getattr(config, "text_config", config)
        tokenizer = self.tokenizer
        if len(tokenizer) > text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, more than the text tower's vocab_size of "
                f"{text_config.vocab_size}. Use the tokenizer of that tower, or set text_config.vocab_size."
            )
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token, which EntMLM needs. Use one of a BERT-like model.")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token. Set `tokenizer.pad_token`.")
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # what AutoTokenizer makes of a folder with a model and no tokenizer
            raise ValueError(
                "the tokenizer has special tokens only, so every word would be unknown. Save the tokenizer of the text "
                "tower into its folder, or name another one."
            )
        pad_token_id = getattr(text_config, "pad_token_id", None)
        if pad_token_id is not None and tokenizer.pad_token_id != pad_token_id:
            raise ValueError(
                f"the tokenizer pads with id {tokenizer.pad_token_id}, the text tower with pad_token_id "
                f"{pad_token_id}. Use the tokenizer of that tower, or set text_config.pad_token_id."
            )
        limit = max_text_length(text_config)
        if limit is not None and tokenizer.model_max_length > limit:
            raise ValueError(
                f"the tokenizer's model_max_length is {tokenizer.model_max_length}, but the text tower has only "
                f"max_position_embeddings for {limit}. Set `processor.tokenizer.model_max_length = {limit}`."
            )

    def resize_heatmap(self, attention: Any, original_size: tuple[int, int], smooth: bool = True) -> np.ndarray:
        """Lays (N,) or (rows, columns) patch values over the image they came from, see the image processor."""
        return self.image_processor.resize_heatmap(attention, original_size, smooth)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]


MMCLIPProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MMCLIPProcessor", "default_tokenizer"]
