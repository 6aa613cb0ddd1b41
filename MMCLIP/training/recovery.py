"""Stopping and going on: signals that save first, and which checkpoint is whole."""

import json
import logging
import signal
import threading
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback


logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, or Ctrl-C once, the run saves a checkpoint after the step at hand and ends; a second one kills it.

    `signal_number` is what came, None while nothing has. Of several processes all stop after the same step, the one
    after any of them was told to.
    """

    def __init__(self):
        self.signal_number = None
        self._handlers = {}
        self._told = None

    @property
    def has_stopped(self) -> bool:
        return self.signal_number is not None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return  # Python hears signals in the main thread alone
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number, frame):
        self.signal_number = number
        signal.signal(number, self._handlers[number])
        logger.warning(f"signal {number}: the run is saved after this step and ends; once more ends it at once")

    def on_step_end(self, args, state, control, **kwargs):
        stops = self.has_stopped
        if args.world_size > 1:
            before, self._told = self._told, torch.tensor(float(stops), device=args.device)
            torch.distributed.all_reduce(self._told)
            stops = before is not None and before.item() > 0  # that of the last step has long come: nobody waits
        if stops:
            self.signal_number = self.signal_number or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def ignore_signals() -> None:
    """Leave the signals of [`StopOnSignal`] to the process that this one works for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest `checkpoint-STEP` of a run that a run can go on from; newer ones that are not whole are warned of."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is passed over: {problem}")
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """Why a run cannot go on from `folder`, None where it can; contents are not compared, only whether all is there."""
    folder = Path(folder)
    state = folder / "trainer_state.json"
    if not folder.is_dir():
        return "there is no such folder"
    if not state.is_file():
        return "it has no trainer_state.json, which is written last, so the run was stopped while it was saving"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return "its trainer_state.json is cut off"
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*"), *folder.glob("global_step*")]
    if not weights:
        return "it has no weights"
    if not any((folder / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0")) and not list(
        folder.glob("global_step*")
    ):
        return "it has no optimiser, as `save_only_model` leaves it out"
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    for path in (path for ending in ("*.pt", "*.pth", "*.bin") for path in folder.glob(ending)):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None
