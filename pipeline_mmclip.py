"""The pipeline "fill-mask-with-image": EntMLM names the hidden words of a report with the help of the image."""

from typing import Any

import torch
from transformers.pipelines import Pipeline


TASK = "fill-mask-with-image"
# what a config.json says of it, so that a saved folder brings its pipeline with it
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_mmclip.FillMaskWithImagePipeline",
        "pt": ["AutoModelForPreTraining"],
        "type": "multimodal",
    }
}


class FillMaskWithImagePipeline(Pipeline):
    """Words for the `[MASK]`s of a report, given its X-ray: `pipe("xray.png", "There is a [MASK] effusion.")`.

    The model is an [`MMCLIPForPreTraining`] with `mlm_weight` above 0. EntMLM was trained to rebuild whole entities: a
    mask stands for one token of the tokenizer, so hide a longer word with as many masks as it has tokens.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, model, *args, **kwargs):
        architectures = getattr(model.config, "architectures", None) or [type(model).__name__]
        if getattr(model, "mlm_head", None) is None or "MMCLIPForPreTraining" not in architectures:
            raise ValueError(
                f"{TASK} needs a checkpoint of MMCLIPForPreTraining with `mlm_weight` above 0, which holds the EntMLM "
                f"decoder, but this one is of {', '.join(architectures)}. Give the checkpoint of a pretraining run."
            )
        super().__init__(model, *args, **kwargs)
        if self.processor is None:
            raise ValueError(f"{TASK} needs the processor of the model: pass `processor`.")

    def __call__(self, image: Any = None, text: str | list[str] | None = None, **kwargs):
        """The `top_k` most probable words for each mask.

        Args:
            image: Whatever the processor reads, 16-bit files and DICOM too; None asks the text alone. A list goes with
                a list of texts of its length. Or one dict, or a list of them, with `image` and `text`.
            text: A report, or a list of reports, each with one `[MASK]` or more.
            top_k (`int`, *optional*, defaults to 5): How many words.
            targets (`list[str]`, *optional*): Only these words, each one token; their scores are not rescaled.
            batch_size (`int`, *optional*, defaults to 1): Reports that go through the model together.

        Returns a list of dicts with `score` (the probability among all words), `token`, `token_str` and `sequence` (the
        report with this word in place of the mask); a list of such lists where a report has several masks, and a list
        over reports where a list is given. Raises `ValueError` for a text without a mask or with one beyond the length
        of the text tower, and for a target of several tokens.
        """
        if text is None:
            return super().__call__(image, **kwargs)
        if isinstance(text, str):
            if isinstance(image, (list, tuple)):
                raise ValueError(f"{TASK} got a list of {len(image)} images and one text; give a list of texts too.")
            return super().__call__({"image": image, "text": text}, **kwargs)
        images = image if isinstance(image, (list, tuple)) else [image] * len(text)
        if len(images) != len(text):
            raise ValueError(f"{TASK} got {len(images)} images and {len(text)} texts; give one image, or one for each.")
        if not text:
            return []
        pairs = zip(images, text, strict=True)
        return super().__call__([{"image": one, "text": report} for one, report in pairs], **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, targets: list[str] | None = None):
        options = {}
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"`top_k` must be 1 or more, got {top_k}.")
            options["top_k"] = top_k
        if targets is not None:
            options["targets"] = self._target_ids([targets] if isinstance(targets, str) else targets)
        return {}, {}, options

    def _target_ids(self, targets: list[str]) -> list[int]:
        ids = []
        for target in targets:
            pieces = self.processor.tokenizer(target, add_special_tokens=False)["input_ids"]
            if len(pieces) != 1 or pieces[0] == self.processor.tokenizer.unk_token_id:
                words = self.processor.tokenizer.convert_ids_to_tokens(pieces)
                raise ValueError(f"a target must be one token that the model knows, but {target!r} is {words}.")
            ids.append(pieces[0])
        return list(dict.fromkeys(ids))

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, dict) or not isinstance(inputs.get("text"), str):
            raise ValueError(f"{TASK} needs `text`, a report with a mask, and `image`: pipe(image, text).")
        text, image = inputs["text"], inputs.get("image")
        tokenizer = self.processor.tokenizer
        encoded = dict(self.processor(text=text))
        whole, limit = tokenizer(text, verbose=False)["input_ids"], tokenizer.model_max_length
        num_masks = whole.count(tokenizer.mask_token_id)
        if num_masks == 0 or (encoded["input_ids"] == tokenizer.mask_token_id).sum() < num_masks:
            beyond = f"stands beyond the {limit} of its {len(whole)} tokens that are read"
            reason = beyond if num_masks else "is missing"
            raise ValueError(
                f"the text must have a {tokenizer.mask_token} in place of the hidden word, but it {reason}."
            )
        # the head reads the pixels of an image that is not there as little as those of a text-only row in training
        size = self.processor.image_processor.size
        blank = torch.zeros(1, 1, size["height"], size["width"])
        pixel_values = blank if image is None else self.processor(images=image)["pixel_values"]
        return {**encoded, "pixel_values": pixel_values, "has_image": torch.tensor([image is not None])}

    def _forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        input_ids, pixel_values = inputs["input_ids"], inputs["pixel_values"].to(self.model.dtype)
        # no patch is hidden, so nothing is drawn at random
        hidden = torch.zeros(len(input_ids), self.model.num_patches, dtype=torch.bool, device=input_ids.device)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=inputs["attention_mask"],
            pixel_values=pixel_values,
            has_image=inputs["has_image"],
            input_ids_masked=input_ids,
            bool_masked_pos=hidden,
        )
        return {"input_ids": input_ids, "mlm_logits": outputs.mlm_logits}  # (B, T), (B, T, vocab)

    def postprocess(self, outputs: dict[str, torch.Tensor], top_k: int = 5, targets: list[int] | None = None):
        tokenizer = self.processor.tokenizer
        input_ids = outputs["input_ids"][0]
        probabilities = outputs["mlm_logits"][0].float().softmax(dim=-1)[:, : len(tokenizer)]
        places = (input_ids == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
        special = torch.tensor(sorted({*tokenizer.all_special_ids} - {tokenizer.mask_token_id}))
        answers = []
        for place in places:
            allowed = torch.arange(probabilities.shape[1]) if targets is None else torch.tensor(targets)
            scores, order = probabilities[place, allowed].topk(min(top_k, len(allowed)))
            answers.append([])
            for score, token in zip(scores.tolist(), allowed[order].tolist(), strict=True):
                filled = input_ids.clone()
                filled[place] = token
                sequence = tokenizer.decode(filled[~torch.isin(filled, special)])  # other masks stay visible
                word = tokenizer.decode([token])
                answers[-1].append({"score": score, "token": token, "token_str": word, "sequence": sequence})
        return answers[0] if len(answers) == 1 else answers


__all__ = ["CUSTOM_PIPELINES", "TASK", "FillMaskWithImagePipeline"]
