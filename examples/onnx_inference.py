"""Which sentence fits an X-ray best? With the files of export_onnx.py, onnxruntime, tokenizers and Pillow; no torch.

python examples/onnx_inference.py outputs/onnx xray.png "There is a pleural effusion." "Normal chest radiograph."

Takes grey and colour pictures of 8 bit. For 16 bit and DICOM, window the pixels to 0 to 255 first.
"""

import sys

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def prepare(picture: Image.Image, about: dict[str, str]) -> np.ndarray:
    """`pixel_values` (1, 1, S, S), as our image processor makes them."""
    if picture.mode not in ("L", "RGB"):
        raise SystemExit(f"expected a grey or colour picture of 8 bit, got the mode {picture.mode}")
    side, grey = int(about["image_size"]), ImageOps.exif_transpose(picture).convert("L")  # upright
    factor = min(side / grey.width, side / grey.height)
    size = tuple(min(max(round(length * factor), 1), side) for length in grey.size)
    size = size if int(about["do_pad"]) else (side, side)
    canvas = Image.new("L", (side, side))  # black around
    grey = grey if grey.size == size else grey.resize(size, int(about["resample"]), reducing_gap=3.0)
    canvas.paste(grey, ((side - size[0]) // 2, (side - size[1]) // 2))
    mean, std = float(about["image_mean"]), float(about["image_std"])
    scaled = np.asarray(canvas, np.float32) * np.float32(float(about["rescale_factor"]) / std)
    return (scaled - np.float32(mean / std))[None, None]


def main(folder: str, path: str, *sentences: str) -> None:
    image_encoder = InferenceSession(f"{folder}/image_encoder.onnx")
    text_encoder = InferenceSession(f"{folder}/text_encoder.onnx")
    about = image_encoder.get_modelmeta().custom_metadata_map
    tokens = Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch(list(sentences))
    inputs = {"input_ids": [one.ids for one in tokens], "attention_mask": [one.attention_mask for one in tokens]}
    (text_embeds,) = text_encoder.run(["text_embeds"], {name: np.array(ids) for name, ids in inputs.items()})
    (image_embeds,) = image_encoder.run(["image_embeds"], {"pixel_values": prepare(Image.open(path), about)})
    logits = float(about["similarity_scale"]) * (image_embeds @ text_embeds.T)[0]  # (sentences,)
    shares = np.exp(logits - logits.max())
    for sentence, share in zip(sentences, shares / shares.sum(), strict=True):
        print(f"{share:.3f}  {sentence}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
