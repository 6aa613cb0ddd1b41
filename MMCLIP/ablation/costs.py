"""What a step of each row costs, for rows of equal time: measured in one process, in turns, data included."""

import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import set_seed

from ..training.arguments import parse_run_config
from ..training.building import build_datasets, build_model_and_processor, build_rows
from .bench import Bench


def step_costs(bench: Bench, rows: Sequence[str], num_rounds: int = 7) -> dict[str, float]:
    """Row -> seconds of processor time of one step: reading, collating, forward, backward and optimiser.

    All rows take turns; the median of `num_rounds`. On a GPU the time of the clock, as the processor only waits there.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    steps = {row: _steps(bench, row) for row in rows}
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(num_rounds + 2):  # the first two warm up
        for row, step in steps.items():
            start = clock()
            next(step)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[row].append(clock() - start)
    return {row: statistics.median(values[2:]) for row, values in seconds.items()}


def equal_time_steps(bench: Bench, costs: dict[str, float]) -> dict[str, int]:
    """Row -> steps that take as long as `bench.steps` of the reference row, at least one."""
    return {row: max(1, round(bench.steps * costs[bench.reference] / cost)) for row, cost in costs.items()}


def _steps(bench: Bench, row: str) -> Iterator[None]:
    """Training steps of a row without end."""
    arguments = [*bench.arguments(row, 0, bench.steps), "--output_dir", "unused"]
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
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield
