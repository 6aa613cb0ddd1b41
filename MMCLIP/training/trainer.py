"""MMCLIPTrainer: transformers' Trainer with MMCLIP's losses in the log and zero-shot AUROC as validation."""

import time
from collections import defaultdict

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from ..evaluation.zero_shot import evaluate_zero_shot
from ..text.masking import MASKING_COUNTS, masking_rates


class _SetEpoch(TrainerCallback):
    """Prompts, augmentation and masks are drawn from (seed, epoch, row); the Trainer tells nobody the epoch."""

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.train_dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # whole also when a run goes on within an epoch


class MMCLIPTrainer(Trainer):
    """Trains [`MMCLIPForPreTraining`] on an [`MMCLIPDataset`] with an [`MMCLIPCollator`], whose augmentation it applies
    where the batch is; losses on pixels see the augmented ones, and validation none.

    `eval_dataset` is a manifest of rows, `processing_class` the processor. Validation scores the rows zero-shot and
    gives `eval_macro_auroc` (and the AUROC of each label), so `metric_for_best_model: macro_auroc` keeps the best
    checkpoint. `validation_labels` limits the labels. Each loss is logged as `loss_NAME`, averaged since the last log,
    and with EntMLM the `masking_rates` of all texts since then.
    """

    def __init__(
        self, *args, validation_labels: list[str] | None = None, fully_labelled: tuple[str, ...] = (), **kwargs
    ):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs and would split each batch over them, prompts included. "
                "Start one process for each with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
            )
        # convolutions run faster with the channels last, on CPUs and on tensor cores; the numbers stay the same
        self.accelerator.unwrap_model(self.model).vision_model.to(memory_format=torch.channels_last)
        batch_size = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and self.train_dataset is not None and len(self.train_dataset) < batch_size:
            raise ValueError(
                f"{len(self.train_dataset)} training rows make no batch of {batch_size} (`per_device_train_batch_size` "
                "times processes), and `dataloader_drop_last` drops the rest. Lower one or leave out the other."
            )
        self.validation_labels, self.fully_labelled = validation_labels, fully_labelled
        self._loss_sums, self._num_losses = defaultdict(float), 0
        self._masking_counts = None
        self.add_callback(_SetEpoch(self.train_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        draws = inputs.pop("augmentation_draws", None)
        if draws is not None and model.training:
            augmentation = self.data_collator.augmentation
            inputs["pixel_values"] = augmentation(inputs["pixel_values"], draws, inputs["has_image"])
        counts = inputs.pop("masking_counts", None)
        outputs = model(**inputs)
        for name, value in outputs.loss_info.items():
            self._loss_sums[name] += value  # stays on the device: reading it here would wait for every step
        if counts is not None and model.training and "mlm" in outputs.loss_info:
            counts = counts.sum(dim=0)  # (7,), stays on the device too
            self._masking_counts = counts if self._masking_counts is None else self._masking_counts + counts
        self._num_losses += 1
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
            logs["similarity_scale"] = round(self.accelerator.unwrap_model(self.model).similarity_scale().item(), 2)
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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Zero-shot AUROC of the manifest rows; every process scores all of them and so has the same numbers."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.time()
        model = self.accelerator.unwrap_model(self.model)
        result, _ = evaluate_zero_shot(
            model,
            self.processing_class,
            rows,
            labels=self.validation_labels,
            fully_labelled=self.fully_labelled,
            batch_size=self.args.eval_batch_size,
            num_bootstrap=0,
        )
        result = result["zero_shot"]
        metrics = {f"{metric_key_prefix}_macro_auroc": result["macro_auroc"]}
        for label, scores in result["per_class"].items():
            metrics[f"{metric_key_prefix}_auroc_{label.replace(' ', '_')}"] = scores["auroc"]
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(rows)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
