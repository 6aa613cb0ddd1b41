"""MMCLIP: loss functions, then decoders, then the models. One batch walks through `MMCLIPForPreTraining.forward`."""

import difflib
import inspect
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers import initialization as init
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mmclip import MMCLIPConfig, max_text_length


# ------------------------------------------------------------------------------------------------ losses and masking


def _num_processes() -> int:
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_running else 1


def rows_per_process(num_rows: int, device: torch.device) -> list[int]:
    """How many rows each process holds, in rank order; only the last batch of an epoch may be shared out unevenly."""
    if _num_processes() == 1:
        return [num_rows]
    counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(_num_processes())]
    torch.distributed.all_gather(counts, torch.tensor([num_rows], device=device))
    return torch.cat(counts).tolist()


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate a tensor over all processes; its gradient is summed over them. Works on gloo and NCCL."""

    @staticmethod
    def forward(ctx, tensor, sizes):
        ctx.sizes = sizes
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # a collective wants the same shape of everybody
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.split(ctx.sizes)[torch.distributed.get_rank()], None


def gather_over_processes(tensor: Tensor, sizes: list[int] | None = None) -> Tensor:
    """(B, ...) of each process -> (sum of all B, ...) in rank order, with gradient; unchanged in a single process.

    `sizes` are what [`rows_per_process`] says, which is asked when they are left out.
    """
    if _num_processes() == 1:
        return tensor
    return _GatherWithGradient.apply(tensor, sizes or rows_per_process(len(tensor), tensor.device))


def count_per_process(count: Tensor) -> Tensor:
    """The `count` of all processes over their number, as a float.

    A sum of this process divided by it is a loss whose average over processes, which is what distributed training takes
    the gradient of, is the mean over all rows, however unevenly these are spread.
    """
    count = count.float()
    if _num_processes() > 1:
        count = count / _num_processes()  # a tensor of its own, which the sum may be written into
        torch.distributed.all_reduce(count)
    return count


def _mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """`total` over a count of [`count_per_process`]; 0, not NaN, where nothing is counted."""
    return total / count.clamp(min=1 / _num_processes())


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy against `targets` >= 0, which are scaled to sum to 1; 0 for a row of zeros."""
    # masked_fill, not a product: a column that was set to -inf must not turn into NaN
    log_likelihood = logits.log_softmax(dim=-1).masked_fill(targets == 0, 0.0)
    sums = targets.sum(dim=-1)
    return -((log_likelihood * targets).sum(dim=-1) / torch.where(sums > 0, sums, 1)).sum()


def label_likeness(labels: Tensor, others: Tensor, temperature: float) -> Tensor:
    """exp(cosine / temperature) of rows of labels, (B, F) and (C, F) of 1, 0 and -100 (unknown) -> (B, C).

    Scaled to sum to 1 it is the semantic target of MedCLIP (Wang et al. 2022), whose temperature is 1. Only what is
    present counts; rows in which nothing is are like each other.
    """
    present, others = (F.pad((rows == 1).float(), (0, 1)) for rows in (labels, others))
    for rows in (present, others):
        rows[:, -1] = (rows.sum(dim=-1) == 0).float()
    return (F.normalize(present, dim=-1) @ F.normalize(others, dim=-1).T / temperature).exp()


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    group_ids: Tensor | None = None,
    has_image: Tensor | None = None,
    sizes: list[int] | None = None,
    max_logits: int = 2**24,
    *,
    labels: Tensor | None = None,
    label_temperature: float = 1.0,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Symmetric image-text cross-entropy (CLIP, Radford et al. 2021) in which equal texts are mutual positives.

    `image_embeds` and `text_embeds` are (B, D), L2-normalised; `logit_scale` is the factor on their cosine, not its
    log. Rows with the same number in `group_ids` (B,) have the same text; left out, each row is its own group. Rows
    that are False in `has_image` (B,) lend their text as a negative and take no other part. Returns a scalar: 0 with
    no image.

    With `labels` (B, F) the targets are those of [`label_likeness`] instead. With a `logit_bias` each pair is told by
    itself to be equal or not (SigLIP, Zhai et al. 2023): the sum over all texts of the binary cross-entropy, in the
    mean over images.

    In a distributed run the rows of this process are scored against those of all processes (local loss), whose numbers
    of rows are `sizes`. A matrix of more than `max_logits` similarities is never held: it is made in chunks of rows,
    and made again for the gradient, which takes a third more time for them and memory that no longer grows.
    """
    num_rows, device = len(image_embeds), image_embeds.device
    if sizes is None:
        sizes = rows_per_process(num_rows, device)
    if has_image is None:
        has_image = torch.ones(num_rows, dtype=torch.bool, device=device)
    all_images, all_texts = gather_over_processes(image_embeds, sizes), gather_over_processes(text_embeds, sizes)
    all_has_image = gather_over_processes(has_image, sizes)
    if group_ids is None:
        all_groups = torch.arange(len(all_images), device=device)
        group_ids = all_groups if len(sizes) == 1 else all_groups.split(sizes)[torch.distributed.get_rank()]
    elif labels is None:
        all_groups = gather_over_processes(group_ids, sizes)
    all_labels = None if labels is None else gather_over_processes(labels, sizes)

    def rows_against_all(images, texts, names, is_shown, all_images, all_texts, logit_scale):
        if all_labels is None:
            targets = names[:, None] == all_groups[None, :]  # (R, all)
        else:
            targets = label_likeness(names, all_labels, label_temperature)
        targets = targets * is_shown[:, None]
        image_logits = logit_scale * images @ all_texts.T
        if logit_bias is not None:
            signs = torch.where(targets, 1.0, -1.0).to(images.dtype)
            return -2 * (F.logsigmoid(signs * (image_logits + logit_bias)) * is_shown[:, None]).sum()
        image_to_text = _cross_entropies(image_logits, targets)
        text_logits = (logit_scale * texts @ all_images.T).masked_fill(~all_has_image, -torch.inf)
        # a batch with no image at all would be a row of -inf: give such rows zeros, they have no positive anyway
        text_logits = torch.where(all_has_image.any(), text_logits, torch.zeros_like(text_logits))
        return image_to_text + _cross_entropies(text_logits, targets * all_has_image)

    parts = [image_embeds, text_embeds, group_ids if labels is None else labels, has_image]
    everything = (all_images, all_texts, logit_scale)
    chunk_size = max(1, max_logits // max(len(all_images), 1))
    if num_rows <= chunk_size:
        total = rows_against_all(*parts, *everything)
    else:
        total = sum(
            checkpoint(rows_against_all, *chunk, *everything, use_reentrant=False)
            for chunk in zip(*(part.split(chunk_size) for part in parts), strict=True)
        )
    # a row that has an image has its own text as a positive, and the other way round
    return _mean_over_processes(total, 2 * count_per_process(has_image.sum()))


def check_prompts(prompt_input_ids: Tensor, prompt_labels: Tensor | None, side_labels: Tensor | None) -> None:
    """Raises ValueError unless the texts (2F + 2S, T') are pairs for the columns of the labels (B, F) and (B, S)."""
    shapes = [labels.shape for labels in (prompt_labels, side_labels) if labels is not None]
    num_pairs = sum(num_columns for _, num_columns in shapes)
    if prompt_labels is None or len(prompt_input_ids) != 2 * num_pairs:
        raise ValueError(
            f"`prompt_input_ids` are {len(prompt_input_ids)} texts, but must be two for each column of "
            f"`prompt_labels` (B, F) and then of `side_labels` (B, S), which are {[*map(tuple, shapes)]}."
        )


def prompt_directions(prompt_embeds: Tensor) -> Tensor:
    """From "there is no X" to "there is X": L2-normalised pairs (F, 2, D), present first, -> (F, D) of length 1.

    The two texts of a pair begin, and in a pretrained text tower stay, close to each other. Their bare difference
    would be as small, and with it what images learn from it.
    """
    return F.normalize(prompt_embeds[:, 0] - prompt_embeds[:, 1], dim=-1)


def prompt_logits(image_embeds: Tensor, directions: Tensor, logit_scale: Tensor) -> Tensor:
    """How far each image (B, D) lies along the [`prompt_directions`] (F, D): logits (B, F)."""
    return logit_scale * image_embeds @ directions.T


def local_prompt_logits(patch_embeds: Tensor, directions: Tensor, logit_scale: Tensor) -> Tensor:
    """As [`prompt_logits`], but the patches answer: does any of them say "there is X" rather than "there is no X"?

    `patch_embeds` (B, N, D) are projected and L2-normalised. "Any" is the soft maximum log(mean(exp(.))) over the
    patches, as in multiple-instance learning. Returns (B, F).
    """
    margins = logit_scale * torch.einsum("bnd,fd->bfn", patch_embeds, directions)
    return margins.logsumexp(dim=-1) - math.log(margins.shape[-1])


def finding_loss(logits: Tensor, labels: Tensor, sizes: list[int] | None = None) -> Tensor:
    """How far findings (B, F) are from being told apart, by rank and by sign; labels are 1, 0, or -100 (unknown).

    The rank part is the mean of softplus(absent - present) over all pairs of images of which one has a finding and the
    other lacks it. A mere base rate ("findings are mostly absent") does not lower it: with cross-entropy alone, that is
    what the text tower learns first, and its prompts collapse into "no". The sign part is half the cross-entropy, with
    present and absent of the same weight, and puts the border between the two at 0. Both go over the images of all
    processes, which have `sizes` rows each. Returns a scalar; a part for which nothing is known is 0.
    """
    logits, labels = gather_over_processes(logits, sizes), gather_over_processes(labels, sizes)
    is_present, is_absent = labels == 1, labels == 0  # (B, F)
    is_pair = is_present[:, None, :] & is_absent[None, :, :]  # (B, B, F)
    rank = (F.softplus(logits[None, :, :] - logits[:, None, :]) * is_pair).sum() / is_pair.sum().clamp(min=1)
    present = (F.softplus(-logits) * is_present).sum() / is_present.sum().clamp(min=1)
    absent = (F.softplus(logits) * is_absent).sum() / is_absent.sum().clamp(min=1)
    return rank + (present + absent) / 4


def masked_patch_loss(
    mim_logits: Tensor, patch_targets: Tensor, bool_masked_pos: Tensor, num_hidden: Tensor | None = None
) -> Tensor:
    """Mean squared error over hidden patches only, as in MAE (He et al. 2022).

    `mim_logits` and `patch_targets` are (B, N, P * P * C); `bool_masked_pos` is (B, N), True where hidden. Returns a
    scalar: 0, not NaN, when nothing is hidden. `num_hidden` is what the sum is divided by, where these rows are part of
    a batch: its [`count_per_process`] of hidden patches.
    """
    per_patch = (mim_logits - patch_targets).pow(2).mean(dim=-1)  # (B, N)
    num_hidden = count_per_process(bool_masked_pos.sum()) if num_hidden is None else num_hidden
    return _mean_over_processes((per_patch * bool_masked_pos).sum(), num_hidden)


def masked_token_loss(mlm_logits: Tensor, labels: Tensor, num_hidden: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the hidden words: (M, vocab) against (M,). Returns a scalar: 0 when nothing is hidden.

    `num_hidden` is, where these words are part of a batch, its [`count_per_process`] of hidden words.
    """
    if num_hidden is None:
        num_hidden = count_per_process(torch.tensor(len(labels), device=labels.device))
    return _mean_over_processes(F.cross_entropy(mlm_logits.float(), labels, reduction="sum"), num_hidden)


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """(B, C, h * P, w * P) -> (B, h * w, P * P * C), row by row of patches."""
    batch_size, num_channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch_size, num_channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, rows * columns, -1)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch (last dimension) to mean 0 and variance 1, as the target of MAE; a flat patch becomes zeros."""
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def hide_pixels(pixel_values: Tensor, bool_masked_pos: Tensor, patch_size: int) -> Tensor:
    """(B, C, h * P, w * P) with zeros, a mid grey, in the patches that are True in (B, h * w)."""
    columns = pixel_values.shape[-1] // patch_size
    hidden = bool_masked_pos.unflatten(1, (-1, columns))
    hidden = hidden.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)
    return pixel_values.masked_fill(hidden[:, None], 0.0)


def num_rebuilt_rows(ratio: float, num_rows: int) -> int:
    """How many of the rows of a batch a head rebuilds, the first ones; at least one."""
    return min(num_rows, max(1, round(ratio * num_rows)))


def select_masked_patches(
    noise: Tensor, mask_ratio: float, attention: Tensor | None = None, attended_share: float = 0.9
) -> Tensor:
    """Choose the patches that AttMIM hides: (B, N) bool, True where hidden, `round(mask_ratio * N)` in each row.

    `attended_share` of them are drawn from the more attended half of the patches and the others from the rest, as in
    MedIM (Xie et al. 2023); a half that is too small gives all it has. Without `attention` (B, N) any patch may be
    drawn. `noise` (B, N) in [0, 1) is the only randomness: lower noise is hidden first.
    """
    num_patches = noise.shape[1]
    num_hidden = round(mask_ratio * num_patches)
    if attention is None:
        return _ranks(noise) < num_hidden
    num_attended = num_patches - num_patches // 2
    is_attended = _ranks(-attention) < num_attended  # (B, N)
    from_attended = min(round(attended_share * num_hidden), num_attended)
    from_attended = max(from_attended, num_hidden - (num_patches - num_attended))
    hidden_attended = is_attended & (_ranks(noise.masked_fill(~is_attended, torch.inf)) < from_attended)
    hidden_rest = ~is_attended & (_ranks(noise.masked_fill(is_attended, torch.inf)) < num_hidden - from_attended)
    return hidden_attended | hidden_rest


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, 0 for the smallest; equal values keep their order."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


# ----------------------------------------------------------------------------------------------------------- decoders


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MMCLIPAttention(nn.Module):
    """Multi-head attention of (B, Q, H) over (B, K, H); self-attention when both are the same tensor."""

    is_causal = False  # read by the SDPA interface of transformers

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_size = config.decoder_hidden_size // config.decoder_num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor, memory: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        def heads(tensor):  # (B, L, H) -> (B, heads, L, H / heads)
            return tensor.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        query, key, value = heads(self.q_proj(hidden_states)), heads(self.k_proj(memory)), heads(self.v_proj(memory))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0)
        return self.out_proj(attended.flatten(2))

    def weights(self, hidden_states: Tensor, memory: Tensor) -> Tensor:
        """How much each of (B, Q, H) takes from each of (B, K, H): (B, Q, K), in the mean over heads."""
        query, key = self.q_proj(hidden_states), self.k_proj(memory)
        query, key = (tensor.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for tensor in (query, key))
        return (query @ key.transpose(2, 3) * self.head_size**-0.5).softmax(dim=-1).mean(dim=1)


class CrossModalLayer(GradientCheckpointingLayer):
    """Self-attention within one modality, cross-attention to the other, then an MLP; each pre-normalised, residual."""

    def __init__(self, config):
        super().__init__()
        size = config.decoder_hidden_size
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size), nn.LayerNorm(size)
        self.self_attention = MMCLIPAttention(config)
        self.cross_attention = MMCLIPAttention(config)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden_states: Tensor, memory: Tensor, self_mask=None, cross_mask=None) -> Tensor:
        normed = self.self_norm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, normed, self_mask)
        hidden_states = hidden_states + self.cross_attention(self.cross_norm(hidden_states), memory, cross_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def cross_weights(self, hidden_states: Tensor, memory: Tensor, self_mask=None) -> Tensor:
        """The weights (B, L, K) of the cross-attention in the forward."""
        normed = self.self_norm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, normed, self_mask)
        return self.cross_attention.weights(self.cross_norm(hidden_states), memory)


class CrossModalDecoder(nn.Module):
    """Tokens of one modality (B, L, H) and of the other (B, K, H') -> decoded tokens (B, L, decoder size)."""

    def __init__(self, config, input_size: int, memory_size: int):
        super().__init__()
        self.config = config
        self.input_projection = nn.Linear(input_size, config.decoder_hidden_size)
        self.memory_projection = nn.Linear(memory_size, config.decoder_hidden_size)
        self.memory_norm = nn.LayerNorm(config.decoder_hidden_size)
        self.layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.decoder_num_layers))
        self.norm = nn.LayerNorm(config.decoder_hidden_size)

    def forward(self, hidden_states, memory, attention_mask=None, memory_mask=None) -> Tensor:
        """`hidden_states` are already projected; the masks are (B, L) and (B, K), 0 at padding."""
        memory = self.memory_norm(self.memory_projection(memory))
        self_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        cross_mask = create_bidirectional_mask(self.config, hidden_states, memory_mask, encoder_hidden_states=memory)
        for layer in self.layers:
            hidden_states = layer(hidden_states, memory, self_mask, cross_mask)
        return self.norm(hidden_states)

    def cross_weights(self, hidden_states, memory, attention_mask=None) -> Tensor:
        """How much of each token of `memory` the last layer takes: (B, L, K), summing to 1 over them."""
        memory = self.memory_norm(self.memory_projection(memory))
        self_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, memory, self_mask)
        return self.layers[-1].cross_weights(hidden_states, memory, self_mask)


class AttMIMHead(nn.Module):
    """Rebuild hidden patches from the visible patch tokens with the help of the text."""

    def __init__(self, config, image_size: int, text_size: int, num_patches: int, patch_values: int):
        super().__init__()
        self.decoder = CrossModalDecoder(config, image_size, text_size)
        if not config.mim_text:
            self.no_text_token = nn.Parameter(torch.zeros(1, 1, text_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches, config.decoder_hidden_size))
        self.prediction = nn.Linear(config.decoder_hidden_size, patch_values)

    def forward(self, patch_tokens, bool_masked_pos, text_tokens, attention_mask) -> Tensor:
        """(B, N, H), (B, N), (B, T, H'), (B, T) -> predicted pixels (B, N, P * P * C), or whatever is the target."""
        if not self.decoder.config.mim_text:
            text_tokens, attention_mask = self.no_text_token.expand(len(patch_tokens), -1, -1), None
        visible = self.decoder.input_projection(patch_tokens)
        hidden_states = torch.where(bool_masked_pos[..., None], self.mask_token.to(visible.dtype), visible)
        hidden_states = hidden_states + self.position_embeddings
        return self.prediction(self.decoder(hidden_states, text_tokens, memory_mask=attention_mask))


class EntMLMHead(nn.Module):
    """Rebuild masked words from the other words with the help of the image; scores words by the tower's embeddings."""

    def __init__(self, config, text_size: int, image_size: int, vocab_size: int, word_size: int):
        super().__init__()
        self.decoder = CrossModalDecoder(config, text_size, image_size)
        # ELECTRA and ALBERT have word embeddings narrower than their hidden states
        self.transform = nn.Sequential(
            nn.Linear(config.decoder_hidden_size, word_size), nn.GELU(), nn.LayerNorm(word_size)
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, text_tokens, attention_mask, patch_tokens, is_masked=None, *, word_embeddings) -> Tensor:
        """(B, T, H'), (B, T), (B, N, H), (vocab, W) -> (B, T, vocab), or (M, vocab) at the M True of `is_masked`."""
        decoded = self.decoder(self.decoder.input_projection(text_tokens), patch_tokens, attention_mask)
        # the vocabulary is the widest layer of all: only the masked words go through it
        decoded = decoded if is_masked is None else decoded[is_masked]
        return F.linear(self.transform(decoded), word_embeddings, self.bias)

    def word_to_patch_attention(self, text_tokens, attention_mask, patch_tokens) -> Tensor:
        """(B, T, H'), (B, T), (B, N, H) -> (B, T, N), summing to 1 over the patches."""
        return self.decoder.cross_weights(self.decoder.input_projection(text_tokens), patch_tokens, attention_mask)


# ------------------------------------------------------------------------------------------------------------- towers


class ConvolutionalStem(nn.Sequential):
    """Stride-2 3x3 convolutions down to one cell per patch, in place of one large patch kernel (Xiao et al. 2021)."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int):
        num_steps = int(math.log2(patch_size))
        if 2**num_steps != patch_size:
            raise ValueError(
                f"`vision_stem='convolution'` halves the image at each step, so the patch side must be a power of two, "
                f"but `vision_config.patch_size` is {patch_size}."
            )
        layers, size = [], num_channels
        for step in reversed(range(num_steps)):
            next_size = max(hidden_size // 2**step, 16)
            layers += [
                nn.Conv2d(size, next_size, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, next_size),
                nn.GELU(),
            ]
            size = next_size
        super().__init__(*layers, nn.Conv2d(size, hidden_size, 1))

    @property
    def weight(self) -> Tensor:
        """The towers of transformers cast the image to the type of their patch embedding's weight."""
        return self[0].weight


# Groups of like length that the texts of a batch pass their tower in, and parts that save memory.
NUM_LENGTHS = 4
# How sharp the soft maximum is: patch tokens are small numbers after a ReLU, text tokens leave a layer norm.
PATCH_SHARPNESS, WORD_SHARPNESS = 4.0, 2.0

# Parameters that no patch token depends on: the norm of a pooled output, the token of the tower's own masked training.
UNREAD_PARAMETERS = {
    "clip_vision_model": "post_layernorm.",
    "convnext": "layernorm.",
    "convnextv2": "layernorm.",
    "dinov2": "embeddings.mask_token",
    "dinov2_with_registers": "embeddings.mask_token",
    "dinov3_vit": "embeddings.mask_token",
}


def _tower_kwargs(config, with_pooler: bool = False) -> dict:
    """Leave out the pooler of a tower that has one, unless it is read: its weights would get no gradient."""
    tower_class = MODEL_MAPPING[type(config)]
    if isinstance(tower_class, (list, tuple)):
        tower_class = tower_class[0]
    takes_it = "add_pooling_layer" in inspect.signature(tower_class.__init__).parameters
    return {"add_pooling_layer": with_pooler} if takes_it else {}


def _find_patches(vision_config, image_size: int) -> tuple[int, int]:
    """Pixels along the side of a patch token, and how many other tokens stand in front of the patches (CLS, registers).

    Both are read off the shapes of a tower on the meta device, which takes no arithmetic.
    """
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(vision_config).eval()
        shape = tower(torch.zeros(1, vision_config.num_channels, image_size, image_size)).last_hidden_state.shape
    patch_size = getattr(vision_config, "patch_size", None)
    if len(shape) == 4:
        grid = shape[-1]
    elif isinstance(patch_size, int) and 0 <= shape[1] - (image_size // patch_size) ** 2 <= 16:
        grid = image_size // patch_size  # the others are CLS and register tokens
    else:
        grid = math.isqrt(shape[1])
    if image_size % grid:
        raise ValueError(f"{image_size} px do not divide into {grid} x {grid} patches; change the tower's size.")
    return image_size // grid, 0 if len(shape) == 4 else shape[1] - grid**2


def _first_convolution(vision_model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The patch embedding of a vision tower, that is its first convolution, and its name in the tower."""
    for name, module in vision_model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f"{type(vision_model).__name__} has no convolution that could serve as patch embedding.")


def fold_patch_convolution(convolution: nn.Conv2d, mean, std, new_mean: float, new_std: float) -> nn.Conv2d:
    """A one-channel convolution that gives on a grey image exactly what the three-channel one gave on its RGB copy.

    `mean` and `std` (3 floats each) normalised the RGB copy, `new_mean` and `new_std` normalise the grey image. With
    grey g: w_c * (g - mean_c) / std_c summed over c equals w * (g - new_mean) / new_std + b for the w and b below. The
    result has a bias even where `convolution` has none. Raises `ValueError` for a padded convolution, where no such
    kernel exists.
    """
    padding = convolution.padding
    if padding == "same" or padding != "valid" and any(padding):  # SigLIP writes "valid" for none
        raise ValueError(
            "Only a patch convolution without padding folds exactly into one channel, but this one has "
            f"padding={padding}. Use a ViT-like or ConvNeXt tower."
        )
    mean, std = (torch.as_tensor(value, dtype=torch.float64).view(1, -1, 1, 1) for value in (mean, std))
    weight = convolution.weight.detach().double()  # (O, 3, P, P)
    folded = nn.Conv2d(1, convolution.out_channels, convolution.kernel_size, convolution.stride)
    with torch.no_grad():
        folded.weight.copy_((weight * new_std / std).sum(dim=1, keepdim=True))
        folded.bias.copy_((weight * (new_mean - mean) / std).sum(dim=(1, 2, 3)))
        if convolution.bias is not None:
            folded.bias += convolution.bias
    return folded


def _fold_into_one_channel(vision_model: nn.Module, mean, std, new_mean: float, new_std: float) -> None:
    """Put a folded patch convolution into a tower; one that has no bias, as CLIP's, takes it in its positions."""
    name, convolution = _first_convolution(vision_model)
    folded = fold_patch_convolution(convolution, mean, std, new_mean, new_std)
    if convolution.bias is None:
        embeddings = vision_model.get_submodule(name.rpartition(".")[0])
        positions = getattr(embeddings, "position_embedding", None)
        if positions is None:
            raise ValueError(
                f"The patch convolution of {type(vision_model).__name__} has no bias, nor has the tower learned "
                "positions that could take one, so it does not fold into one channel. Use a ViT-like or ConvNeXt tower."
            )
        with torch.no_grad():
            positions.weight[-embeddings.num_patches :] += folded.bias  # the first position is that of CLS
        folded.bias = None
    vision_model.set_submodule(name, folded)


# ------------------------------------------------------------------------------------------------------------ outputs


@dataclass
class MMCLIPOutput(ModelOutput):
    r"""
    loss: scalar, with `return_loss=True`. logits_per_image (images, texts), logits_per_text (texts, images): scaled
    cosines. text_embeds, image_embeds (B, D): projected and L2-normalised. The last two: what the towers return.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


@dataclass
class MMCLIPForPreTrainingOutput(ModelOutput):
    r"""
    loss: weighted total. loss_info: its parts, unweighted (detached scalars: contrastive, mim, mlm, prompt, local).
    logits_per_image, logits_per_text (B, B); text_embeds, image_embeds (B, D). mim_logits (B, N, P * P * C).
    mlm_logits (M, vocab) for the M masked words in reading order, or (B, T, vocab) when no `mlm_labels` were given.
    bool_masked_pos (B, N): the patches that were hidden. text_to_patch_attention (B, N): sums to 1 in each row.
    """

    loss: torch.FloatTensor | None = None
    loss_info: dict | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    mim_logits: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None
    bool_masked_pos: torch.BoolTensor | None = None
    text_to_patch_attention: torch.FloatTensor | None = None


class EncodedRows(NamedTuple):
    """What the towers make of a batch: image_embeds, text_embeds (B, D), projected and L2-normalised; patch_tokens
    (B, N, H); text_tokens and, with EntMLM, masked_text_tokens (B, T, H')."""

    image_embeds: Tensor
    text_embeds: Tensor
    patch_tokens: Tensor
    text_tokens: Tensor
    masked_text_tokens: Tensor | None


@dataclass
class Rebuilt:
    """What AttMIM and EntMLM make of rows, by the names of [`MMCLIPForPreTrainingOutput`]; `losses` are mim and mlm."""

    losses: dict[str, Tensor]
    text_to_patch_attention: Tensor | None = None
    bool_masked_pos: Tensor | None = None
    mim_logits: Tensor | None = None
    mlm_logits: Tensor | None = None


# ------------------------------------------------------------------------------------------------------------- models


class MMCLIPPreTrainedModel(PreTrainedModel):
    config_class = MMCLIPConfig
    base_model_prefix = "mmclip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CrossModalLayer"]
    accepts_loss_kwargs = False  # the losses are means over the batch, so the Trainer must not rescale them

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AttMIMHead):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if hasattr(module, "no_text_token"):
                init.normal_(module.no_text_token, std=self.config.initializer_range)
        elif isinstance(module, EntMLMHead):
            init.zeros_(module.bias)
        elif isinstance(module, MMCLIPModel):
            init.normal_(module.visual_projection.weight, std=module.visual_projection.in_features**-0.5)
            init.normal_(module.text_projection.weight, std=module.text_projection.in_features**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if hasattr(module, "logit_bias"):
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
            if hasattr(module, "no_image_token"):
                init.normal_(module.no_image_token, std=self.config.initializer_range)

    def save_pretrained(self, save_directory, **kwargs):
        # under its legacy names a resumed Trainer would leave a composed ViT at random weights without an error
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # transformers gives every loaded parameter a gradient
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unread()
        return loaded

    def _freeze_unread(self):
        """Take out of training what no patch token depends on: distributed processes would wait for its gradient."""
        unread = UNREAD_PARAMETERS.get(self.config.vision_config.model_type)
        if unread and self.config.image_pooling != "pooler":
            for name, parameter in self.vision_model.named_parameters():
                if name.startswith(unread):
                    parameter.requires_grad_(False)

    def _add_vision_tower(self):
        """Build `vision_model` and what is known of its patches: `patch_size`, `num_patches`, `vision_hidden_size`."""
        config, vision_config = self.config, self.config.vision_config
        if vision_config.model_type == "vit_mae":
            raise ValueError(
                "A vit_mae tower hides and shuffles its patches in each forward. Load its weights as a ViT: "
                "ViTModel.from_pretrained(...).save_pretrained(folder)."
            )
        if config.patch_size is None or config.image_pooling == "cls":
            patch_size, num_other_tokens = _find_patches(vision_config, self.image_size)
            if config.image_pooling == "cls" and num_other_tokens == 0:
                raise ValueError(
                    "`image_pooling='cls'` projects the token in front of the patches, but a "
                    f"{vision_config.model_type} tower has none: its first token is the upper left corner. "
                    "Use 'mean' or 'max'."
                )
            config.patch_size = config.patch_size or patch_size
        self.patch_size = config.patch_size
        self.num_patches = (self.image_size // config.patch_size) ** 2
        sizes = getattr(vision_config, "hidden_sizes", None)
        self.vision_hidden_size = sizes[-1] if sizes else vision_config.hidden_size
        with_pooler = config.image_pooling == "pooler"
        self.vision_model = AutoModel.from_config(vision_config, **_tower_kwargs(vision_config, with_pooler))
        self.vision_model.config = vision_config
        self._freeze_unread()
        if config.vision_stem == "convolution":
            name, convolution = _first_convolution(self.vision_model)
            if convolution.kernel_size != convolution.stride:
                raise ValueError(
                    "`vision_stem='convolution'` stands in for the patch embedding of a ViT-like tower, but "
                    f"{type(self.vision_model).__name__} begins with convolutions already. Use `vision_stem='patch'`."
                )
            stem = ConvolutionalStem(convolution.in_channels, convolution.out_channels, convolution.stride[0])
            self.vision_model.set_submodule(name, stem)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the vision tower takes."""
        size = getattr(self.config.vision_config, "image_size", None)
        size = size[0] if isinstance(size, (list, tuple)) else size
        return size or 224  # feature-map towers such as ResNet take any size and often name none

    def _check_pixel_values(self, pixel_values: Tensor):
        expected = (self.config.vision_config.num_channels, self.image_size, self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must be (B, {', '.join(map(str, expected))}) for this vision tower, but are "
                f"{tuple(pixel_values.shape)}. Set `size` of the image processor to the tower's `image_size`, and "
                "`vision_config.num_channels` to 1, which is what the image processor gives."
            )

    def encode_image(self, pixel_values: Tensor, **kwargs) -> tuple[Tensor, Tensor, ModelOutput]:
        """(B, C, S, S) -> pooled image (B, H), patch tokens (B, N, H) in reading order, what the tower returned."""
        self._check_pixel_values(pixel_values)
        # a ViT casts its input to the type of its weights, a ResNet does not
        outputs = self.vision_model(pixel_values=pixel_values.to(self.dtype), **kwargs)
        hidden_states = outputs.last_hidden_state
        if hidden_states.dim() == 4:  # the cells of a feature map (B, H, h, w)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        patch_tokens = hidden_states[:, -self.num_patches :]  # CLS and register tokens stand in front
        if self.config.image_pooling == "cls":
            pooled = hidden_states[:, 0]
        elif self.config.image_pooling == "pooler":
            pooled = _pooler_output(outputs, "image")
        elif self.config.image_pooling == "max":
            pooled = _soft_maximum(patch_tokens, PATCH_SHARPNESS)
        else:
            pooled = patch_tokens.mean(dim=1)
        return pooled, patch_tokens, outputs


def _pooler_output(outputs: ModelOutput, part: str) -> Tensor:
    """(B, H) of a tower's own pooler."""
    pooled = outputs.get("pooler_output")
    if pooled is None:
        raise ValueError(f"The {part} tower has no pooler; take `{part}_pooling='mean'` or 'cls'.")
    return pooled.flatten(1)  # that of a ResNet is (B, H, 1, 1)


def _soft_maximum(tokens: Tensor, sharpness: float, mask: Tensor | None = None) -> Tensor:
    """(B, N, H) -> (B, H): log(mean(exp(s x))) / s over the tokens, between their mean (s -> 0) and their maximum.

    With a `mask` (B, N) over its True; over all tokens of a row that has none.
    """
    tokens = sharpness * tokens
    if mask is None:
        return (tokens.logsumexp(dim=1) - math.log(tokens.shape[1])) / sharpness
    mask = mask.bool() | ~mask.bool().any(dim=1, keepdim=True)
    count = mask.sum(dim=1, keepdim=True).to(tokens.dtype)
    return (tokens.masked_fill(~mask[..., None], -torch.inf).logsumexp(dim=1) - count.log()) / sharpness


def _masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, H) over the True of (B, T)."""
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _with_embedding(outputs: ModelOutput, embeds: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=embeds,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


@contextmanager
def evaluating(model: nn.Module):
    """Run the block in eval mode without gradients; afterwards every module is in the mode it was in before."""
    modes = {module: module.training for module in model.modules()}  # a frozen part may be in another mode
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class MMCLIPModel(MMCLIPPreTrainedModel):
    """Two towers and a shared space: images and reports to L2-normalised embeddings and their similarities."""

    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"^mim_head\.", r"^mlm_head\.", r"^no_image_token$", r"^classifier\."]

    def __init__(self, config: MMCLIPConfig | None = None):
        super().__init__(MMCLIPConfig() if config is None else config)
        self._add_towers()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def _add_towers(self):
        config = self.config
        self._add_vision_tower()
        with_pooler = config.text_pooling == "pooler"
        self.text_model = AutoModel.from_config(config.text_config, **_tower_kwargs(config.text_config, with_pooler))
        self.text_model.config = config.text_config
        self.visual_projection = nn.Linear(self.vision_hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        if config.contrastive_loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self._processor = None
        self._image_options, self._tokenizer_source = {}, None

    # -------------------------------------------------------------------------------------------------------- towers

    def encode_text(self, input_ids, attention_mask=None, **kwargs) -> tuple[Tensor, Tensor, ModelOutput]:
        """(B, T), (B, T) -> pooled text (B, H), text tokens (B, T, H), what the tower returned."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        limit = max_text_length(self.config.text_config)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"The text tower has positions for {limit} tokens, but `input_ids` is {tuple(input_ids.shape)}. Cut "
                "the texts, as MMCLIPProcessor does; a tokenizer alone needs `truncation=True`."
            )
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        text_tokens = outputs.last_hidden_state
        if self.config.text_pooling in ("mean", "max"):
            pooled = self.pool_words(text_tokens, attention_mask)
        else:
            pooled = _pooler_output(outputs, "text") if self.config.text_pooling == "pooler" else text_tokens[:, 0]
        return pooled, text_tokens, outputs

    def pool_words(self, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H), (B, T) -> (B, H): the soft maximum of the chosen words under max pooling, else their mean."""
        if self.config.text_pooling == "max":
            return _soft_maximum(text_tokens, WORD_SHARPNESS, mask)
        return _masked_mean(text_tokens, mask)

    def project_image(self, pooled: Tensor) -> Tensor:
        """(..., H) -> (..., D), L2-normalised; takes pooled images and, under mean or max pooling, single patches."""
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def project_text(self, pooled: Tensor) -> Tensor:
        """(..., H) -> (..., D), L2-normalised."""
        return F.normalize(self.text_projection(pooled), dim=-1)

    def similarity_scale(self) -> Tensor:
        """Factor on the cosine: exp(`logit_scale`), at most 100 as in CLIP."""
        return self.logit_scale.clamp(max=math.log(100)).exp()

    def attention_to_patches(self, patch_tokens: Tensor, text_embeds: Tensor) -> Tensor:
        """How strongly each patch answers the text: (B, N, H), (B, D) -> (B, N), summing to 1 in each row."""
        similarity = torch.einsum("bnd,bd->bn", self.project_image(patch_tokens), text_embeds)
        return (self.similarity_scale() * similarity).softmax(dim=-1)

    # ----------------------------------------------------------------------------------------------------- inference

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pooler_output` (B, D): projected and L2-normalised images; `last_hidden_state`: as the tower gives it."""
        pooled, _, outputs = self.encode_image(pixel_values, **kwargs)
        return _with_embedding(outputs, self.project_image(pooled))

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` (B, D): projected and L2-normalised texts; `last_hidden_state` (B, T, H): text tokens."""
        pooled, _, outputs = self.encode_text(input_ids, attention_mask, **kwargs)
        return _with_embedding(outputs, self.project_text(pooled))

    def get_text_to_patch_attention(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        contrast_input_ids: Tensor | None = None,
        contrast_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Heat map of each text on its image: (B, N), patches in reading order, summing to 1 in each row.

        One image goes with any number of texts, and is encoded once; one text, or one contrast, goes with all images.
        With a contrasting text ("There is no nodule." beside "There is a nodule."), where the patches answer the text
        more than that one. What both have in common no longer counts, which meets lesions better (RESULTS.md).
        """
        counts = [len(one) for one in (pixel_values, input_ids, contrast_input_ids) if one is not None]
        if len({*counts, 1}) > 2:
            raise ValueError(
                f"Expected as many images, texts and contrasts, or one of a kind for all of the others, got {counts}."
            )
        patch_tokens = self.encode_image(pixel_values)[1]
        text_embeds = self.project_text(self.encode_text(input_ids, attention_mask)[0])
        if contrast_input_ids is not None:
            contrast = self.encode_text(contrast_input_ids, contrast_attention_mask)[0]
            text_embeds = text_embeds - self.project_text(contrast)
        return self.attention_to_patches(patch_tokens, text_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> MMCLIPOutput:
        """Embeddings of images (B, C, S, S), of texts (B, T), or of both with all their similarities.

        With `return_loss` also the contrastive loss, for which row i of both must belong together; equal `group_ids`
        (B,) mark equal texts. Raises `ValueError` when there is neither image nor text.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("MMCLIPModel needs `pixel_values`, `input_ids` or both, but got neither.")
        image_outputs = text_outputs = image_embeds = text_embeds = logits_per_image = loss = None
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, **kwargs)
            image_embeds = image_outputs.pooler_output
        if input_ids is not None:
            text_kwargs = kwargs if token_type_ids is None else {**kwargs, "token_type_ids": token_type_ids}
            text_outputs = self.get_text_features(input_ids, attention_mask, **text_kwargs)
            text_embeds = text_outputs.pooler_output
        if image_embeds is not None and text_embeds is not None:
            logits_per_image = self.similarity_scale() * image_embeds @ text_embeds.T
        if return_loss:
            if logits_per_image is None:
                raise ValueError("`return_loss=True` needs both `pixel_values` and `input_ids`.")
            loss = contrastive_loss(image_embeds, text_embeds, self.similarity_scale(), group_ids)
        return MMCLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    # -------------------------------------------------------------------------------------------------- the short way

    @property
    def processor(self):
        """The processor that `encode` uses: the one saved with the weights, else one with the tokenizer of a pretrained
        text tower, else with the tokenizer that ships with this code."""
        if self._processor is None:
            from .image_processing_mmclip import MMCLIPImageProcessor
            from .processing_mmclip import MMCLIPProcessor

            if self.name_or_path:
                # whoever runs this file from a saved folder has trusted that folder's code already
                trusted = __name__.startswith("transformers_modules")
                try:
                    self.processor = MMCLIPProcessor.from_pretrained(self.name_or_path, trust_remote_code=trusted)
                except OSError as error:
                    raise ValueError(
                        f"{self.name_or_path} holds no processor, which `encode` needs. Save it beside the weights, "
                        "`processor.save_pretrained(folder)`, or set `model.processor`."
                    ) from error
            else:
                source = self._tokenizer_source
                tokenizer = None if source is None else AutoTokenizer.from_pretrained(source)
                limit = max_text_length(self.config.text_config)
                if tokenizer is not None and limit is not None:
                    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
                self.processor = MMCLIPProcessor(
                    MMCLIPImageProcessor(size=self.image_size, **self._image_options), tokenizer
                )
        return self._processor

    @processor.setter
    def processor(self, processor):
        processor.check_tokenizer(self.config)
        self._processor = processor

    def encode(self, images=None, texts=None, batch_size: int = 32) -> tuple[Tensor | None, Tensor | None]:
        """X-rays and sentences to embeddings: `(image_features, text_features)`, each (count, D), L2-normalised.

        `images` is a path, PIL image or array, `texts` a string, or each a list of them; one left out gives None.
        Their dot product is the cosine similarity. Works in evaluation mode and leaves the model in the mode it was.
        Images are read ahead, on as many threads as torch uses. Raises `ValueError` for one that cannot be read, naming
        it.
        """
        if images is None and texts is None:
            raise ValueError("`encode` needs an image, a text or both, but got neither.")
        image_features = text_features = None
        with evaluating(self):
            if images is not None:
                images = list(images) if isinstance(images, (list, tuple)) else [images]
                batches = self._prepared_images(images, batch_size)
                image_features = self._encode_batches(batches, self.get_image_features)
            if texts is not None:
                texts = list(texts) if isinstance(texts, (list, tuple)) else [texts]
                parts = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
                batches = (self.processor(text=part) for part in parts)
                text_features = self._encode_batches(batches, self.get_text_features)
        return image_features, text_features

    def _prepared_images(self, images: list, batch_size: int):
        """Batches of `pixel_values` in order, each read on as many threads as torch uses while the last is encoded."""
        processor = self.processor  # loaded here, once

        def prepare(index, image):
            try:
                return processor(images=image)["pixel_values"]
            except ValueError as error:
                raise ValueError(f"image {index}: {error}" if len(images) > 1 else str(error)) from error

        def submit(start):
            # one picture given twice is read once: Pillow decodes an open file lazily, and not from two threads
            futures = {}
            for index, image in enumerate(images[start : start + batch_size], start):
                if id(image) not in futures:
                    futures[id(image)] = pool.submit(prepare, index, image)
            return [futures[id(image)] for image in images[start : start + batch_size]]

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            waiting = submit(0)
            for start in range(batch_size, len(images) + batch_size, batch_size):
                pixel_values = torch.cat([future.result() for future in waiting])
                waiting = submit(start)
                yield BatchFeature({"pixel_values": pixel_values})

    def _encode_batches(self, batches, encode) -> Tensor:
        features = [encode(**batch.to(self.device)).pooler_output for batch in batches]
        if not features:
            return torch.empty(0, self.config.projection_dim, device=self.device, dtype=self.dtype)
        return torch.cat(features)

    # ------------------------------------------------------------------------------------------- from pretrained towers

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision,
        text,
        *,
        vision_image_mean: list[float] | None = None,
        vision_image_std: list[float] | None = None,
        image_mean: float = 0.5,
        image_std: float = 0.25,
        **kwargs,
    ):
        """A model from a pretrained vision tower and a pretrained text tower (names or folders).

        In the place of either, a config (or dict, or None for the default) makes a new tower. A three-channel patch
        kernel is folded into one channel, exactly: `vision_image_mean` and `vision_image_std` (3 floats) are what that
        tower was trained with, read from its `preprocessor_config.json` when left out; `image_mean` and `image_std`
        are those of the one-channel images to come, by default of [`MMCLIPImageProcessor`]. Further keywords are
        fields of [`MMCLIPConfig`]. Projections and heads are new.
        """
        known = {field.name for field in fields(MMCLIPConfig)} | {"num_labels"}
        if unknown := sorted(set(kwargs) - known):
            near = difflib.get_close_matches(unknown[0], known, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"MMCLIPConfig has no field {', '.join(unknown)}.{hint}")
        vision_config, vision_model = cls._pretrained_tower(vision, "vision", kwargs.get("image_pooling") == "pooler")
        text_config, text_model = cls._pretrained_tower(text, "text", kwargs.get("text_pooling") == "pooler")
        if vision_model is not None and vision_config.num_channels != 1:
            if kwargs.get("vision_stem") != "convolution":  # which takes the place of the patch kernel
                if vision_image_mean is None or vision_image_std is None:
                    vision_image_mean, vision_image_std = cls._pretrained_normalisation(vision)
                _fold_into_one_channel(vision_model, vision_image_mean, vision_image_std, image_mean, image_std)
            vision_config.num_channels = 1
        model = cls(MMCLIPConfig(vision_config=vision_config, text_config=text_config, **kwargs))
        model._image_options = {"image_mean": image_mean, "image_std": image_std}
        model._tokenizer_source = None if text_model is None else text
        if vision_model is not None:
            state = vision_model.state_dict()
            if model.config.vision_stem == "convolution":  # a new stem stands where the patch kernel was
                stem = _first_convolution(vision_model)[0] + "."
                new_state = model.vision_model.state_dict()
                state = {key: value for key, value in state.items() if not key.startswith(stem)}
                state.update({key: value for key, value in new_state.items() if key.startswith(stem)})
            model.vision_model.load_state_dict(state)
        if text_model is not None:
            model.text_model.load_state_dict(text_model.state_dict())
        return model

    @staticmethod
    def _pretrained_tower(source, part: str, with_pooler: bool = False):
        """`(config, tower)` of a name or folder; of a two-tower checkpoint such as CLIP those of its `part`."""
        if not isinstance(source, (str, os.PathLike)):
            return source, None
        config = AutoConfig.from_pretrained(source)
        if config.model_type == "mmclip":
            tower = getattr(MMCLIPModel.from_pretrained(source), f"{part}_model").float()
            return tower.config, tower
        config = getattr(config, f"{part}_config", None) or config
        if config.model_type.startswith("siglip"):
            config.vision_use_head = False  # as in MMCLIPConfig
        # in float32, as the parts that are new: a tower saved in half precision would not fit them
        options = _tower_kwargs(config, with_pooler)
        tower = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, **options)
        config.dtype = None
        return config, tower

    @staticmethod
    def _pretrained_normalisation(path: str) -> tuple[list[float], list[float]]:
        try:
            fields, _ = ImageProcessingMixin.get_image_processor_dict(path)
            return fields["image_mean"], fields["image_std"]
        except (OSError, KeyError) as error:
            raise ValueError(
                f"{path} takes three channels and says nowhere how its images were normalised, so its patch kernel "
                "cannot be folded into one channel. Pass `vision_image_mean` and `vision_image_std`, three floats each."
            ) from error


class MMCLIPForPreTraining(MMCLIPModel):
    """MMCLIP and its pretraining losses: contrastive, AttMIM, EntMLM and disease-kind prompts, from one image pass."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: MMCLIPConfig | None = None):
        config = MMCLIPConfig() if config is None else config
        super(MMCLIPModel, self).__init__(config)
        self._add_towers()
        text_size = config.text_config.hidden_size
        # a branch of weight 0 is not built: it costs no memory and no process waits for its gradient
        if config.mim_weight > 0:
            patch_values = self.patch_size**2 * config.vision_config.num_channels
            if config.mim_target == "feature":
                patch_values = self.vision_hidden_size
            self.mim_head = AttMIMHead(config, self.vision_hidden_size, text_size, self.num_patches, patch_values)
        if config.mlm_weight > 0:
            words = self.text_model.get_input_embeddings()
            self.mlm_head = EntMLMHead(
                config, text_size, self.vision_hidden_size, config.text_config.vocab_size, words.embedding_dim
            )
            self.no_image_token = nn.Parameter(torch.zeros(1, 1, self.vision_hidden_size))
        self.post_init()

    def _resize_token_embeddings(self, *args, **kwargs):
        embeddings = super()._resize_token_embeddings(*args, **kwargs)
        if self.config.mlm_weight > 0:  # EntMLM has a bias for each word; a new one starts at 0
            bias = self.mlm_head.bias
            kept = bias.data[: embeddings.num_embeddings]
            bias.data = F.pad(kept, (0, embeddings.num_embeddings - len(kept)))
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        has_image: Tensor | None = None,
        input_ids_masked: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        entity_mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        mim_noise: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        prompt_labels: Tensor | None = None,
        side_labels: Tensor | None = None,
    ) -> MMCLIPForPreTrainingOutput:
        """One batch of images (B, C, S, S) and their reports or prompts (B, T), as [`MMCLIPCollator`] makes it.

        has_image (B,): False where a row has text only; its `pixel_values` are not looked at. input_ids_masked,
        mlm_labels (B, T): the text with hidden words and, there, the words (-100 elsewhere); left out, EntMLM rests.
        entity_mask (B, T): the words whose patches AttMIM hides; left out, all of them. group_ids (B,): equal for
        equal texts. mim_noise (B, N) in [0, 1): the draw of hidden patches, taken from torch's generator when left
        out; or bool_masked_pos (B, N): those patches themselves. prompt_input_ids, prompt_attention_mask
        (2F + 2S, T'), prompt_labels (B, F), side_labels (B, S): "there is X" and "there is no X" for F findings, "left
        X" and "right X" for S, and which of them hold.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "MMCLIPForPreTraining needs `input_ids` and `pixel_values`; rows without an image are False in "
                "`has_image`. For one of the two alone, load the checkpoint as MMCLIPModel (AutoModel)."
            )
        if has_image is None:
            has_image = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if prompt_input_ids is not None:
            check_prompts(prompt_input_ids, prompt_labels, side_labels)
        sizes = rows_per_process(len(pixel_values), pixel_values.device)  # first, while nothing has to be waited for

        prompt_embeds = None
        if (self.config.prompt_weight > 0 or self.config.local_weight > 0) and prompt_input_ids is not None:
            # prompts are short: a pass of their own costs less than padding them to the length of a report; it is the
            # first, as then its gradients, which are as large as the tower, come when the others have left
            prompt_embeds = self.embed_prompts(prompt_input_ids, prompt_attention_mask)
        num_lengths = max(min(NUM_LENGTHS, *sizes), 1)  # the same in every process, as FSDP needs
        num_parts = num_lengths if self.training and self._saves_memory else 1
        rows = self.encode_rows(
            pixel_values, input_ids, attention_mask, input_ids_masked, num_parts=num_parts, num_lengths=num_lengths
        )
        rebuilt = self.rebuild(
            rows,
            pixel_values,
            attention_mask,
            has_image,
            mlm_labels,
            entity_mask,
            mim_noise,
            bool_masked_pos,
            num_parts=num_parts,
        )
        finding_labels = {"prompt": prompt_labels, "local": prompt_labels, "side": side_labels}
        finding_logits = {}
        if prompt_embeds is not None:
            finding_logits = self.finding_logits(rows, prompt_embeds, prompt_labels.shape[1])
        losses = self.batch_losses(
            rows.image_embeds, rows.text_embeds, finding_logits, has_image, group_ids, finding_labels, sizes
        )
        losses |= rebuilt.losses
        logits_per_image = self.similarity_scale() * rows.image_embeds @ rows.text_embeds.T
        return MMCLIPForPreTrainingOutput(
            loss=self.total_loss(losses) if losses else None,
            loss_info={name: loss.detach() for name, loss in losses.items()},
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=rows.text_embeds,
            image_embeds=rows.image_embeds,
            mim_logits=rebuilt.mim_logits,
            mlm_logits=rebuilt.mlm_logits,
            bool_masked_pos=rebuilt.bool_masked_pos,
            text_to_patch_attention=rebuilt.text_to_patch_attention,
        )

    @property
    def _saves_memory(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.text_model.modules())

    def encode_rows(
        self,
        pixel_values,
        input_ids,
        attention_mask,
        input_ids_masked=None,
        *,
        num_parts: int = 1,
        num_lengths: int = NUM_LENGTHS,
    ) -> EncodedRows:
        """Both towers on the rows of a batch, whole and masked texts in one pass unless memory is to be saved.

        The masked texts go through in `num_parts` parts, which is for gradient checkpointing, other texts in
        `num_lengths` groups of like length.
        """
        masks_words = self.config.mlm_weight > 0 and input_ids_masked is not None
        masked_text_tokens = None
        if masks_words:
            first = slice(num_rebuilt_rows(self.config.mlm_row_ratio, len(input_ids)))
            input_ids_masked, masked_attention_mask = input_ids_masked[first], attention_mask[first]
        if masks_words and not (self.training and self._saves_memory):
            texts, mask = torch.cat([input_ids, input_ids_masked]), torch.cat([attention_mask, masked_attention_mask])
            pooled_text, text_tokens = self._encode_by_length(texts, mask, num_lengths)
            text_tokens, masked_text_tokens = text_tokens.split([len(input_ids), len(input_ids_masked)])
            pooled_text = pooled_text[: len(input_ids)]
        else:
            pooled_text, text_tokens = self._encode_by_length(input_ids, attention_mask, num_lengths)
            if masks_words:
                masked_text_tokens = self._in_parts(
                    num_parts, lambda *texts: self.encode_text(*texts)[1], input_ids_masked, masked_attention_mask
                )
        # after the texts: in the backward it goes first, and its memory with it, before the text tower has gradients
        pooled_image, patch_tokens, _ = self.encode_image(pixel_values)  # (B, H), (B, N, H)
        return EncodedRows(
            image_embeds=self.project_image(pooled_image),
            text_embeds=self.project_text(pooled_text),
            patch_tokens=patch_tokens,
            text_tokens=text_tokens,
            masked_text_tokens=masked_text_tokens,
        )

    def _encode_by_length(self, input_ids: Tensor, attention_mask: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Pooled texts and text tokens of [`encode_text`], in groups of like length: short texts have little padding.

        Prompts have a third of the words of a report, and reports differ as much among each other.
        """
        num_groups = min(num_groups, len(input_ids))
        if num_groups <= 1 or not attention_mask[:, 0].all():  # padded on the left
            return self.encode_text(input_ids, attention_mask)[:2]
        lengths, order = attention_mask.sum(dim=1).sort()
        lengths = lengths.tolist()
        pooled, tokens, end = [], [], 0
        for rows in order.tensor_split(num_groups):
            end += len(rows)
            length = lengths[end - 1]
            some_pooled, some_tokens, _ = self.encode_text(input_ids[rows, :length], attention_mask[rows, :length])
            pooled.append(some_pooled)
            tokens.append(F.pad(some_tokens, (0, 0, 0, input_ids.shape[1] - length)))
        back = order.argsort()
        return torch.cat(pooled)[back], torch.cat(tokens)[back]

    def rebuild(
        self,
        rows: EncodedRows,
        pixel_values: Tensor,
        attention_mask: Tensor,
        has_image: Tensor,
        mlm_labels: Tensor | None = None,
        entity_mask: Tensor | None = None,
        mim_noise: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        num_hidden_patches: Tensor | None = None,
        num_hidden_words: Tensor | None = None,
        num_parts: int = 1,
    ) -> Rebuilt:
        """AttMIM and EntMLM: both see one row at a time, so that a batch may go through in parts.

        Then `num_hidden_patches` and `num_hidden_words` are those of the whole batch, see [`masked_patch_loss`]. The
        decoders themselves see the rows in `num_parts` parts, which is for gradient checkpointing.
        """
        config, patch_tokens = self.config, rows.patch_tokens
        rebuilt = Rebuilt(losses={})
        rebuilt.text_to_patch_attention = self._entity_attention(
            patch_tokens, rows.text_tokens, attention_mask, entity_mask
        )  # (B, N)
        if config.mim_weight > 0:
            if bool_masked_pos is None:
                bool_masked_pos = self._hide_patches(rebuilt.text_to_patch_attention, mim_noise)
            first = slice(num_rebuilt_rows(config.mim_row_ratio, len(patch_tokens)))
            rebuilt.bool_masked_pos = hidden = bool_masked_pos[first]
            pixels, tokens = pixel_values[first], patch_tokens[first]
            seen = tokens
            if config.mim_level == "input":
                seen = self.encode_image(hide_pixels(pixels, hidden, self.patch_size))[1]
            rebuilt.mim_logits = self._in_parts(
                num_parts, self.mim_head, seen, hidden, rows.text_tokens[first], attention_mask[first]
            )
            targets = patchify(pixels, self.patch_size) if config.mim_target == "pixel" else tokens.detach()
            rebuilt.losses["mim"] = masked_patch_loss(
                rebuilt.mim_logits, normalise_patches(targets), hidden & has_image[first, None], num_hidden_patches
            )
        if rows.masked_text_tokens is not None:
            first = slice(len(rows.masked_text_tokens))
            no_image = self.no_image_token.to(patch_tokens.dtype)
            seen = torch.where(has_image[first, None, None], patch_tokens[first], no_image)
            mlm_labels = None if mlm_labels is None else mlm_labels[first]
            is_masked = None if mlm_labels is None else mlm_labels != -100
            words = self.text_model.get_input_embeddings().weight
            rebuilt.mlm_logits = self._in_parts(
                num_parts,
                self.mlm_head,
                rows.masked_text_tokens,
                attention_mask[first],
                seen,
                is_masked,
                word_embeddings=words,
            )
            if mlm_labels is not None:
                rebuilt.losses["mlm"] = masked_token_loss(rebuilt.mlm_logits, mlm_labels[is_masked], num_hidden_words)
        return rebuilt

    def _in_parts(self, num_parts: int, head, *rows: Tensor | None, **others) -> Tensor:
        """`head` of all rows, or of a part of them at a time, each of which is made again for its gradient."""
        if num_parts == 1:
            return head(*rows, **others)
        parts = ((None,) * num_parts if values is None else values.tensor_split(num_parts) for values in rows)
        return torch.cat([checkpoint(head, *part, use_reentrant=False, **others) for part in zip(*parts, strict=True)])

    def embed_prompts(self, prompt_input_ids: Tensor, prompt_attention_mask: Tensor) -> Tensor:
        """(2F, T'), (2F, T') -> (F, 2, D): "there is X" and "there is no X", L2-normalised."""
        return self.project_text(self.encode_text(prompt_input_ids, prompt_attention_mask)[0]).unflatten(0, (-1, 2))

    def finding_logits(self, rows: EncodedRows, prompt_embeds: Tensor, num_findings: int) -> dict[str, Tensor]:
        """What images (`prompt`) and their patches (`local`) say of F findings, (B, F) each, and images of the sides of
        S of them (`side`, (B, S)), as far as it counts. Of `prompt_embeds` (F + S, 2, D) the first are the F."""
        scale, logits = self.similarity_scale(), {}
        directions = prompt_directions(prompt_embeds)
        findings, sides = directions[:num_findings], directions[num_findings:]
        if self.config.prompt_weight > 0:
            logits["prompt"] = prompt_logits(rows.image_embeds, findings, scale)
        if self.config.local_weight > 0:
            logits["local"] = local_prompt_logits(self.project_image(rows.patch_tokens), findings, scale)
        if self.config.side_weight > 0 and len(sides):
            logits["side"] = prompt_logits(rows.image_embeds, sides, scale)
        return logits

    def batch_losses(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        finding_logits: dict[str, Tensor],
        has_image: Tensor,
        group_ids: Tensor | None = None,
        finding_labels: dict[str, Tensor | None] | None = None,
        sizes: list[int] | None = None,
    ) -> dict[str, Tensor]:
        """The losses that hold rows against each other, of all processes: contrastive and those of findings.

        `finding_labels` are those of `finding_logits`, by the same names, (B, F) or (B, S).
        """
        losses, finding_labels = {}, finding_labels or {}
        if self.config.contrastive_weight > 0:
            by_labels = self.config.contrastive_targets == "labels"
            losses["contrastive"] = contrastive_loss(
                image_embeds,
                text_embeds,
                self.similarity_scale(),
                group_ids,
                has_image,
                sizes,
                labels=finding_labels.get("prompt") if by_labels else None,
                label_temperature=self.config.label_temperature,
                logit_bias=getattr(self, "logit_bias", None),
            )
        for name, logits in finding_logits.items():
            labels = finding_labels[name].masked_fill(~has_image[:, None], -100)
            losses[name] = finding_loss(logits, labels, sizes)
        return losses

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Their sum under the weights of the config."""
        return sum(getattr(self.config, f"{name}_weight") * loss for name, loss in losses.items())

    @torch.no_grad()
    def _entity_attention(self, patch_tokens, text_tokens, attention_mask, entity_mask=None) -> Tensor:
        """Text-to-patch attention (B, N) of the entity words of each text; it only chooses, so it has no gradient."""
        words = attention_mask if entity_mask is None else entity_mask
        if self.config.mim_attention == "cross_attention":
            return _masked_mean(self.mlm_head.word_to_patch_attention(text_tokens, attention_mask, patch_tokens), words)
        return self.attention_to_patches(patch_tokens, self.project_text(self.pool_words(text_tokens, words)))

    def _hide_patches(self, attention: Tensor, noise: Tensor | None) -> Tensor:
        config = self.config
        noise = torch.rand_like(attention, dtype=torch.float32) if noise is None else noise
        attention = attention if config.mim_masking == "attention" else None
        return select_masked_patches(noise, config.mim_mask_ratio, attention, config.mim_attended_share)


class MMCLIPForImageClassification(MMCLIPPreTrainedModel):
    """The vision tower with a linear classifier on its pooled image, for fine-tuning and linear probes.

    `config.problem_type` is `"multi_label_classification"` (the default; labels (B, K) of 0 and 1, below 0 or NaN where
    unknown, which then do not count) or `"single_label_classification"` (labels (B,) of class numbers).
    """

    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_scale$", r"^m[il]m_head\.", r"^no_image_token$",
    ]  # fmt: skip

    def __init__(self, config: MMCLIPConfig):
        super().__init__(config)
        if config.problem_type is None:  # written down, as the pipeline would guess softmax
            config.problem_type = "multi_label_classification"
        if config.problem_type not in ("multi_label_classification", "single_label_classification"):
            raise ValueError(
                "`problem_type` must be 'multi_label_classification' or 'single_label_classification', but is "
                f"{config.problem_type!r}."
            )
        self._add_vision_tower()
        self.classifier = nn.Linear(self.vision_hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """(B, C, S, S) -> `logits` (B, num_labels), and `loss` where `labels` are given."""
        pooled, _, outputs = self.encode_image(pixel_values, **kwargs)
        logits = self.classifier(pooled)
        loss = None
        is_single = self.config.problem_type == "single_label_classification"
        expected = logits.shape[:1] if is_single else logits.shape
        if labels is not None and labels.shape != expected:
            raise ValueError(
                f"`labels` must be {tuple(expected)} for the problem_type {self.config.problem_type!r}, but are "
                f"{tuple(labels.shape)}. `problem_type` is given to `from_pretrained` or set in the config."
            )
        if labels is not None and is_single:
            loss = F.cross_entropy(logits, labels)
        elif labels is not None:
            known = labels >= 0  # also False for NaN
            targets = torch.where(known, labels, 0).to(logits.dtype)
            per_label = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            loss = (per_label * known).sum() / known.sum().clamp(min=1)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


__all__ = ["MMCLIPForImageClassification", "MMCLIPForPreTraining", "MMCLIPModel", "MMCLIPPreTrainedModel"]
