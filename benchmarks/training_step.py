"""What one optimiser step takes, and each part of it: python benchmarks/training_step.py --json FILE

The full step of MMCLIP (contrastive, AttMIM, EntMLM, prompts, local), its contrastive-only step, the step of
transformers' VisionTextDualEncoderModel with towers of the same size (three channels, as its users have), and the full
step as one writes it without care: the masked image and the masked text each in a pass of their own, every text padded
to 128 tokens and all of them scored against the vocabulary. Same batch, texts and optimiser for all, in turns. Texts
are as long as Open-i reports; those "of one length" have their mean, as batches bucketed by length have, and so no
padding. Peak memory is that of a fresh process each, model and optimiser included, with MALLOC_MMAP_THRESHOLD_ set so
that what is freed is given back. On a GPU all is in bf16, the batch comes from the host's memory in each step, and MFU
is measured; the batch itself is made once, so the time of loading data is not in it. Without a GPU ViT-B takes some ten
minutes and 15 GB. `--quick` only shows that it runs.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from benchmark_tools import add_processor_time, argument_parser, in_turns, machine, write_results
from MMCLIP.modeling_mmclip import (
    contrastive_loss,
    finding_loss,
    local_prompt_logits,
    masked_patch_loss,
    masked_token_loss,
    normalise_patches,
    patchify,
    prompt_directions,
    prompt_logits,
    select_masked_patches,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from MMCLIP import MMCLIPConfig, MMCLIPForPreTraining, MMCLIPProcessor
from MMCLIP.text.prompts import negative_prompts, positive_prompts


# share of reports -> tokens: findings and impression of the 3,927 Open-i reports with a text, by the shipped tokenizer,
# cut to its 256 tokens (`report_text`; the mean is 47.4)
LENGTH_QUANTILES = {
    0: 6, 0.01: 12, 0.05: 21, 0.1: 25, 0.2: 30, 0.3: 34, 0.4: 38, 0.5: 42, 0.6: 46, 0.7: 52, 0.8: 62, 0.9: 76,
    0.95: 92, 0.98: 113, 0.99: 132, 0.995: 153, 0.999: 203, 1: 256,
}  # fmt: skip
MEAN_LENGTH = 47
HIDDEN_SHARE = 0.25  # of their tokens, hidden by MMCLIPCollator with its defaults
PROMPT_LABELS = (  # as in examples/configs/mimic_padchest_vitb16.yaml
    "atelectasis", "cardiomegaly", "consolidation", "edema", "fracture", "lung opacity", "pleural effusion",
    "pneumonia", "pneumothorax", "support device",
)  # fmt: skip
NAIVE_LENGTH = 128
# width, layers and image side of both towers; 64 wide heads, the decoders half as wide (ViT-B/16 and BERT-base last)
SIZES = {"quick": (64, 1, 32), "ti": (192, 12, 224), "s": (384, 12, 224), "b": (768, 12, 224)}
BFLOAT16_FLOPS = {  # dense, of the data sheets; by a part of the GPU's name, the first that fits
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "A10G": 70e12,
}  # fmt: skip
# name -> model, how its texts are padded
STEPS = {
    "full": ("full", "longest"),
    "contrastive": ("contrastive", "longest"),
    "dual_encoder": ("dual_encoder", "longest"),
    "dual_encoder_128": ("dual_encoder", "128"),
    "naive": ("naive", "128"),
    "full_even": ("full", "none"),
    "contrastive_even": ("contrastive", "none"),
}
LABELS = {
    "full": "full MMCLIP",
    "contrastive": "contrastive-only MMCLIP",
    "dual_encoder": "VisionTextDualEncoderModel",
    "dual_encoder_128": "VisionTextDualEncoderModel, texts padded to 128 tokens",
    "naive": "naive full MMCLIP",
    "full_even": "full MMCLIP, texts of one length",
    "contrastive_even": "contrastive-only MMCLIP, texts of one length",
}
# what is measured, and the target of it where there is one
MEASURES = {
    "contrastive_speedup": ("contrastive-only step, times as fast as the dual encoder's", ">=", 1),
    "contrastive_speedup_128": ("the same with its texts padded to 128 tokens", ">=", 1),
    "full_ratio": ("full step, times as long as the contrastive-only step", "<=", 1.35),
    "full_ratio_even": ("the same, texts of one length", "<=", 1.35),
    "full_ratio_dual_encoder": ("full step, times as long as the dual encoder's",),
    "full_ratio_dual_encoder_128": ("the same with its texts padded to 128 tokens",),
    "naive_ratio": ("naive full step, times as long as the contrastive-only step",),
    **{f"samples_{name}": (f"{label}, samples a second",) for name, label in LABELS.items()},
    **{f"memory_{name}_mb": (f"{LABELS[name]}, peak memory, MB",) for name in list(STEPS)[:5]},
    "checkpointing_memory_ratio": (
        "peak memory of the full step, times the contrastive-only step's, both with gradient checkpointing", "<=", 1.15
    ),
    "memory_full_checkpointing_mb": ("full MMCLIP with gradient checkpointing, peak memory, MB",),
    "memory_contrastive_checkpointing_mb": ("contrastive-only MMCLIP with it, MB",),
    "flops_ratio": ("floating-point operations of the full step, times the contrastive-only step's",),
    "mfu": ("full step, share of the GPU's bf16 peak (MFU)", ">=", 0.45),
    "mfu_contrastive": ("contrastive-only step, share of it",),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- models and batches


def mmclip_config(size: str, **fields) -> MMCLIPConfig:
    width, num_layers, side = SIZES[size]
    tower = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    return MMCLIPConfig(
        vision_config={"model_type": "vit", "num_channels": 1, "image_size": side, "patch_size": 16, **tower},
        text_config={"model_type": "bert", "vocab_size": 6144, **tower},
        decoder_hidden_size=width // 2,
        decoder_num_heads=max(width // 128, 1),
        **fields,
    )


def make_model(kind: str, size: str) -> nn.Module:
    if kind == "dual_encoder":
        config = mmclip_config(size)
        config.vision_config.num_channels = 3
        return VisionTextDualEncoderModel(
            VisionTextDualEncoderConfig.from_vision_text_configs(config.vision_config, config.text_config)
        )
    weights = dict.fromkeys(("mim_weight", "mlm_weight", "prompt_weight", "local_weight"), int(kind != "contrastive"))
    model = MMCLIPForPreTraining(mmclip_config(size, **weights, mim_row_ratio=1.0, mlm_row_ratio=1.0))
    if kind != "naive":
        model.vision_model.to(memory_format=torch.channels_last)  # as MMCLIPTrainer does
    return model


def text_lengths(batch_size: int, padding: str) -> list[int]:
    """Tokens of each text of a batch: evenly spread over the reports, or their mean without padding."""
    if padding == "none":
        return [MEAN_LENGTH] * batch_size
    shares = (np.arange(batch_size) + 0.5) / batch_size
    lengths = np.interp(shares, list(LENGTH_QUANTILES), list(LENGTH_QUANTILES.values())).round().astype(int)
    return lengths.clip(max=NAIVE_LENGTH if padding == "128" else None).tolist()


def make_batch(kind: str, size: str, batch_size: int, padding: str) -> dict:
    """The arguments of the model's forward, on the CPU; with `padding` "128" all texts have that many tokens."""
    draws = torch.Generator().manual_seed(0)
    lengths = text_lengths(batch_size, padding)
    num_tokens = NAIVE_LENGTH if padding == "128" else max(lengths)
    side = SIZES[size][2]
    attention_mask = (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(10, 6144, attention_mask.shape, generator=draws) * attention_mask
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch_size, 1, side, side, generator=draws),
    }
    if kind == "dual_encoder":
        return {**batch, "pixel_values": batch["pixel_values"].repeat(1, 3, 1, 1), "return_loss": True}
    batch |= {"has_image": torch.ones(batch_size, dtype=torch.bool), "group_ids": torch.arange(batch_size)}
    if kind == "contrastive":
        return batch
    is_hidden = (torch.rand(input_ids.shape, generator=draws) < HIDDEN_SHARE) & (attention_mask == 1)
    is_hidden[:, 1] = True  # one at least
    prompts = [pair[0] for label in PROMPT_LABELS for pair in (positive_prompts(label), negative_prompts(label))]
    padding_options = {"padding": "max_length", "max_length": NAIVE_LENGTH} if kind == "naive" else {}
    encoded = MMCLIPProcessor()(text=prompts, **padding_options)
    return batch | {
        "input_ids_masked": input_ids.masked_fill(is_hidden, 4),
        "mlm_labels": input_ids.masked_fill(~is_hidden, -100),
        "entity_mask": is_hidden,
        "mim_noise": torch.rand(batch_size, (side // 16) ** 2, generator=draws),
        "prompt_input_ids": encoded["input_ids"],
        "prompt_attention_mask": encoded["attention_mask"],
        "prompt_labels": torch.randint(0, 2, (batch_size, len(PROMPT_LABELS)), generator=draws).float(),
    }


def naive_loss(model: MMCLIPForPreTraining, batch: dict) -> Tensor:
    """The losses of MMCLIP with heads of the same size, one loss after the other and each with its own passes."""
    pixel_values, mask, scale = batch["pixel_values"], batch["attention_mask"], model.similarity_scale()
    pooled_image, patch_tokens, _ = model.encode_image(pixel_values)
    pooled_text, text_tokens, _ = model.encode_text(batch["input_ids"], mask)
    image_embeds, text_embeds = model.project_image(pooled_image), model.project_text(pooled_text)
    total = contrastive_loss(image_embeds, text_embeds, scale, batch["group_ids"])

    attention = model.attention_to_patches(patch_tokens, text_embeds).detach()
    is_hidden = select_masked_patches(batch["mim_noise"], model.config.mim_mask_ratio, attention)
    rows = pixel_values.shape[-1] // model.patch_size
    pixels = is_hidden.unflatten(1, (rows, rows)).repeat_interleave(model.patch_size, 1)
    pixels = pixels.repeat_interleave(model.patch_size, 2)[:, None]  # (B, 1, S, S)
    seen_patches = model.encode_image(pixel_values.masked_fill(pixels, 0))[1]
    mim_logits = model.mim_head(seen_patches, is_hidden, text_tokens, mask)
    targets = normalise_patches(patchify(pixel_values, model.patch_size))
    total = total + masked_patch_loss(mim_logits, targets, is_hidden)

    masked_tokens = model.encode_text(batch["input_ids_masked"], mask)[1]
    words = model.text_model.get_input_embeddings().weight
    mlm_logits = model.mlm_head(masked_tokens, mask, patch_tokens, word_embeddings=words)  # (B, T, vocab)
    total = total + F.cross_entropy(mlm_logits.flatten(0, 1).float(), batch["mlm_labels"].flatten())

    return total + prompt_losses(model, batch, image_embeds, patch_tokens)


def prompt_losses(model: MMCLIPForPreTraining, batch: dict, image_embeds: Tensor, patch_tokens: Tensor) -> Tensor:
    embeds = model.embed_prompts(batch["prompt_input_ids"], batch["prompt_attention_mask"])
    directions, scale, labels = prompt_directions(embeds), model.similarity_scale(), batch["prompt_labels"]
    of_patches = local_prompt_logits(model.project_image(patch_tokens), directions, scale)
    return finding_loss(prompt_logits(image_embeds, directions, scale), labels) + finding_loss(of_patches, labels)


class Trained:
    """A model on its device with its optimiser, AdamW as the Trainer makes it."""

    def __init__(self, kind: str, size: str, device: torch.device, checkpointing: bool = False):
        if size == "quick":
            torch.set_num_threads(1)  # so little work only waits for a second thread
        torch.manual_seed(0)
        self.kind, self.device = kind, device
        self.model = make_model(kind, size).to(device).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def on_device(self, batch: dict) -> dict:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def step(self, batch: dict) -> None:
        batch = self.on_device(batch)
        with self.autocast():
            loss = naive_loss(self.model, batch) if self.kind == "naive" else self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill_optimizer(self) -> None:
        """Its moments exist from the first step on."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------------- the measures


def memory(field: str) -> float | None:
    """MB of this process, of a line of /proc/self/status; None where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


def peak_memory(before: float | None, device: torch.device) -> float | None:
    """MB at the peak of this process over the `before` that it held; on a GPU what torch had of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return None if before is None else memory("VmHWM") - before


def memory_and_flops(
    name: str, size: str, batch_size: int, device: torch.device, checkpointing: bool
) -> tuple[float | None, int | None]:
    """MB at the peak of a step, None where it cannot be told, and its operations, None with checkpointing."""
    transformers.logging.set_verbosity_error()
    before = memory("VmRSS")
    kind, padding = STEPS[name]
    trained, batch = Trained(kind, size, device, checkpointing), make_batch(kind, size, batch_size, padding)
    trained.fill_optimizer()
    if checkpointing:
        counter = nullcontext()  # the counter would keep what checkpointing lets go
    else:
        # it knows the attention of GPUs alone
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        flop_registry.update({on_cpu: sdpa_flop, on_cpu_backward: sdpa_backward_flop})
        counter = FlopCounterMode(display=False)
    with counter:
        trained.step(batch)
    return peak_memory(before, device), None if checkpointing else counter.get_total_flops()


def measure_memory(
    size: str, batch_size: int, checkpointing_batch_size: int, device: torch.device
) -> tuple[dict[str, float | None], dict[str, int]]:
    runs = {name: (name, batch_size, False) for name in list(STEPS)[:5]}
    runs |= {f"{name}_checkpointing": (name, checkpointing_batch_size, True) for name in ("full", "contrastive")}
    peaks, flops = {}, {}
    # glibc would keep freed tensors of medium size in its heap, often more of them than the step holds
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    for group in [list(runs)] if size == "quick" else [[run] for run in runs]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a fresh one for each, but in a quick run
            for run in group:
                name, number, checkpointing = runs[run]
                found = pool.submit(memory_and_flops, name, size, number, device, checkpointing).result()
                peaks[f"memory_{run}_mb"], flops[run] = found
    full, contrastive = (peaks[f"memory_{name}_checkpointing_mb"] for name in ("full", "contrastive"))
    results = {**peaks, "checkpointing_memory_ratio": None if full is None else full / contrastive}
    return results | {"flops_ratio": flops["full"] / flops["contrastive"]}, flops


def timed(function: Callable, device: torch.device, *arguments) -> Callable[[], None]:
    def run():
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def measure_steps(
    trained: dict[str, Trained], size: str, batch_size: int, num_rounds: int, clock: Callable
) -> tuple[dict[str, float], dict[str, float]]:
    steps = {}
    for name, (kind, padding) in STEPS.items():
        batch, device = make_batch(kind, size, batch_size, padding), trained[kind].device
        if device.type == "cuda":
            batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        steps[name] = timed(trained[kind].step, device, batch)
    seconds = in_turns(num_rounds, clock, **steps)
    return {
        "contrastive_speedup": seconds["dual_encoder"] / seconds["contrastive"],
        "contrastive_speedup_128": seconds["dual_encoder_128"] / seconds["contrastive"],
        "full_ratio": seconds["full"] / seconds["contrastive"],
        "full_ratio_even": seconds["full_even"] / seconds["contrastive_even"],
        "full_ratio_dual_encoder": seconds["full"] / seconds["dual_encoder"],
        "full_ratio_dual_encoder_128": seconds["full"] / seconds["dual_encoder_128"],
        "naive_ratio": seconds["naive"] / seconds["contrastive"],
        **{f"samples_{name}": batch_size / value for name, value in seconds.items()},
    }, seconds


def measure_parts(trained: Trained, batch: dict, num_rounds: int, clock: Callable) -> dict[str, float]:
    """Seconds forward and backward of each part of the full step, with what comes from other parts held fixed."""
    model, batch = trained.model, trained.on_device(batch)
    pixel_values, mask, has_image = batch["pixel_values"], batch["attention_mask"], batch["has_image"]
    with torch.no_grad(), trained.autocast():
        pooled_image, patch_tokens, _ = model.encode_image(pixel_values)
        pooled_text, text_tokens, _ = model.encode_text(batch["input_ids"], mask)

    def leaf(tensor):
        return tensor.detach().requires_grad_()

    def contrastive():
        image_embeds, text_embeds = model.project_image(leaf(pooled_image)), model.project_text(leaf(pooled_text))
        return contrastive_loss(image_embeds, text_embeds, model.similarity_scale(), batch["group_ids"], has_image)

    def attmim():
        tokens, texts = leaf(patch_tokens), leaf(text_tokens)
        attention = model.attention_to_patches(patch_tokens, model.project_text(pooled_text)).detach()
        is_hidden = select_masked_patches(batch["mim_noise"], model.config.mim_mask_ratio, attention)
        targets = normalise_patches(patchify(pixel_values, model.patch_size))
        return masked_patch_loss(model.mim_head(tokens, is_hidden, texts, mask), targets, is_hidden)

    def entmlm():
        is_masked, words = batch["mlm_labels"] != -100, model.text_model.get_input_embeddings().weight
        logits = model.mlm_head(leaf(text_tokens), mask, leaf(patch_tokens), is_masked, word_embeddings=words)
        return masked_token_loss(logits, batch["mlm_labels"][is_masked])

    losses = {
        "image_tower": lambda: model.encode_image(pixel_values)[1].float().sum(),
        "text_tower": lambda: model.encode_text(batch["input_ids"], mask)[1].float().sum(),
        "text_tower_masked": lambda: model.encode_text(batch["input_ids_masked"], mask)[1].float().sum(),
        "contrastive": contrastive,
        "attmim": attmim,
        "entmlm": entmlm,
        "prompts": lambda: prompt_losses(model, batch, model.project_image(leaf(pooled_image)), leaf(patch_tokens)),
    }

    def forward_backward(loss):
        with trained.autocast():
            value = loss()
        value.backward()

    parts = {name: timed(forward_backward, trained.device, loss) for name, loss in losses.items()}
    seconds = in_turns(num_rounds, clock, **parts, optimizer=timed(trained.optimizer.step, trained.device))
    trained.optimizer.zero_grad()
    return seconds


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in BFLOAT16_FLOPS.items() if part in name), None)


def run(
    size: str,
    batch_size: int,
    checkpointing_batch_size: int,
    device: torch.device,
    num_rounds: int,
    clock: Callable,
) -> tuple[dict[str, float | None], dict]:
    # before this process fills the GPU itself
    results, flops = measure_memory(size, batch_size, checkpointing_batch_size, device)
    trained = {kind: Trained(kind, size, device) for kind, _ in STEPS.values()}
    times, seconds = measure_steps(trained, size, batch_size, num_rounds, clock)
    parts = measure_parts(trained["full"], make_batch("full", size, batch_size, "longest"), num_rounds, clock)
    if peak := peak_flops(device):
        results["mfu"] = flops["full"] / seconds["full"] / peak
        results["mfu_contrastive"] = flops["contrastive"] / seconds["contrastive"] / peak
    shares = {name: value / seconds["full"] for name, value in parts.items()}
    print("parts of the full step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    details = {"seconds": seconds, "seconds_of_parts": parts, "shares_of_parts": shares, "flops": flops}
    return results | times, details


def main():
    parser = argument_parser(__doc__.partition(":")[0])
    parser.add_argument("--size", choices=("ti", "s", "b"), default="b", help="ViT and BERT of this width (default b)")
    parser.add_argument("--batch_size", type=int, help="default 8, on a GPU 256")
    parser.add_argument("--checkpointing_batch_size", type=int, help="of its peak memory; left out, as batch_size")
    add_processor_time(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    batch_size = arguments.batch_size or (256 if device.type == "cuda" else 8)
    size, num_rounds = arguments.size, 20 if device.type == "cuda" else 2
    if arguments.quick:
        size, batch_size, num_rounds = "quick", 4, 1
    checkpointing_batch_size = arguments.checkpointing_batch_size or batch_size
    clock = time.process_time if arguments.processor_time else time.perf_counter
    start = time.perf_counter()
    results, details = run(size, batch_size, checkpointing_batch_size, device, num_rounds, clock)
    about = {
        **machine(str(torch.get_num_threads()), ("torch", "transformers")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bfloat16" if device.type == "cuda" else "float32",
        "size": size,
        "batch_size": batch_size,
        "checkpointing_batch_size": checkpointing_batch_size,
        "clock": clock.__name__,
        "longest_text": max(text_lengths(batch_size, "longest")),
        "seconds": round(time.perf_counter() - start),
        "quick": arguments.quick,
    }
    write_results(MEASURES, results, about, arguments.json, details)


if __name__ == "__main__":
    main()
