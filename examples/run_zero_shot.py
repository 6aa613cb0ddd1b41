"""Evaluate a saved MMCLIP zero-shot, and its heat maps where lesion masks exist:

python examples/run_zero_shot.py --model outputs/demo/checkpoint --phantoms 1000 --output_dir outputs/demo
python examples/run_zero_shot.py --model X/checkpoint --manifest metadata.csv --split test --output_dir Y
"""

import argparse
import sys
from pathlib import Path

import torch

from MMCLIP.evaluation import figures, report
from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.grounding import heatmap_auroc
from MMCLIP.evaluation.protocols import overlap_cautions
from MMCLIP.evaluation.zero_shot import check_scorable, evaluate_zero_shot
from MMCLIP.text.prompt_sets import prompt_set, prompt_set_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--manifest", help="folder of prepare_data.py, or a CSV, TSV, Parquet or JSON lines file")
    data.add_argument("--phantoms", type=int, help="number of made-up radiographs, of the held-out stream")
    parser.add_argument("--split", help="evaluate only this split of the manifest")
    parser.add_argument("--phantom_size", type=int, default=128, help="side of a made-up radiograph in pixels")
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
    if args.phantoms is not None and (args.split or args.fully_labelled):
        parser.error("--split and --fully_labelled are for --manifest; phantoms are held out and have all labels")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_checkpoint(args.model)
    prompts = prompt_set(args.prompts)  # before the long part, as is the next
    train, log_history = report.read_train_results(args.model, args.train_results)
    sources = tuple(filter(None, args.fully_labelled.split(",")))
    if args.manifest:
        from MMCLIP.data.prepared import read_manifest

        rows = read_manifest(args.manifest, args.split, drop_unlabelled=True, fully_labelled=sources)
        data = f"{args.manifest}, split {args.split or 'all'}, {len(rows)} rows"
    else:
        from MMCLIP.data.phantom import phantom_dataset

        rows = phantom_dataset(args.phantoms, size=args.phantom_size, split="test")
        data = f"{args.phantoms} phantoms of the held-out stream, {args.phantom_size} px"
    labels = args.labels.split(",") if args.labels else None
    check_scorable(rows, labels, sources, args.unlisted_is_absent)
    model, processor = load_checkpoint(args.model, args.device)

    shared = {"batch_size": args.batch_size, "num_bootstrap": args.num_bootstrap, "num_workers": args.num_workers}
    results, predictions = evaluate_zero_shot(
        model,
        processor,
        rows,
        labels=labels,
        unlisted_is_absent=args.unlisted_is_absent,
        fully_labelled=sources,
        prompts=prompts,
        progress="zero-shot",
        **shared,
    )
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
    results |= report.describe_run(args.model, data)
    report.write_predictions(args.output_dir, predictions)
    report.write_metrics(args.output_dir, results)
    markdown = report.write_markdown(args.output_dir, results, drawn)
    print(report.zero_shot_table(results["zero_shot"]), "", *report.caution_lines(results["overlaps"]), sep="\n")
    if "grounding" in results:
        print(f"\nheat-map AUROC {results['grounding']['heatmap_auroc']:.3f}")
    print(f"\nmodel: {args.model}\ntable: {markdown}, metrics.json and predictions.csv beside it\npictures: {pictures}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
