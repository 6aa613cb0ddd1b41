"""FSDP2 under the Trainer: what accelerate and PyTorch have to be told of MMCLIP's models, and of CPUs."""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from transformers.modeling_layers import GradientCheckpointingLayer


def shard_on_cpu_too(accelerator: Accelerator) -> None:
    """Turn on FSDP where it was asked for and the processes are on CPUs: accelerate drops it there without a word."""
    state = accelerator.state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def prepare_for_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Fit an MMCLIP model and accelerate's plan for it to each other, before its optimiser is made.

    Raises `ValueError` for the first FSDP, and where the weights would be saved in shards only, which nothing loads.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"FSDP {plugin.fsdp_version} with {plugin.state_dict_type.name} does not fit MMCLIP: set `fsdp_version: 2` "
            "and `fsdp_state_dict_type: FULL_STATE_DICT`, as examples/accelerate/fsdp2.yaml does."
        )
    # no embeddings, which transformers names beside the layers: EntMLM reads those of the words outside their forward
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    plugin.transformer_cls_names_to_wrap = sorted(layers)
    model.get_input_embeddings = lambda: None  # accelerate would shard them on their own
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))  # a scalar cannot be sharded
    if accelerator.mixed_precision == "bf16":
        # weights are gathered in bf16, which a batch norm does not take beside its float32 statistics; autocast decides
        # for each operation what it decides without FSDP
        has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=None if has_batch_norm else torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    # nothing writes into the outputs of the model
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
