"""What a step of each row costs, for rows of equal time: measured in one process, in turns, data included."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from ..training.arguments import parse_run_config
from ..training.building import build_datasets, build_model_and_processor, build_rows
from .bench import Bench, with_table


def step_costs(
    bench: Bench, rows: Sequence[str], num_rounds: int = 21, table: Path | None = None
) -> dict[str, dict[str, float]]:
    """Row -> stage -> seconds of processor time of one step: reading, collating, forward, backward and optimiser.

    All take turns; the median of `num_rounds`. On a GPU the time of the clock, as the processor only waits there.
    `table` is that of a fold, where the bench has folds.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    steps = {(row, stage): _steps(bench, row, stage, table) for row in rows for stage in bench.shares(row)}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(num_rounds + 2):  # the first two warm up
        for key, step in steps.items():
            start = clock()
            next(step)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[key].append(clock() - start)
    return {row: {stage: statistics.median(seconds[row, stage][2:]) for stage in bench.shares(row)} for row in rows}


def equal_steps(bench: Bench, rows: Sequence[str]) -> dict[str, dict[str, int]]:
    """Row -> stage -> steps, `bench.steps` in all."""
    steps = {row: {stage: round(share * bench.steps) for stage, share in bench.shares(row).items()} for row in rows}
    for stages in steps.values():
        stages["main"] = bench.steps - stages.get("first", 0)
    return steps


def equal_time_steps(bench: Bench, costs: dict[str, dict[str, float]]) -> dict[str, dict[str, int]]:
    """Row -> stage -> steps that take as long as `bench.steps` of the reference row, at least one."""
    seconds = bench.steps * costs[bench.reference]["main"]
    return {
        row: {stage: max(1, round(share * seconds / costs[row][stage])) for stage, share in bench.shares(row).items()}
        for row in costs
    }


def _steps(bench: Bench, row: str, stage: str, table: Path | None) -> Iterator[None]:
    """Training steps of a row without end."""
    arguments = with_table(bench.arguments(row, 0, bench.steps, stage), table) + ["--output_dir", "unused"]
    model_arguments, data_arguments, training_arguments = parse_run_config(arguments)
    set_seed(0)
    model, processor = build_model_and_processor(model_arguments, data_arguments)
    rows, _ = build_rows(data_arguments)
    dataset, collator = build_datasets(rows, data_arguments, model, processor, seed=0)
    collator.for_trainer = False  # what it then adds is for the log
    device = training_arguments.device
    model.to(device).train()
    model.vision_model.to(memory_format=torch.channels_last)  # as MMCLIPTrainer does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    draws = np.random.default_rng(0)
    while True:
        chosen = draws.choice(len(dataset), training_arguments.per_device_train_batch_size, replace=False)
        batch = collator([dataset[int(index)] for index in chosen])
        batch = {name: value.to(device) for name, value in batch.items()}
        changes = batch.pop("augmentation_draws", None)
        if changes is not None:
            batch["pixel_values"] = collator.augmentation(batch["pixel_values"], changes, batch["has_image"])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield
