"""Pretrain MMCLIP: accelerate launch examples/run_pretrain.py examples/configs/phantom_tiny.yaml [--key value ...]

OUTPUT_DIR gets `checkpoint/` (model, processor and code, ready for `AutoModel`), `run_config.json` (every argument as
it was resolved), `training_record.json` (what may be published of them), `train_results.json`, `trainer_state.json`
(the log) and the Trainer's own checkpoints.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import transformers

from MMCLIP.evaluation.zero_shot import check_scorable
from MMCLIP.hub.training_record import training_record, write_record
from MMCLIP.training.arguments import parse_run_config
from MMCLIP.training.building import build_datasets, build_model_and_processor, build_rows
from MMCLIP.training.recovery import checkpoint_problem, last_whole_checkpoint
from MMCLIP.training.trainer import MMCLIPTrainer


logger = logging.getLogger("run_pretrain")


def main():
    model_arguments, data_arguments, training_arguments = parse_run_config()
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != training_arguments.world_size:
        raise ValueError(
            f"{num_started} processes were started, but each would train alone: there are not as many GPUs. "
            "On a CPU add --use_cpu true."
        )
    is_main = training_arguments.process_index == 0
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    transformers.set_seed(training_arguments.seed)

    # cheap checks first: a wrong tokenizer or a missing image must not wait for the phantoms to be drawn
    model, processor = build_model_and_processor(model_arguments, data_arguments)
    with training_arguments.main_process_first(desc="preparing rows"):
        train_rows, validation_rows = build_rows(data_arguments)
        if validation_rows is not None and training_arguments.eval_strategy != "no":
            labels = data_arguments.validation_labels or None
            check_scorable(validation_rows, labels, tuple(data_arguments.fully_labelled))
        train_dataset, collator = build_datasets(
            train_rows, data_arguments, model, processor, seed=training_arguments.seed
        )
    model.config.training_sources = sorted({*(model.config.training_sources or ()), *train_rows.unique("source")})
    logger.info(
        f"{len(train_rows)} rows to train on, {len(validation_rows or ())} to validate on; prompt loss on "
        f"{', '.join(collator.prompt_labels) or 'no finding'}; {model.num_parameters() / 1e6:.1f} M parameters"
    )

    output_dir = Path(training_arguments.output_dir)
    checkpoint = training_arguments.resume_from_checkpoint
    if checkpoint in ("true", "True", "last"):
        checkpoint = last_whole_checkpoint(output_dir)
        checkpoint = None if checkpoint is None else str(checkpoint)
        logger.info(f"going on from {checkpoint or 'the start: there is no checkpoint yet'}")
    elif checkpoint is not None and (problem := checkpoint_problem(checkpoint)):
        raise ValueError(f"`resume_from_checkpoint`: {checkpoint} is no checkpoint to go on from, as {problem}.")
    arguments = (model_arguments, data_arguments, training_arguments)
    record = None
    if is_main:
        record = training_record(arguments, train_rows, validation_rows, model.num_parameters())
        save_run_config(output_dir / "run_config.json", *arguments)
        write_record(output_dir, record)
    trainer = MMCLIPTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=validation_rows,
        data_collator=collator,
        processing_class=processor,
        validation_labels=data_arguments.validation_labels or None,
        fully_labelled=tuple(data_arguments.fully_labelled),
        record=record,
    )
    results = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop_on_signal.has_stopped:
        logger.warning(
            f"stopped by signal {int(trainer.stop_on_signal.signal_number)} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; --resume_from_checkpoint last goes on"
        )
        return
    trainer.save_model(str(output_dir / "checkpoint.part"), _internal_call=True)  # pushed below, when all is saved
    if is_main:
        # a pickle, which nobody should load from a folder meant for others; run_config.json says the same
        (output_dir / "checkpoint.part" / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(output_dir / "checkpoint", ignore_errors=True)
        (output_dir / "checkpoint.part").rename(output_dir / "checkpoint")  # never half a model under the final name
    trainer.log_metrics("train", results.metrics)
    trainer.save_metrics("train", results.metrics, combined=False)
    trainer.save_state()
    logger.info(f"model, processor and code are in {output_dir / 'checkpoint'}")
    if training_arguments.push_to_hub:
        trainer.push_to_hub()


def save_run_config(path: Path, model_arguments, data_arguments, training_arguments):
    """Every argument as it was resolved, defaults included; to read, the next run takes the YAML file again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resolved = {
        "model": dataclasses.asdict(model_arguments),
        "data": dataclasses.asdict(data_arguments),
        "training": training_arguments.to_dict(),  # without the secrets
    }
    path.write_text(json.dumps(resolved, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
