"""Show where on a film a saved MMCLIP sees what a sentence says:

python examples/show_heatmaps.py --model X/checkpoint --images a.png b.dcm --finding "pleural effusion" --output_dir Y
python examples/show_heatmaps.py --model X/checkpoint --images a.png --text "There is a left pleural effusion." \\
    --against "There is no pleural effusion." --output_dir Y

For each image and sentence the folder Y gets the map in colour over the film (.png) and the map itself (.npy), float32
of the size of the film. A map says where the patches answer the sentence more than the one it is held against, not
whether the finding is there: it sums to 1 over the patches for any sentence, true or not. Research only, no diagnosis.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.grounding import sentence_heatmaps
from MMCLIP.evaluation.overlays import file_name, overlay
from MMCLIP.text.prompts import negative_prompts, positive_prompts


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="PNG, JPEG, TIFF, DICOM, ...")
    sentence = parser.add_mutually_exclusive_group(required=True)
    sentence.add_argument("--finding", action="append", help="of the vocabulary; held against its denial; repeatable")
    sentence.add_argument("--text", action="append", help="a sentence of your own; repeatable")
    parser.add_argument(
        "--against", action="append", help="what --text is held against: one for all, or as many as there are texts"
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--opacity", type=float, default=0.6, help="of the hottest spot, 0 to 1")
    parser.add_argument("--colours", default="inferno", help="a colour map of Matplotlib")
    parser.add_argument("--colour_bar", action="store_true", help="add the lowest and the highest value to the picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.against and args.finding:
        parser.error("--against is for --text; a --finding is held against its denial")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_checkpoint(args.model)
    if missing := [path for path in args.images if not Path(path).is_file()]:
        raise ValueError(f"--images: there is no file {missing[0]}; {len(missing)} of {len(args.images)} are missing.")
    names = args.finding or args.text
    texts, against = names, args.against
    if args.finding:
        texts = [positive_prompts(name)[0] for name in names]
        against = [negative_prompts(name)[0] for name in names]
    elif against is None:
        print("without --against a map shows mostly what any sentence would\n")
    model, processor = load_checkpoint(args.model, args.device)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(args.images):
        heatmaps = sentence_heatmaps(model, processor, path, texts, against)
        for place, (name, heatmap) in enumerate(zip(names, heatmaps, strict=True)):
            stem = f"{number:03d}_{file_name(Path(path).stem)}_{file_name(name)}"
            if file_name(name) in map(file_name, names[:place]):
                stem += f"_{place}"  # two sentences that begin alike
            picture = args.output_dir / f"{stem}.png"
            options = {"opacity": args.opacity, "colours": args.colours, "colour_bar": args.colour_bar}
            overlay(path, heatmap, **options).save(picture)
            np.save(args.output_dir / f"{stem}.npy", heatmap)
            row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
            print(f"{picture}: highest at x {column}, y {row}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
