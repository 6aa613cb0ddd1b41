"""Export the encoders of a saved MMCLIP to ONNX, checked against torch, and on request with weights of 8 bit:

python examples/export_onnx.py --model outputs/demo/checkpoint --output_dir outputs/onnx
python examples/export_onnx.py --model X/checkpoint --output_dir Y --int8 --manifest metadata.csv --split test

The folder gets image_encoder.onnx, text_encoder.onnx, tokenizer.json and export.json; with --int8 also the two
`_int8.onnx`, whose zero-shot AUROC is measured beside that of the others. onnx_inference.py shows how to use them.
"""

import argparse
import json
import sys
from pathlib import Path

from MMCLIP.evaluation import report
from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.zero_shot import check_scorable
from MMCLIP.export.onnx_encoders import FILES, INT8_FILES, NUM_CHECKS, encoder_metadata, export_encoders


NUM_PHANTOMS = 500  # scored by --int8 where no data are named
NUM_CALIBRATION = 100


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    parser.add_argument("--output_dir", required=True, type=Path, help="for the ONNX files; those there are replaced")
    parser.add_argument("--int8", action="store_true", help="also files with weights of 8 bit, and what these lose")
    only = parser.add_argument_group("what --int8 is measured on")
    data = only.add_mutually_exclusive_group()
    data.add_argument("--manifest", help="folder of prepare_data.py, or a CSV, TSV, Parquet or JSON lines file")
    data.add_argument(
        "--phantoms", type=int, help=f"made-up radiographs of the held-out stream; default {NUM_PHANTOMS}"
    )
    only.add_argument("--split", help="measure only on this split of the manifest")
    only.add_argument(
        "--calibration_split",
        help=f"split of the manifest of which {NUM_CALIBRATION} images set the ranges of a convolutional tower",
    )
    only.add_argument("--phantom_size", type=int, help="side of a made-up radiograph in pixels; default 128")
    only.add_argument("--labels", help="comma-separated; default: all that the rows name")
    only.add_argument("--fully_labelled", help="comma-separated sources in which unlisted is absent")
    only.add_argument("--num_bootstrap", type=int, help="draws of patients for the interval of the loss; default 1000")
    args = parser.parse_args(arguments)
    given = [action.dest for action in only._group_actions if getattr(args, action.dest) is not None]
    if given and not args.int8:
        parser.error(f"--{given[0]} says what --int8 is measured on; add --int8 or leave it out")
    of_manifest = [name for name in ("split", "calibration_split", "fully_labelled") if getattr(args, name) is not None]
    if args.manifest is None and of_manifest:
        parser.error(f"--{of_manifest[0]} is for --manifest; phantoms are held out and have all labels")
    if args.calibration_split is not None and args.split in (None, args.calibration_split):
        parser.error(
            "--calibration_split must be another split than --split, or the loss is measured on the same images"
        )
    if args.phantoms is not None and args.phantoms < 1:
        parser.error(f"--phantoms must be 1 or more, got {args.phantoms}")
    if args.manifest is not None and args.phantom_size is not None:
        parser.error("--phantom_size is for phantoms, not for --manifest")
    args.sources = tuple(filter(None, (args.fully_labelled or "").split(",")))
    return args


def read_rows(args: argparse.Namespace):
    """The rows that int8 is measured on, and what they are."""
    if args.manifest:
        from MMCLIP.data.prepared import read_manifest

        rows = read_manifest(args.manifest, args.split, drop_unlabelled=True, fully_labelled=args.sources)
        return rows, f"{args.manifest}, split {args.split or 'all'}, {len(rows)} rows"
    from MMCLIP.data.phantom import phantom_dataset

    number, size = args.phantoms or NUM_PHANTOMS, args.phantom_size or 128
    rows = phantom_dataset(number, size=size, split="test")
    return rows, f"{number} phantoms of the held-out stream, {size} px"


def calibration_batches(args: argparse.Namespace, processor):
    """Batches of `pixel_values` that set the ranges of a convolutional tower."""
    from MMCLIP.data.manifest import has_image
    from MMCLIP.evaluation.embeddings import pixel_value_batches

    if args.manifest is None:
        from MMCLIP.data.phantom import phantom_dataset

        rows = phantom_dataset(NUM_CALIBRATION, size=args.phantom_size or 128, split="train")
    elif args.calibration_split is None:
        raise ValueError(
            "The vision tower of this model consists of convolutions, whose 8-bit form needs images to set its ranges. "
            "Name a split of the manifest for them, other than the one that is scored: --calibration_split train."
        )
    else:
        from MMCLIP.data.prepared import read_manifest

        rows = read_manifest(args.manifest, args.calibration_split)
    rows = rows.select(has_image(rows).nonzero()[0][:NUM_CALIBRATION])
    return (batch.numpy() for batch in pixel_value_batches(processor, rows, batch_size=10))


def quantize(args: argparse.Namespace, model, processor, rows, labels: list[str] | None) -> dict:
    """Write the int8 files, and return how they were made and what they lose."""
    from MMCLIP.export.int8 import measure_int8, needs_calibration, quantize_encoders

    batches = calibration_batches(args, processor) if needs_calibration(args.output_dir) else None
    methods = quantize_encoders(args.output_dir, batches)
    num_bootstrap = 1000 if args.num_bootstrap is None else args.num_bootstrap
    options = {"fully_labelled": args.sources, "num_bootstrap": num_bootstrap}
    return {"method": methods, **measure_int8(args.output_dir, model.config, processor, rows, labels, **options)}


def print_loss(int8: dict) -> None:
    loss, interval = int8["loss"]["difference"], int8["loss"]["ci"]
    shown = "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
    print(
        f"int8: macro AUROC {int8['float32']:.4f} becomes {int8['int8']:.4f} on {int8['num_images']} images, a loss of "
        f"{loss:.4f}{shown}; no P(present) changes by more than {int8['largest_change']:.3f}"
    )
    for name, size in int8["bytes"].items():
        print(f"{size / 1e6:9.1f} MB  {name}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_checkpoint(args.model)
    if args.int8:
        rows, data = read_rows(args)
        labels = args.labels.split(",") if args.labels else None
        check_scorable(rows, labels, args.sources)  # before the long part
    model, processor = load_checkpoint(args.model, "cpu")
    earlier = [path for path in (args.output_dir / name for name in INT8_FILES.values()) if path.exists()]
    differences = export_encoders(model, processor, args.output_dir)
    for part, difference in differences.items():
        print(f"{args.output_dir / FILES[part]}: within {difference:.1e} of torch on {NUM_CHECKS} inputs")
    results = {"metadata": encoder_metadata(model, processor), "largest_difference": differences}
    if args.int8:
        results["int8"] = {"data": data, **quantize(args, model, processor, rows, labels)}
        print_loss(results["int8"])
    for path in earlier:
        if not path.exists():
            print(f"{path}: removed, as it was made of the earlier files; --int8 makes it anew")
    results |= {**report.describe_command(), "model": args.model}
    (args.output_dir / "export.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{args.output_dir / 'export.json'}: what was checked and measured")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
