"""Fine-tune or probe a pretrained MMCLIP, at shares of the training patients and with several seeds:

python examples/run_classification.py examples/configs/classification_phantom.yaml \
    --model_name_or_path outputs/demo/checkpoint --output_dir outputs/demo/classification
accelerate launch examples/run_classification.py CONFIG.yaml --method lora --fractions 0.01 0.1 1.0 --seeds 0 1 2 ...

OUTPUT_DIR gets metrics.json, report.md, run_config.json and a folder for each fraction and seed, with `checkpoint/`
(ready for `AutoModelForImageClassification`) and predictions.csv. A run that has ended is kept when started again.
"""

import logging
import os
import sys
from pathlib import Path

import transformers
from MMCLIP.modeling_mmclip import MMCLIPModel
from run_pretrain import save_run_config

from MMCLIP.evaluation import report
from MMCLIP.evaluation.checkpoints import load_whole
from MMCLIP.training.classification import load_processor, read_labelled_rows
from MMCLIP.training.classification_arguments import parse_classification_config
from MMCLIP.training.classification_runs import describe_data, run_all, summary_table, write_report


logger = logging.getLogger("run_classification")


def main(words: list[str] | None = None):
    arguments, data, training_arguments = parse_classification_config(words)
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != training_arguments.world_size:
        raise ValueError(
            f"{num_started} processes were started, but each would train alone: there are not as many GPUs. "
            "On a CPU add --use_cpu true."
        )
    if num_started > 1 and arguments.method == "probe":
        raise ValueError("A probe is fitted by one process: start it with python, without accelerate launch.")
    is_main = training_arguments.process_index == 0
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if training_arguments.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()

    # cheap checks first: a wrong checkpoint must not wait for the phantoms to be drawn
    processor = load_processor(arguments.model_name_or_path)
    load_whole(MMCLIPModel, arguments.model_name_or_path)
    with training_arguments.main_process_first(desc="preparing rows"):
        labelled = read_labelled_rows(arguments, data)
    counts = ", ".join(f"{len(rows)} {role} rows" for role, rows in labelled.rows.items())
    logger.info(f"{counts}; {len(labelled.labels)} labels: {', '.join(labelled.labels)}")

    output_dir = Path(training_arguments.output_dir)
    results = run_all(processor, labelled, (arguments, data, training_arguments))
    if is_main:
        save_run_config(output_dir / "run_config.json", arguments, data, training_arguments)
        results |= report.describe_run(arguments.model_name_or_path, describe_data(data))
        report.write_metrics(output_dir, results)
        path = write_report(output_dir, results)
        print(summary_table(results["classification"]), "", *report.caution_lines(results["overlaps"]), sep="\n")
        print(f"\ntable: {path}, metrics.json and a folder for each run beside it")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
