"""Retrieval with a saved MMCLIP: does an image find its report among all reports, and a report its image?

python examples/run_retrieval.py --model outputs/demo/checkpoint --phantoms 1000 --output_dir outputs/demo/retrieval
python examples/run_retrieval.py --model X/checkpoint --manifest prepared --split test --output_dir Y

Rows without an image or without a report are left out. The folder Y gets metrics.json, report.md and ranks.csv, which
names rows but holds no text.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

from MMCLIP.evaluation import report
from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.embeddings import EmbeddingCache, image_features, model_fingerprint, text_features
from MMCLIP.evaluation.protocols import overlap_cautions
from MMCLIP.evaluation.retrieval import BACKENDS, EXACT_LIMIT, evaluate_retrieval, report_names, retrieval_rows
from MMCLIP.evaluation.zero_shot import patient_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--manifest", help="folder of prepare_data.py, or a CSV, TSV, Parquet or JSON lines file")
    data.add_argument("--phantoms", type=int, help="number of made-up radiographs, of the held-out stream")
    parser.add_argument("--split", help="search only in this split of the manifest")
    parser.add_argument("--phantom_size", type=int, default=128, help="side of a made-up radiograph in pixels")
    parser.add_argument("--output_dir", required=True, type=Path, help="for metrics.json, report.md and ranks.csv")
    parser.add_argument("--cache_dir", help="folder that keeps embeddings for other evaluations of the same model")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help=f"how to search; the numbers are the same. default: FAISS beyond {EXACT_LIMIT} candidates",
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--num_bootstrap", type=int, default=1000, help="draws of patients for the 95 %% intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.phantoms is not None and args.split:
        parser.error("--split is for --manifest; phantoms are held out")
    return args


def write_files(output_dir: Path, results: dict, ranks: list[dict]) -> None:
    """metrics.json, report.md and ranks.csv."""
    report.write_metrics(output_dir, results)
    retrieval = results["retrieval"]
    lines = ["# MMCLIP retrieval", "", *(f"- {key}: `{results[key]}`" for key in ("model", "data", "command"))]
    lines += [*report.caution_lines(results["overlaps"]), "", report.retrieval_table({"": retrieval}), ""]
    about = (
        "{num_images} images and {num_texts} reports of {num_patients} patients; {num_identical} reports have the "
        "words of another. `identical texts count`: such a report, and its image, is a hit too; `own text only`: only "
        "the very pair. Searched are {candidates}. Ties: {ties}. Intervals: {num_bootstrap} draws of patients. Of "
        "the median rank less is better."
    )
    lines.append(about.format_map(retrieval))
    if retrieval["no_interval_because"]:
        lines.append(f"There are no intervals: {retrieval['no_interval_because']}.")
    (output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (output_dir / "ranks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ranks[0]))
        writer.writeheader()
        writer.writerows(ranks)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_checkpoint(args.model)
    if args.manifest:
        from MMCLIP.data.prepared import read_manifest

        found = read_manifest(args.manifest, args.split, drop_unlabelled=True)
        data = f"{args.manifest}, split {args.split or 'all'}"
    else:
        from MMCLIP.data.phantom import phantom_dataset

        found = phantom_dataset(args.phantoms, size=args.phantom_size, split="test")
        data = f"{args.phantoms} phantoms of the held-out stream, {args.phantom_size} px"
    rows = retrieval_rows(found)
    if len(rows) < 2:
        raise ValueError(
            f"{data}: retrieval needs at least 2 rows with an image and a report, but {len(rows)} of {len(found)} have "
            "both. Check the split, and that the data set has reports."
        )
    model, processor = load_checkpoint(args.model, args.device)

    cache = EmbeddingCache(args.cache_dir)
    model_hash = cache.hold(model, processor)
    reading = {"batch_size": args.batch_size, "num_workers": args.num_workers, "progress": "images"}
    texts = list(rows["report"])
    retrieval, ranks = evaluate_retrieval(
        image_features(model, processor, rows, cache=cache, **reading).embeds,
        text_features(model, processor, texts, cache=cache),
        texts,
        patient_names(rows),
        num_bootstrap=args.num_bootstrap,
        seed=args.seed,
        backend=args.backend,
        report_ids=report_names(rows),
        row_ids=list(rows["row_id"]),
    )
    retrieval["num_left_out"] = len(found) - len(rows)  # rows without an image or a report
    overlaps = overlap_cautions(rows.unique("source"), model.config.training_sources)
    results = {"retrieval": retrieval, "overlaps": overlaps, "model_hash": model_hash}
    results |= report.describe_run(
        args.model,
        f"{data}, {len(rows)} rows with image and report",
        weights_hash=model_fingerprint(model, processor, with_code=False),
        dataset=report.describe_rows(rows),
    )
    write_files(args.output_dir, results, ranks.table())
    print(report.retrieval_table({"": retrieval}), "", *report.caution_lines(overlaps), sep="\n")
    print(f"\nmodel: {args.model}\ntable: {args.output_dir / 'report.md'}, metrics.json and ranks.csv beside it")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
