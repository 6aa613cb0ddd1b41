"""From the folders of data sets to one that is ready for training: images shrunk once, entities found once.

python examples/prepare_data.py --source cxr-mini=../shared/data/cxr-mini --source phantom=5000 --output_dir D
python examples/prepare_data.py --source mimic-cxr=/data/MIMIC-CXR-JPG --option mimic-cxr.labels=negbio --output_dir D

A source is NAME=FOLDER of a public data set (names in MMCLIP/data/readers), phantom=NUMBER, or any other NAME with a
table of images and texts (or a folder with its metadata.csv). A run that was stopped goes on when it is started again.
"""

import argparse
import dataclasses
import logging
import sys

from MMCLIP.data.indexing import PreparationOptions, convert
from MMCLIP.data.preparation import prepare


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", action="append", required=True, metavar="NAME=PLACE", help="may be given many times"
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="of a source's reader")
    parser.add_argument("--output_dir", required=True)
    for field in dataclasses.fields(PreparationOptions):
        parser.add_argument(f"--{field.name}", default=str(field.default), help=f"default {field.default}")
    parser.add_argument("--num_proc", type=int, help="processes; default: one a core")
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="fail if more of a source cannot be used")
    parser.add_argument("--duplicates", default="error", choices=("error", "drop"), help="pictures in two splits")
    parser.add_argument("--retry_bad", action="store_true", help="read files that could not be used once more")
    args = parser.parse_args(arguments)
    args.sources, args.source_options = {}, {}
    for source in args.source:
        name, is_pair, place = source.partition("=")
        if not is_pair or not name or not place or name in args.sources:
            parser.error(f"--source {source}: expected NAME=PLACE, each name once")
        args.sources[name] = place
    for option in args.option:
        key, is_pair, value = option.partition("=")
        name, has_key, key = key.rpartition(".")
        if not is_pair or not has_key or name not in args.sources:
            parser.error(f"--option {option}: expected NAME.KEY=VALUE, NAME one of {', '.join(args.sources)}")
        args.source_options.setdefault(name, {})[key] = value
    return args


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = parse_arguments(arguments)
    fields = dataclasses.fields(PreparationOptions)
    try:
        options = PreparationOptions(
            **{f.name: convert(getattr(args, f.name), f.default, f"--{f.name}") for f in fields}
        )
        summary = prepare(
            args.sources,
            args.output_dir,
            options,
            source_options=args.source_options,
            num_proc=args.num_proc,
            max_bad_share=args.max_bad_share,
            duplicates=args.duplicates,
            retry_bad=args.retry_bad,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    hint = f"train on it: --train_manifest {args.output_dir}"
    if any((summary.parent / "val").glob("*.parquet")):
        hint += f" --validation_manifest {args.output_dir}"
    else:
        hint += " (no patient fell to `val`: raise --val_share for a validation set)"
    print(f"{summary}\n{hint}")


if __name__ == "__main__":
    main()
