"""Evaluate a saved MMCLIP zero-shot, and its heat maps where lesion masks exist:

python examples/run_zero_shot.py --model outputs/demo/checkpoint --phantoms 1000 --output_dir outputs/demo
python examples/run_zero_shot.py --model X/checkpoint --manifest metadata.csv --split test --output_dir Y
python examples/run_zero_shot.py --model X/checkpoint --manifest metadata.csv --split test --calibration_split val \\
    --output_dir Y

The last also fits on the split val how a score becomes a probability, and writes it to Y/calibration.json.
"""

import argparse
import sys
from pathlib import Path

import torch

from MMCLIP.evaluation import figures, report
from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.embeddings import model_fingerprint
from MMCLIP.evaluation.grounding import heatmap_auroc
from MMCLIP.evaluation.probabilities import fit_calibration
from MMCLIP.evaluation.protocols import overlap_cautions
from MMCLIP.evaluation.zero_shot import check_scorable, evaluate_zero_shot, scored_rows
from MMCLIP.text.prompt_sets import prompt_set, prompt_set_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--manifest", help="folder of prepare_data.py, or a CSV, TSV, Parquet or JSON lines file")
    data.add_argument("--phantoms", type=int, help="number of made-up radiographs, of the held-out stream")
    parser.add_argument("--split", help="evaluate only this split of the manifest")
    parser.add_argument("--phantom_size", type=int, default=128, help="side of a made-up radiograph in pixels")
    parser.add_argument("--calibration_split", help="fit probabilities on this split of the manifest: calibration.json")
    parser.add_argument("--calibration_phantoms", type=int, help="the same on so many validation phantoms")
    parser.add_argument("--labels", help="comma-separated; default: all that the rows name")
    parser.add_argument("--fully_labelled", default="", help="comma-separated sources in which unlisted is absent")
    parser.add_argument(
        "--unlisted_is_absent",
        action=argparse.BooleanOptionalAction,
        help="does a label that a row does not name count as absent? default: where a row lists no absent label",
    )
    parser.add_argument(
        "--prompts", default="mmclip", help=f"{', '.join(prompt_set_names())}, or a YAML file like prompt_sets.yaml"
    )
    parser.add_argument("--output_dir", required=True, help="for metrics.json, report.md, predictions.csv and figures/")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--num_bootstrap", type=int, default=1000, help="draws of patients for the 95 %% intervals")
    parser.add_argument("--train_results", help="train_results.json of the run; default: searched beside the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.phantoms is not None and (args.split or args.fully_labelled or args.calibration_split):
        parser.error("--split, --calibration_split and --fully_labelled are for --manifest; phantoms have all labels")
    if args.calibration_phantoms is not None and args.phantoms is None:
        parser.error("--calibration_phantoms goes with --phantoms; for a manifest there is --calibration_split")
    if args.calibration_split and args.split in (None, args.calibration_split):
        parser.error("--calibration_split must be another split than --split, or probabilities are tested on their fit")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_checkpoint(args.model)
    prompts = prompt_set(args.prompts)  # before the long part, as is the next
    train, log_history = report.read_train_results(args.model, args.train_results)
    sources = tuple(filter(None, args.fully_labelled.split(",")))
    validation = None
    if args.manifest:
        from MMCLIP.data.prepared import read_manifest

        def read(split: str | None):
            return read_manifest(args.manifest, split, drop_unlabelled=True, fully_labelled=sources)

        rows = read(args.split)
        data = f"{args.manifest}, split {args.split or 'all'}, {len(rows)} rows"
        if args.calibration_split:
            validation = read(args.calibration_split)
            sources_named = ", ".join(filter(None, sorted(validation.unique("source")))) or "a table"
            fitted_on = f"split {args.calibration_split} of {sources_named}"  # no path: it may be published
    else:
        from MMCLIP.data.phantom import phantom_dataset

        rows = phantom_dataset(args.phantoms, size=args.phantom_size, split="test")
        data = f"{args.phantoms} phantoms of the held-out stream, {args.phantom_size} px"
        if args.calibration_phantoms:
            validation = phantom_dataset(args.calibration_phantoms, size=args.phantom_size, split="val")
            fitted_on = "phantoms of the validation stream"
    labels = args.labels.split(",") if args.labels else None
    check_scorable(rows, labels, sources, args.unlisted_is_absent)
    model, processor = load_checkpoint(args.model, args.device)

    absence = {"unlisted_is_absent": args.unlisted_is_absent, "fully_labelled": sources}
    reading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    shared = {"num_bootstrap": args.num_bootstrap, **reading}
    calibration = None
    if validation is not None:
        named = scored_rows(rows, labels)[1]
        fit = {"data": fitted_on, "progress": "calibration", **absence, **reading}
        calibration = fit_calibration(model, processor, validation, named, prompts, **fit)
    results, predictions = evaluate_zero_shot(
        model,
        processor,
        rows,
        labels=labels,
        prompts=prompts,
        progress="zero-shot",
        **absence,
        **shared,
    )
    if calibration is not None:
        calibration = calibration.tested_on(predictions)
        results["calibration"] = calibration.summary()
        calibration.save(args.output_dir)
    pictures = Path(args.output_dir) / "figures"
    drawn = [figures.plot_roc({"model": predictions}, pictures / "roc.png")]
    if any(rows["masks"]):
        results["grounding"] = heatmap_auroc(model, processor, rows, progress="grounding", **shared)
        drawn.append(figures.plot_heatmaps(model, processor, rows, pictures / "heatmaps.png"))
    results["overlaps"] = overlap_cautions(rows.unique("source"), model.config.training_sources)
    if train is not None:
        results["train"] = train
    if any("loss" in entry for entry in log_history):
        drawn.append(figures.plot_loss_curves(log_history, pictures / "loss_curves.png"))
    results |= report.describe_run(
        args.model,
        data,
        weights_hash=model_fingerprint(model, processor, with_code=False),
        dataset=report.describe_rows(rows),
    )
    report.write_predictions(args.output_dir, predictions)
    report.write_metrics(args.output_dir, results)
    markdown = report.write_markdown(args.output_dir, results, drawn)
    print(report.zero_shot_table(results["zero_shot"]), "", *report.caution_lines(results["overlaps"]), sep="\n")
    if calibration is not None:
        print("\n" + report.calibration_line(results["calibration"]))
    if "grounding" in results:
        print(f"\nheat-map AUROC {results['grounding']['heatmap_auroc']:.3f}")
    print(f"\nmodel: {args.model}\ntable: {markdown}, metrics.json and predictions.csv beside it\npictures: {pictures}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
