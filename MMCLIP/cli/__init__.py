"""The command `mmclip`: X-rays to embeddings, scores of findings, heat maps and nearest reports.

mmclip encode FOLDER --model M --output embeddings.parquet
mmclip zero-shot FOLDER --model M --findings "pleural effusion" cardiomegaly --output scores.csv
mmclip heatmap FILE --model M --findings "pleural effusion" --output_dir heatmaps
mmclip retrieve FOLDER --model M --reports reports.csv --output nearest.json

FILE and FOLDER may be mixed and many: PNG, JPEG, TIFF, DICOM and others, folders to the bottom. M is the folder of a
saved model or a Hub id; its weights are read, its code is not run. Exit codes: 0 all done; 1 some images were bad, each
is named and the rest is done; 2 nothing was done, for a mistake in the options or in the model. Research software, not
for diagnosis.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

from ..inference.tables import FORMATS
from ..text.prompt_sets import prompt_set_names


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="FILE_OR_FOLDER", help="X-rays, and folders of X-rays")
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1; default: a GPU where there is one")
    parser.add_argument("--batch_size", type=_positive, default=16, help="images encoded at once; default: 16")
    parser.add_argument("--num_workers", type=_positive, default=4, help="threads that read images; default: 4")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings; errors are shown")


def _add_findings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--findings",
        nargs="+",
        metavar="FINDING",
        help="of the vocabulary or in your own words; default: those with a calibration, else six common ones",
    )
    parser.add_argument("--prompts", default="mmclip", help=f"{', '.join(prompt_set_names())}, or a YAML file")
    parser.add_argument("--calibration", help="file of run_zero_shot.py, which makes scores probabilities")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in [0, 1]")
    return number


def build_parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mmclip", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|zero-shot|heatmap|retrieve")
    a_table = f"the table to write: {', '.join(FORMATS)}"

    encode = commands.add_parser("encode", help="image embeddings, with the path of each and a hash of the model")
    _add_common(encode)
    encode.add_argument("--output", required=True, type=Path, help=a_table)

    zero_shot = commands.add_parser("zero-shot", help="is a finding present or absent? a score for each")
    _add_common(zero_shot)
    _add_findings(zero_shot)
    zero_shot.add_argument("--output", type=Path, help=f"{a_table}; default: CSV to the screen")

    heatmap = commands.add_parser("heatmap", help="where on the film a finding is seen, as PNG")
    _add_common(heatmap)
    _add_findings(heatmap)
    heatmap.add_argument("--output_dir", required=True, type=Path, help="for the pictures and heatmaps.csv")
    heatmap.add_argument("--opacity", type=_share, default=0.6, help="of the hottest spot, 0 to 1; default: 0.6")
    heatmap.add_argument("--colours", default="inferno", help="a colour map of Matplotlib; default: inferno")

    retrieve = commands.add_parser("retrieve", help="the nearest reports of a supplied set")
    _add_common(retrieve)
    retrieve.add_argument(
        "--reports", required=True, help="CSV, TSV, JSON lines or Parquet with a column `text`, or a prepared folder"
    )
    retrieve.add_argument("--top", type=_positive, default=5, help="reports for each image; default: 5")
    retrieve.add_argument("--output", type=Path, help=f"{a_table}; default: CSV to the screen")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs `mmclip` with `arguments` (those of the process by default) and returns its exit code."""
    args = build_parser().parse_args(arguments)
    import torch

    from . import commands  # the parser answers --help without it

    try:
        return commands.run(args)
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `mmclip ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"mmclip {args.command}: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        advice = f"try a --batch_size below {args.batch_size}, or --device cpu"
        print(f"mmclip {args.command}: error: the memory of the GPU is full; {advice} ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmclip {args.command}: stopped; no table was written", file=sys.stderr)
        return 130
    except Exception:  # ours: shown with its way, and never with the code 1 of bad images
        traceback.print_exc()
        return 2
