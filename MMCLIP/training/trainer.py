"""MMCLIPTrainer: transformers' Trainer with MMCLIP's losses in the log and zero-shot AUROC as validation."""

import functools
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker, speed_metrics

from ..evaluation.zero_shot import evaluate_zero_shot
from ..text.masking import MASKING_COUNTS, masking_rates
from .compiling import compile_parts
from .grad_cache import average_gradients, cached_backward
from .pushing import PushingTrainer
from .recovery import StopOnSignal, ignore_signals, last_whole_checkpoint
from .sampler import MMCLIPBatchSampler
from .sharding import prepare_for_sharding, shard_on_cpu_too


class _SetEpoch(TrainerCallback):
    """Prompts, augmentation and masks are drawn from (seed, epoch, row); the Trainer tells nobody the epoch."""

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.train_dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # whole also when a run goes on within an epoch


class MMCLIPTrainer(PushingTrainer):
    """Trains [`MMCLIPForPreTraining`] on an [`MMCLIPDataset`] with an [`MMCLIPCollator`], whose augmentation it applies
    where the batch is; losses on pixels see the augmented ones, and validation none.

    `eval_dataset` is a manifest of rows, `processing_class` the processor. Validation scores the rows zero-shot and
    gives `eval_macro_auroc` (and the AUROC of each label), so `metric_for_best_model: macro_auroc` keeps the best
    checkpoint. `validation_labels` limits the labels. Each loss is logged as `loss_NAME`, averaged since the last log,
    and with EntMLM the `masking_rates` of all texts since then. `record` is the `training_record` of the run, of which
    `push_to_hub` makes the model card.
    """

    def __init__(
        self,
        *args,
        validation_labels: list[str] | None = None,
        fully_labelled: tuple[str, ...] = (),
        record: dict | None = None,
        **kwargs,
    ):
        self.record = record
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs and would split each batch over them, prompts included. "
                "Start one process for each with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
            )
        self._model_class = type(self.model)
        if self.is_fsdp_enabled:
            prepare_for_sharding(self.accelerator, self.model)
        else:
            # convolutions run faster with the channels last, on CPUs and on tensor cores; the numbers stay the same
            self.accelerator.unwrap_model(self.model).vision_model.to(memory_format=torch.channels_last)
        compile_parts(self.accelerator, self.accelerator.unwrap_model(self.model), self.args)
        if self.args.grad_cache_rows is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "`grad_cache_rows` works with one process or DDP, not with FSDP or DeepSpeed; leave it out."
            )
        self._sampler = None if self.train_dataset is None else self._batch_sampler()  # says now what does not fit
        self.validation_labels, self.fully_labelled = validation_labels, fully_labelled
        self._loss_sums, self._num_losses = defaultdict(float), 0
        self._masking_counts = None
        self.add_callback(_SetEpoch(self.train_dataset))
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)

    def _batch_sampler(self) -> MMCLIPBatchSampler:
        args = self.args
        return MMCLIPBatchSampler(
            self.train_dataset,
            args.train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_processes=args.world_size,
            process_index=args.process_index,
            drop_last=args.dataloader_drop_last,
            text_lengths=self.train_dataset.text_lengths() if args.group_by_text_length else None,
        )

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process; the sampler has shared them out, so nobody else must."""
        args = self.args
        names = (
            "num_workers",
            "pin_memory",
            "persistent_workers",
            "prefetch_factor",
            "multiprocessing_context",
            "in_order",
        )
        options = {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}
        start = functools.partial(_start_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            worker_init_fn=start,
            **options,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            non_blocking=self.accelerator.non_blocking,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, and an error that names the rows of the batch where a loss is NaN or infinite."""
        row_ids = inputs.pop("row_ids", ())
        if self.args.grad_cache_rows is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._cached_training_step(model, inputs)
        if not math.isfinite(loss):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in self._last_losses.items())
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()} ({parts}). Look at the images and "
                f"texts of these rows, or lower the learning rate: {', '.join(row_ids)}. {self._last_checkpoint()}"
            )
        return loss

    def _cached_training_step(self, model, inputs):
        """Forward and backward of the whole batch, `grad_cache_rows` rows at a time."""
        model.train()
        inputs = self._batch_for_model(self._prepare_inputs(inputs), is_training=True)
        plain = self.accelerator.unwrap_model(model)
        num_steps = self.current_gradient_accumulation_steps
        loss, parts = cached_backward(
            plain, inputs, self.args.grad_cache_rows, 1 / num_steps, self.compute_loss_context_manager
        )
        # DDP has seen no forward, so it waits for no gradient
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            average_gradients(plain)
        self._count_losses(parts)
        return loss / num_steps

    def _batch_for_model(self, inputs: dict, is_training: bool) -> dict:
        """The arguments of the forward: images augmented, and what else the collator gave put aside."""
        draws = inputs.pop("augmentation_draws", None)
        if draws is not None and is_training:
            augmentation = self.data_collator.augmentation
            inputs["pixel_values"] = augmentation(inputs["pixel_values"], draws, inputs["has_image"])
        counts = inputs.pop("masking_counts", None)
        if counts is not None and is_training and self.model.config.mlm_weight > 0:
            counts = counts.sum(dim=0)  # (7,), stays on the device
            self._masking_counts = counts if self._masking_counts is None else self._masking_counts + counts
        inputs.pop("row_ids", None)
        return inputs

    def _count_losses(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self._loss_sums[name] += value  # stays on the device: reading it here would wait for every step
        self._last_losses = losses
        self._num_losses += 1

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpu_too(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def autocast_smart_context_manager(self, *args, **kwargs):
        # accelerate puts the forward of every model under autocast, but not that of a sharded one
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**self._batch_for_model(inputs, model.training))
        self._count_losses(outputs.loss_info)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self._num_losses:
            for name, total in self._loss_sums.items():
                mean = self.accelerator.reduce(torch.as_tensor(total), reduction="mean").item() / self._num_losses
                logs[f"loss_{name}"] = round(mean, 4)
            if self._masking_counts is not None:
                counts = self.accelerator.reduce(self._masking_counts, reduction="sum").tolist()
                rates = masking_rates(dict(zip(MASKING_COUNTS, counts, strict=True)))
                logs.update((name, round(rate, 4)) for name, rate in rates.items())
            scale = self.accelerator.unwrap_model(self.model).similarity_scale()
            scale = scale.full_tensor() if isinstance(scale, DTensor) else scale  # a shard under FSDP
            logs["similarity_scale"] = round(scale.item(), 2)
            self._loss_sums, self._num_losses, self._masking_counts = defaultdict(float), 0, None
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices and kernels decay; biases, norms, single vectors and the temperature do not."""
        shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
        free = ("token", "position_embeddings")
        names = super().get_decay_parameter_names(model)
        return [name for name in names if shapes[name] > 1 and not name.endswith(free)]

    def create_optimizer(self, *args, **kwargs):
        super().create_optimizer(*args, **kwargs)
        rate = self.args.text_learning_rate
        if rate is not None:
            model = self.accelerator.unwrap_model(self.model)
            text = {id(parameter) for parameter in model.text_model.parameters()}
            groups = []
            for group in self.optimizer.param_groups:
                others = [parameter for parameter in group["params"] if id(parameter) not in text]
                towers = [parameter for parameter in group["params"] if id(parameter) in text]
                groups += [{**group, "params": others}, {**group, "params": towers, "lr": rate}]
            self.optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return self.optimizer

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next and says that all is there: also what other processes write
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint that is whole or does not count; raises OSError with what to do where the disk fails.

        `trainer_state.json` is written last, and its absence marks a folder as not whole.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"After step {self.state.global_step} the weights {name} hold NaN or infinity, so they are not "
                    f"saved. Lower the learning rate. {self._last_checkpoint()}"
                )
        if self.args.should_save:
            (folder / "trainer_state.json").unlink(missing_ok=True)  # of a run that came this far before
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # not from torch.save
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} cannot be written ({error}). Is the disk full, or the folder not writable? "
                f"{self._last_checkpoint()}"
            ) from error

    def _last_checkpoint(self) -> str:
        """Where a run that stops here can go on from, as a sentence."""
        found = last_whole_checkpoint(self.args.output_dir)
        if found is None:
            return "There is no checkpoint to go on from."
        return f"The last whole checkpoint is {found}; --resume_from_checkpoint last goes on from it."

    def _save(self, output_dir=None, state_dict=None):
        if not self.is_fsdp_enabled or not state_dict:
            return super()._save(output_dir, state_dict)
        # gathered weights, to be saved as those of a model that was never sharded: FSDP has changed its class
        state_dict["logit_scale"] = state_dict["logit_scale"].reshape(())
        sharded_class, self.model.__class__ = type(self.model), self._model_class
        super()._save(output_dir, state_dict)
        self.model.__class__ = sharded_class

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Zero-shot AUROC of the manifest rows; every process scores all of them and so has the same numbers."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.time()
        model = self.accelerator.unwrap_model(self.model)
        model.zero_shot = functools.partial(
            evaluate_zero_shot,
            model,
            self.processing_class,
            rows,
            labels=self.validation_labels,
            fully_labelled=self.fully_labelled,
            batch_size=self.args.eval_batch_size,
            num_bootstrap=0,
        )
        register_fsdp_forward_method(model, "zero_shot")  # the weights are whole in it, as in a forward
        with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for training
            result = model.zero_shot()[0]["zero_shot"]
        del model.zero_shot
        metrics = {f"{metric_key_prefix}_macro_auroc": result["macro_auroc"]}
        for label, scores in result["per_class"].items():
            metrics[f"{metric_key_prefix}_auroc_{label.replace(' ', '_')}"] = scores["auroc"]
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(rows)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _start_worker(worker_id: int, num_workers: int, rank: int) -> None:
    ignore_signals()  # the process that saves still needs the workers
    seed_worker(worker_id, num_workers, rank)
