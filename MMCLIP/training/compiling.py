"""torch.compile under the Trainer: each tower and each decoder is one graph, and nothing around them is compiled."""

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from ..modeling_mmclip import MMCLIPForPreTraining


def compile_parts(accelerator: Accelerator, model: MMCLIPForPreTraining, args: TrainingArguments) -> None:
    """With `torch_compile`, compile the towers and decoders in place; their names in checkpoints stay as they are.

    What lies between talks to other processes and picks words, which no graph holds. The lengths of texts are free in
    the graph, so that a new length compiles nothing. Raises `ValueError` together with FSDP, whose shards lie within
    the towers.
    """
    plugin = accelerator.state.dynamo_plugin
    backend = (args.torch_compile_backend or plugin.backend.value).lower()
    if backend == "no":
        return
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        raise ValueError(
            "`torch_compile` makes one graph of each tower, but FSDP shards the layers within, which breaks it. Leave "
            "out one of the two."
        )
    mode = args.torch_compile_mode or plugin.mode
    plugin.backend = DynamoBackend.NO  # or accelerate would compile the whole model too
    if args.gradient_checkpointing:
        model.text_model.config.use_cache = False  # else BERT warns that it is off, which breaks the graph
        torch._dynamo.config.optimize_ddp = False  # it splits graphs, older torch none that is checkpointed
    model.vision_model.compile(backend=backend, mode=mode, fullgraph=True)
    # or a first batch of as many tokens as a layer is wide would fix the length at that
    torch.fx.experimental._config.use_duck_shape = False
    parts = [model.text_model]
    if model.config.mim_weight > 0:
        parts.append(model.mim_head)
    if model.config.mlm_weight > 0:
        parts.append(model.mlm_head.decoder)
    for part in parts:
        part.compile(backend=backend, mode=mode, fullgraph=True, dynamic=True)
