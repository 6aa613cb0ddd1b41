"""From pictures and reports to features, against CLIP: python benchmarks/encoding.py --json FILE

`MMCLIPModel.encode` (ViT-B/16 and BERT-base) beside `CLIPProcessor` and transformers' `CLIPModel` with towers of the
same width and depth, which take three channels; both untrained, both with Pillow underneath and in evaluation mode. The
pictures are grey ones in memory, of 2,544 x 3,105 (about a film of MIMIC-CXR), 1,024 x 1,250 and 256 x 313 pixels, the
texts reports of phantoms, cut by the same tokenizer. CLIP's texts are padded to the longest, as ours are, and to 77
tokens, as CLIP was trained. What is compared runs in turns. On a GPU all is in bf16. `--quick` only shows that it runs.
"""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from benchmark_tools import add_processor_time, argument_parser, in_turns, machine, write_results
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from MMCLIP import MMCLIPConfig, MMCLIPImageProcessor, MMCLIPModel, MMCLIPProcessor
from MMCLIP.data.phantom import phantom_row


SIDES = (2544, 1024, 256)  # shorter side of the pictures
MAX_LENGTH = 77  # tokens that CLIP takes
TOWERS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
QUICK_TOWERS = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 256}
# what is measured, and the target of it where there is one
MEASURES = {
    **{f"images_speedup_{side}": (f"encode of {side} px pictures, times as fast as CLIP", ">=", 1.5) for side in SIDES},
    "images_speedup_bfloat16": (f"encode in bfloat16 of {SIDES[0]} px pictures, times as fast as CLIP in float32",),
    "images_speedup_both_bfloat16": ("the same with CLIP in bfloat16 too",),
    **{f"images_rate_{side}": (f"{side} px pictures, images a second",) for side in SIDES},
    **{f"images_rate_clip_{side}": (f"{side} px pictures with CLIP, images a second",) for side in SIDES},
    **{f"preprocessing_speedup_{side}": (f"processor on {side} px, times as fast as CLIP's",) for side in SIDES},
    "image_tower_speedup": ("get_image_features alone, times as fast as CLIP's",),
    **{f"preprocessing_share_{side}": (f"of encode in the processor, {side} px, share",) for side in SIDES},
    **{f"preprocessing_share_clip_{side}": (f"of CLIP's time in its processor, {side} px, share",) for side in SIDES},
    "texts_speedup": ("encode of reports, times as fast as CLIP, padded alike",),
    "texts_speedup_77": ("the same with CLIP's texts padded to 77 tokens",),
    "texts_rate": ("reports a second",),
    "texts_rate_clip": ("reports a second with CLIP",),
    "texts_rate_clip_77": ("the same padded to 77 tokens",),
    "tokenizer_share": ("of encode in the tokenizer, share",),
}


def make_mmclip(towers: dict) -> MMCLIPModel:
    config = MMCLIPConfig(
        vision_config={"model_type": "vit", "num_channels": 1, "image_size": 224, "patch_size": 16, **towers},
        text_config={"model_type": "bert", "vocab_size": 6144, **towers},
    )
    model = MMCLIPModel(config)
    tokenizer = MMCLIPProcessor().tokenizer
    tokenizer.model_max_length = MAX_LENGTH
    model.processor = MMCLIPProcessor(MMCLIPImageProcessor(size=224), tokenizer)
    return model


def make_clip(towers: dict, tokenizer) -> tuple[CLIPModel, CLIPProcessor]:
    config = CLIPConfig(
        vision_config={"image_size": 224, "patch_size": 16, **towers},
        text_config={"vocab_size": 6144, "eos_token_id": tokenizer.sep_token_id, **towers},
        projection_dim=512,
    )
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessorPil(), tokenizer)


def pictures(side: int, number: int) -> list[Image.Image]:
    """Grey pictures that are smooth with some grain, upright as films are."""
    draws = np.random.default_rng(side)
    size = side, side * 1250 // 1024
    made = []
    for _ in range(number):
        coarse = Image.fromarray(draws.integers(0, 256, (12, 10), dtype=np.uint8)).resize(size, Image.BICUBIC)
        grain = draws.normal(scale=4, size=size[::-1])
        made.append(Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)))
    return made


def measure(
    towers: dict, device: torch.device, batch_size: int, num_rounds: int, clock: Callable
) -> tuple[dict[str, float], dict[str, float]]:
    ours = make_mmclip(towers)
    clip, clip_processor = make_clip(towers, ours.processor.tokenizer)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, clip = (model.to(device, dtype).eval() for model in (ours, clip))

    ours_bfloat16, clip_bfloat16 = (copy.deepcopy(model).bfloat16() for model in (ours, clip))
    ours_bfloat16.processor = ours.processor

    def on_device(batch, dtype=dtype):
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}

    def clip_images(images, clip=clip):
        batch = on_device(clip_processor(images=images, return_tensors="pt"), clip.dtype)
        return clip.get_image_features(**batch).pooler_output

    def clip_tokens(texts, padding):
        options = {"padding": padding, "truncation": True, "max_length": MAX_LENGTH, "return_token_type_ids": False}
        return clip_processor(text=texts, return_tensors="pt", **options)

    def clip_texts(texts, padding):
        return clip.get_text_features(**on_device(clip_tokens(texts, padding))).pooler_output

    shown = {side: pictures(side, batch_size) for side in SIDES}
    texts = [phantom_row(index, size=32)["report"] for index in range(batch_size)]
    pixels = on_device(ours.processor(images=shown[256]))
    clip_pixels = on_device(clip_processor(images=shown[256], return_tensors="pt"))
    functions = {
        "image_tower": lambda: ours.get_image_features(**pixels),
        "image_tower_clip": lambda: clip.get_image_features(**clip_pixels),
        "images_bfloat16": lambda: ours_bfloat16.encode(shown[SIDES[0]], batch_size=batch_size)[0],
        "images_clip_bfloat16": lambda: clip_images(shown[SIDES[0]], clip_bfloat16),
        "texts": lambda: ours.encode(texts=texts, batch_size=batch_size)[1],
        "texts_clip": lambda: clip_texts(texts, True),
        "texts_clip_77": lambda: clip_texts(texts, "max_length"),
        "tokenizer": lambda: ours.processor(text=texts),
        "tokenizer_clip": lambda: clip_tokens(texts, True),
    }
    for side, images in shown.items():
        functions |= {
            f"images_{side}": lambda images=images: ours.encode(images, batch_size=batch_size)[0],
            f"images_clip_{side}": lambda images=images: clip_images(images),
            f"processor_{side}": lambda images=images: ours.processor(images=images),
            f"processor_clip_{side}": lambda images=images: clip_processor(images=images, return_tensors="pt"),
        }

    def waiting(function):
        def run():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    with torch.inference_mode():
        seconds = in_turns(num_rounds, clock, **{name: waiting(function) for name, function in functions.items()})
    tokens = {"ours": ours.processor(text=texts)["input_ids"], "clip": clip_tokens(texts, True)["input_ids"]}
    results = {
        "image_tower_speedup": seconds["image_tower_clip"] / seconds["image_tower"],
        "images_speedup_bfloat16": seconds[f"images_clip_{SIDES[0]}"] / seconds["images_bfloat16"],
        "images_speedup_both_bfloat16": seconds["images_clip_bfloat16"] / seconds["images_bfloat16"],
        "texts_speedup": seconds["texts_clip"] / seconds["texts"],
        "texts_speedup_77": seconds["texts_clip_77"] / seconds["texts"],
        "texts_rate": batch_size / seconds["texts"],
        "texts_rate_clip": batch_size / seconds["texts_clip"],
        "texts_rate_clip_77": batch_size / seconds["texts_clip_77"],
        "tokenizer_share": seconds["tokenizer"] / seconds["texts"],
    }
    for side in SIDES:
        our_images, clips_images = seconds[f"images_{side}"], seconds[f"images_clip_{side}"]
        our_processor, clips_processor = seconds[f"processor_{side}"], seconds[f"processor_clip_{side}"]
        results |= {
            f"images_speedup_{side}": clips_images / our_images,
            f"images_rate_{side}": batch_size / our_images,
            f"images_rate_clip_{side}": batch_size / clips_images,
            f"preprocessing_speedup_{side}": clips_processor / our_processor,
            f"preprocessing_share_{side}": our_processor / our_images,
            f"preprocessing_share_clip_{side}": clips_processor / clips_images,
        }
    return results, {"seconds": seconds, "padded_length": {name: ids.shape[1] for name, ids in tokens.items()}}


def main():
    parser = argument_parser(__doc__.partition(":")[0])
    parser.add_argument("--batch_size", type=int, help="default 16, on a GPU 256")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_processor_time(parser)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    batch_size = arguments.batch_size or (256 if device.type == "cuda" else 16)
    towers, num_rounds = TOWERS, 10 if device.type == "cuda" else 5
    if arguments.quick:
        towers, batch_size, num_rounds = QUICK_TOWERS, 2, 1
        torch.set_num_threads(1)  # so little work only waits for a second thread
    clock = time.process_time if arguments.processor_time else time.perf_counter
    torch.manual_seed(0)
    results, details = measure(towers, device, batch_size, num_rounds, clock)
    about = {
        **machine(str(torch.get_num_threads()), ("torch", "transformers", "pillow", "numpy")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bfloat16" if device.type == "cuda" else "float32",
        "batch_size": batch_size,
        "clock": clock.__name__,
        "quick": arguments.quick,
    }
    write_results(MEASURES, results, about, arguments.json, details)


if __name__ == "__main__":
    main()
