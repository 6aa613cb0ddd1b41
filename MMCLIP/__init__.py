"""MMCLIP: medical CLIP pretraining on chest X-rays with AttMIM, EntMLM and disease-kind prompts."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

# not from the top: without torchvision, transformers 5.17 has a stand-in there that refuses everything
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY


_root = Path(__file__).resolve().parent.parent
if (_root / "modeling_mmclip.py").is_file() and not (Path(__file__).parent / "modeling_mmclip.py").is_file():
    __path__.append(str(_root))  # a checkout or an editable install: the Hub files stand one level up

from .configuration_mmclip import MMCLIPConfig  # noqa: E402
from .image_processing_mmclip import MMCLIPImageProcessor  # noqa: E402
from .modeling_mmclip import MMCLIPForImageClassification, MMCLIPForPreTraining, MMCLIPModel  # noqa: E402
from .pipeline_mmclip import TASK, FillMaskWithImagePipeline  # noqa: E402
from .processing_mmclip import MMCLIPProcessor  # noqa: E402


__version__ = "0.1.0"

AutoConfig.register("mmclip", MMCLIPConfig, exist_ok=True)
AutoModel.register(MMCLIPConfig, MMCLIPModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(MMCLIPConfig, MMCLIPModel, exist_ok=True)
AutoModelForPreTraining.register(MMCLIPConfig, MMCLIPForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(MMCLIPConfig, MMCLIPForImageClassification, exist_ok=True)
AutoProcessor.register(MMCLIPConfig, MMCLIPProcessor, exist_ok=True)
AutoImageProcessor.register(MMCLIPConfig, slow_image_processor_class=MMCLIPImageProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=FillMaskWithImagePipeline, pt_model=AutoModelForPreTraining, type="multimodal"
)

# `save_pretrained` copies the code of these classes next to the weights (the processors register themselves)
MMCLIPConfig.register_for_auto_class()
MMCLIPModel.register_for_auto_class("AutoModel")
MMCLIPForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MMCLIPForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "MMCLIPConfig",
    "MMCLIPForImageClassification",
    "MMCLIPForPreTraining",
    "MMCLIPImageProcessor",
    "MMCLIPModel",
    "MMCLIPProcessor",
]
