"""Contrastive batches larger than the memory: the towers see a few rows at a time, the losses all of them.

GradCache (Gao et al. 2021). The contrastive loss and those of findings depend on the towers through embeddings alone,
which are small. A first pass makes them without a graph, the losses give their gradients, and a second pass makes them
again, a few rows at a time, and sends these gradients through the towers. AttMIM and EntMLM see one row at a time and
take their gradients in the second pass. The result is the gradient of the whole batch, not of an average of small ones.
Where these two see a share of the rows, it is the first rows of each part, not of the whole batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..modeling_mmclip import MMCLIPForPreTraining, check_prompts, count_per_process, num_rebuilt_rows, rows_per_process


def cached_backward(
    model: MMCLIPForPreTraining,
    batch: Mapping[str, Tensor],
    chunk_size: int,
    factor: float = 1.0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradients of `factor` times the loss of `batch` to those of the parameters, `chunk_size` rows at a time.

    `batch` holds arguments of the model's forward, which runs under `autocast()`. Returns the loss, without `factor`,
    and its parts, all detached. The forward costs twice, the memory of the towers is that of a chunk. Dropout is drawn
    for each chunk, alike in both passes. In a distributed run the gradients are those of this process, still to be
    averaged over all.
    """
    batch = dict(batch)
    prompts = [batch.pop(name, None) for name in ("prompt_input_ids", "prompt_attention_mask")]
    labels, sides, group_ids = (batch.pop(name, None) for name in ("prompt_labels", "side_labels", "group_ids"))
    if prompts[0] is not None:
        check_prompts(prompts[0], labels, sides)
    pixel_values = batch["pixel_values"]
    if batch.get("has_image") is None:
        batch["has_image"] = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    if batch.get("attention_mask") is None:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if batch.get("mim_noise") is None:
        batch["mim_noise"] = torch.rand(len(pixel_values), model.num_patches, device=pixel_values.device)
    sizes = rows_per_process(len(pixel_values), pixel_values.device)
    num_hidden = _num_hidden(model, batch, chunk_size)

    prompt_embeds = prompt_leaf = None
    if prompts[0] is not None and (model.config.prompt_weight > 0 or model.config.local_weight > 0):
        with autocast():
            prompt_embeds = model.embed_prompts(*prompts)
        prompt_leaf = prompt_embeds.detach().requires_grad_()

    def encode(part: dict[str, Tensor]):
        rows = model.encode_rows(
            part["pixel_values"], part["input_ids"], part["attention_mask"], part.get("input_ids_masked")
        )
        return rows, {} if prompt_leaf is None else model.finding_logits(rows, prompt_leaf, labels.shape[1])

    cached, states = [], []
    for part in _chunks(batch, chunk_size):
        states.append(_random_state(pixel_values.device))
        with torch.no_grad(), autocast():
            rows, logits = encode(part)
            cached.append({"images": rows.image_embeds, "texts": rows.text_embeds, **logits})
    leaves = {name: torch.cat([part[name] for part in cached]).requires_grad_() for name in cached[0]}
    del cached

    findings = {name: leaf for name, leaf in leaves.items() if name not in ("images", "texts")}
    with autocast():
        losses = model.batch_losses(
            leaves["images"],
            leaves["texts"],
            findings,
            batch["has_image"],
            group_ids,
            {"prompt": labels, "local": labels, "side": sides},
            sizes,
        )
    if losses:
        (factor * model.total_loss(losses)).backward()
    losses = {name: loss.detach() for name, loss in losses.items()}

    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    parts = zip(states, _chunks(batch, chunk_size), _chunks(gradients, chunk_size), strict=True)
    for state, part, gradient in parts:
        with autocast():
            with _random_state_of(state, pixel_values.device):
                rows, logits = encode(part)
            rebuilt = model.rebuild(
                rows,
                part["pixel_values"],
                part["attention_mask"],
                part["has_image"],
                part.get("mlm_labels"),
                part.get("entity_mask"),
                part["mim_noise"],
                part.get("bool_masked_pos"),
                **num_hidden,
            ).losses
        outputs = {"images": rows.image_embeds, "texts": rows.text_embeds, **logits}
        total = sum((outputs[name] * values).sum() for name, values in gradient.items())
        (total + factor * model.total_loss(rebuilt)).backward()
        for name, loss in rebuilt.items():
            losses[name] = losses.get(name, 0) + loss.detach()
    if prompt_embeds is not None:
        prompt_embeds.backward(prompt_leaf.grad)
    return model.total_loss(losses), losses


def _num_hidden(model: MMCLIPForPreTraining, batch: Mapping[str, Tensor], chunk_size: int) -> dict[str, Tensor]:
    """How many patches and words the whole batch hides in the rows that are rebuilt, by which sums are divided."""
    config = model.config
    patches = words = torch.zeros((), dtype=torch.int64, device=batch["pixel_values"].device)
    for part in _chunks(batch, chunk_size):
        num_rows = len(part["pixel_values"])
        has_image = part["has_image"][: num_rebuilt_rows(config.mim_row_ratio, num_rows)]
        if (hidden := part.get("bool_masked_pos")) is None:
            patches = patches + has_image.sum() * round(config.mim_mask_ratio * model.num_patches)
        else:
            patches = patches + (hidden[: len(has_image)] & has_image[:, None]).sum()
        if (labels := part.get("mlm_labels")) is not None:
            words = words + (labels[: num_rebuilt_rows(config.mlm_row_ratio, num_rows)] != -100).sum()
    counts = {"num_hidden_patches": patches}
    if batch.get("mlm_labels") is not None:
        counts["num_hidden_words"] = words
    return {name: count_per_process(count) for name, count in counts.items()}


def _chunks(batch: Mapping[str, Tensor], chunk_size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, max(map(len, batch.values()), default=0), chunk_size):
        yield {name: values[start : start + chunk_size] for name, values in batch.items()}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_state_of(state: tuple[Tensor, Tensor | None], device: torch.device):
    """Draw from `state` again; afterwards the generators go on where they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def average_gradients(model: torch.nn.Module) -> None:
    """Replace the gradients of the parameters by their averages over all processes of a distributed run."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    messages = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for message, gradient in zip(messages, gradients, strict=True):
        message.wait()
        gradient /= torch.distributed.get_world_size()
