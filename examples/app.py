"""Web demo: drop an X-ray, ask for findings, see scores, heat maps and the nearest reports.

python examples/app.py --model outputs/demo/checkpoint
python examples/app.py --model OWNER/NAME --revision v1 --calibration calibration.json --reports reports.csv

It answers at http://127.0.0.1:7860 and needs no network. An upload is removed from disk as soon as it is read, and what
is read stays in memory while its page is open, for half an hour at most. What is left out is looked for beside this
file, where a Space has it: checkpoint/, calibration.json, reports.csv. Research only, no diagnosis.
"""

import argparse
import os
import signal
import sys
from html import escape
from pathlib import Path

from MMCLIP.demo.interface import build_page, launch, private_uploads
from MMCLIP.text.prompt_sets import prompt_set, prompt_set_names


HERE = Path(__file__).resolve().parent


def beside(name: str) -> str | None:
    """The path of what lies beside this file under `name`, None where there is no such thing."""
    return str(HERE / name) if (HERE / name).exists() else None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("MMCLIP_MODEL") or beside("checkpoint"),
        help="folder with the saved model and processor, or a Hub id; default: $MMCLIP_MODEL, else checkpoint/",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--calibration", default=beside("calibration.json"), help="file of run_zero_shot.py")
    parser.add_argument("--prompts", default="mmclip", help=f"{', '.join(prompt_set_names())}, or a YAML file")
    parser.add_argument("--reports", default=beside("reports.csv"), help="table with a column `text`")
    parser.add_argument("--cache_dir", help="folder that keeps the embeddings of the reports for the next start")
    parser.add_argument("--host", help="address to listen at; default: $GRADIO_SERVER_NAME, else this machine alone")
    parser.add_argument("--port", type=int, help="default: $GRADIO_SERVER_PORT, else the first free from 7860")
    parser.add_argument("--max_upload_mb", type=int, default=64, help="larger files are refused; default: 64")
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(arguments)
    if not args.model:
        parser.error("--model is needed: there is no $MMCLIP_MODEL and no checkpoint/ beside this file")
    if args.max_upload_mb < 1:
        parser.error(f"--max_upload_mb must be 1 or more, got {args.max_upload_mb}")
    return args


def make_reader(args: argparse.Namespace):
    """The `FilmReader` of the arguments; `ValueError` for a mistake in them."""
    from MMCLIP.evaluation.embeddings import EmbeddingCache, text_features
    from MMCLIP.evaluation.probabilities import load_calibration
    from MMCLIP.inference.loading import load_model
    from MMCLIP.inference.reading import FilmReader, read_report_ids

    prompts = prompt_set(args.prompts)
    calibration = load_calibration(args.calibration) if args.calibration else None
    reports = list(read_report_ids(args.reports)) if args.reports else []
    model, processor = load_model(args.model, args.revision, args.device)
    embeds = None
    if args.cache_dir and reports:
        embeds = text_features(model, processor, reports, cache=EmbeddingCache(args.cache_dir))
    reader = FilmReader(model, processor, prompts, calibration, reports, embeds)
    reader.warm_up()
    return reader


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of uploads is removed
    reader = make_reader(args)
    private_uploads()
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    about = f"Model: {escape(name)}. Prompts: {escape(reader.prompts.name)}."
    page = build_page(reader, about)
    address = launch(page, max_upload_mb=args.max_upload_mb, host=args.host, port=args.port)
    print(f"The demo runs at {address} (Ctrl+C ends it).", flush=True)
    page.block_thread()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a mistake of the user's, or a port in use: without the way it took
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(0)
