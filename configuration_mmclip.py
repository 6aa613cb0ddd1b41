"""MMCLIPConfig: every value that changes the weights or the forward of MMCLIP."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# Where the Auto classes find MMCLIP in a saved folder; written into every config.json.
AUTO_MAP = {
    "AutoConfig": "configuration_mmclip.MMCLIPConfig",
    "AutoModel": "modeling_mmclip.MMCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_mmclip.MMCLIPModel",
    "AutoModelForPreTraining": "modeling_mmclip.MMCLIPForPreTraining",
    "AutoModelForImageClassification": "modeling_mmclip.MMCLIPForImageClassification",
    "AutoProcessor": "processing_mmclip.MMCLIPProcessor",
    "AutoImageProcessor": "image_processing_mmclip.MMCLIPImageProcessor",
}
# ViT-B/16 on one channel, and BERT-base with the vocabulary of the tokenizer that ships with the repository.
DEFAULT_VISION_CONFIG = {"model_type": "vit", "num_channels": 1, "image_size": 224, "patch_size": 16}
DEFAULT_TEXT_CONFIG = {"model_type": "bert", "vocab_size": 6144}

# Their positions begin behind the padding id, so that many of `max_position_embeddings` are never used.
OFFSET_POSITIONS = frozenset(
    "camembert data2vec-text ibert longformer mpnet roberta roberta-prelayernorm "
    "xlm-roberta xlm-roberta-xl xmod".split()
)


def max_text_length(text_config: PretrainedConfig) -> int | None:
    """Most tokens that a text tower has positions for, special tokens included; None where there is no limit."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and getattr(text_config, "model_type", None) in OFFSET_POSITIONS:
        positions -= (text_config.pad_token_id or 0) + 1
    return positions


def _to_config(value, default: dict, name: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    fields = dict(default if value is None else value)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`{name}` needs a `model_type` that transformers knows, such as 'vit' or 'bert', but has {model_type!r}. "
            "Pass a config object or a dict with that key."
        )
    return CONFIG_MAPPING[model_type](**fields)


@strict
class MMCLIPConfig(PretrainedConfig):
    r"""
    Configuration of [`MMCLIPModel`], [`MMCLIPForPreTraining`] and [`MMCLIPForImageClassification`].

    The paper (arXiv 2407.19546) gives none of these values; each default is ours and RESULTS.md says why.

    vision_config (`PretrainedConfig` or `dict`, *optional*):
        Any AutoModel vision tower whose last hidden state holds patch tokens (B, N, H) or a feature map (B, H, h, w).
        Defaults to a one-channel ViT-B/16 at 224 px.
    text_config (`PretrainedConfig` or `dict`, *optional*):
        Any AutoModel text tower. Defaults to BERT-base with the vocabulary of the tokenizer in this repository.
    vision_stem (`str`, *optional*, defaults to `"patch"`):
        `"patch"` keeps the tower's own patch embedding; `"convolution"` puts a stack of stride-2 convolutions in its
        place (Xiao et al. 2021), which learns several times faster in small runs. Needs a patch side that is a power
        of two.
    patch_size (`int`, *optional*):
        Pixels along the side of the square that one patch token stands for. Taken from the tower when left out.
    projection_dim (`int`, *optional*, defaults to 512):
        Size of the shared image-text space.
    image_pooling, text_pooling (`str`, *optional*, defaults to `"mean"`):
        What is projected: `"mean"` of the patch (text) tokens, the first token (`"cls"`), or what the tower's own
        `"pooler"` gives, as in VisionTextDualEncoderModel; or `"max"`, a soft maximum, which lets a small lesion count
        as much as a large one, and a word as much in a long text as in a short one. Under mean and max pooling the
        projected patches lie in the same space as the texts, which is what text-to-patch attention rests on.
    logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
        Initial log of the inverse temperature, ln(1 / 0.07) as in CLIP. Clamped at ln(100) in the forward.
    decoder_hidden_size, decoder_num_layers, decoder_num_heads (`int`, *optional*, defaults to 384, 2 and 6):
        Size of the AttMIM and EntMLM decoders.
    contrastive_loss (`str`, *optional*, defaults to `"softmax"`):
        `"softmax"` as in CLIP, `"sigmoid"` of each pair by itself as in SigLIP, with a bias that is learned.
    contrastive_targets (`str`, *optional*, defaults to `"text"`):
        What makes a row of the softmax a positive of another: an equal text, or (`"labels"`) softly, as in MedCLIP, the
        likeness of their labels.
    label_temperature (`float`, *optional*, defaults to 1.0):
        Of the softmax over likenesses of labels that `contrastive_targets="labels"` takes as target.
    logit_bias_init_value (`float`, *optional*, defaults to -10.0):
        Initial bias of the sigmoid loss.
    mim_masking (`str`, *optional*, defaults to `"attention"`):
        `"attention"` hides the patches that answer the text most, `"random"` any patches.
    mim_attention (`str`, *optional*, defaults to `"similarity"`):
        What that answer is: `"similarity"` of projected patches and words, or the `"cross_attention"` of EntMLM.
    mim_level (`str`, *optional*, defaults to `"feature"`):
        `"feature"` hides patch tokens behind the tower, as the paper says; `"input"` hides pixels in front of it, as
        MAE does, which takes a second pass through the tower.
    mim_target (`str`, *optional*, defaults to `"pixel"`):
        What is rebuilt: the normalised pixels of a patch, or its patch token (`"feature"`).
    mim_text (`bool`, *optional*, defaults to `True`):
        Rebuild with the help of the text. Without it AttMIM is a masked autoencoder.
    mim_mask_ratio (`float`, *optional*, defaults to 0.5):
        Share of the patches that AttMIM hides.
    mim_attended_share (`float`, *optional*, defaults to 0.9):
        Share of the hidden patches that comes from the more attended half of the image; the rest comes from the other
        half. 0.5 ignores the attention.
    mim_row_ratio, mlm_row_ratio (`float`, *optional*, defaults to 0.125):
        Share of the rows of a batch that AttMIM and EntMLM see, its first ones. What is saved buys more steps.
    contrastive_weight, mim_weight, mlm_weight, prompt_weight, local_weight, side_weight (`float`, *optional*, defaults
        to 1, 0.5, 0.5, 4, 2 and 0.25): Factors of the image-text contrastive, AttMIM, EntMLM and disease-kind prompt
        losses in the total; the last two are the prompt losses of single patches and, beside one of these two, of
        sides. At 0 the branch is neither built nor run. RESULTS.md tells how they were found; in long
        runs a `side_weight` of 1 tells sides better, and on small data AttMIM and EntMLM cost more than they bring.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of new weights.
    training_sources (`list[str]`, *optional*):
        Names of the data sets that the weights were pretrained on, the `source` of their rows. Evaluation warns where
        these share images with what it scores.
    """

    model_type = "mmclip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PretrainedConfig | dict | None = None
    text_config: PretrainedConfig | dict | None = None
    vision_stem: str = "patch"
    patch_size: int | None = None
    projection_dim: int = 512
    image_pooling: str = "mean"
    text_pooling: str = "mean"
    logit_scale_init_value: float | int = 2.6592
    decoder_hidden_size: int = 384
    decoder_num_layers: int = 2
    decoder_num_heads: int = 6
    contrastive_loss: str = "softmax"
    contrastive_targets: str = "text"
    label_temperature: float | int = 1.0
    logit_bias_init_value: float | int = -10.0
    mim_masking: str = "attention"
    mim_attention: str = "similarity"
    mim_level: str = "feature"
    mim_target: str = "pixel"
    mim_text: bool = True
    mim_mask_ratio: float | int = 0.5
    mim_attended_share: float | int = 0.9
    mim_row_ratio: float | int = 0.125
    mlm_row_ratio: float | int = 0.125
    contrastive_weight: float | int = 1.0
    mim_weight: float | int = 0.5
    mlm_weight: float | int = 0.5
    prompt_weight: float | int = 4.0
    local_weight: float | int = 2.0
    side_weight: float | int = 0.25
    initializer_range: float | int = 0.02
    training_sources: list[str] | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = _to_config(self.vision_config, DEFAULT_VISION_CONFIG, "vision_config")
        self.text_config = _to_config(self.text_config, DEFAULT_TEXT_CONFIG, "text_config")
        if self.vision_config.model_type.startswith("siglip"):
            self.vision_config.vision_use_head = False  # MMCLIP pools by itself; an unread head would get no gradient
        super().__post_init__(**kwargs)
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}

    def save_pretrained(self, save_directory, **kwargs):
        """As in [`PretrainedConfig`]; the folder of a model that can fill masks is given the pipeline that does it."""
        from .pipeline_mmclip import CUSTOM_PIPELINES  # this import also copies its file

        vars(self).pop("custom_pipelines", None)  # of the checkpoint that this one was made from
        if "MMCLIPForPreTraining" in (self.architectures or ()) and self.mlm_weight > 0:
            self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_vision_text_configs(cls, vision_config: PretrainedConfig, text_config: PretrainedConfig, **kwargs):
        """The config of two given towers; further keywords are fields of this class."""
        return cls(vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), **kwargs)

    def validate_choices(self):
        choices = {
            "vision_stem": ("patch", "convolution"),
            "image_pooling": ("mean", "max", "cls", "pooler"),
            "text_pooling": ("mean", "max", "cls", "pooler"),
            "contrastive_loss": ("softmax", "sigmoid"),
            "contrastive_targets": ("text", "labels"),
            "mim_masking": ("attention", "random"),
            "mim_attention": ("similarity", "cross_attention"),
            "mim_level": ("feature", "input"),
            "mim_target": ("pixel", "feature"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {getattr(self, name)!r}.")
        if self.mim_attention == "cross_attention" and self.mlm_weight == 0:
            raise ValueError("`mim_attention='cross_attention'` is that of EntMLM, so `mlm_weight` must be above 0.")
        if self.contrastive_loss == "sigmoid" and self.contrastive_targets == "labels":
            raise ValueError("`contrastive_targets='labels'` makes targets of a softmax; leave it out with 'sigmoid'.")
        if self.label_temperature <= 0:
            raise ValueError(f"`label_temperature` must be above 0, but is {self.label_temperature}.")

    def validate_shares(self):
        for name in ("mim_mask_ratio", "mim_attended_share", "mim_row_ratio", "mlm_row_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in [0, 1], but is {getattr(self, name)}.")

    def validate_weights(self):
        weights = {name: getattr(self, name) for name in vars(self) if name.endswith("_weight")}
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"Loss weights must be >= 0 and at least one above 0, but are {weights}.")

    def validate_decoder(self):
        if self.decoder_hidden_size % self.decoder_num_heads:
            raise ValueError(
                f"`decoder_hidden_size` ({self.decoder_hidden_size}) must be a multiple of `decoder_num_heads` "
                f"({self.decoder_num_heads})."
            )


__all__ = ["MMCLIPConfig", "max_text_length"]
