"""Do the pretraining heads look across? python benchmarks/pretraining_heads.py --model CHECKPOINT --json FILE

EntMLM names hidden words from the other words and the image, AttMIM rebuilds hidden patches from the other patches and
the text. What do they lose with the image, or the text, of another phantom? 1,000 phantoms of the validation stream,
which no training has seen. `--quick` takes an untrained model and 20 phantoms.
"""

from collections import defaultdict
from pathlib import Path

import torch
from benchmark_tools import argument_parser, machine, write_results
from torch import Tensor
from torch.utils.data import DataLoader

from MMCLIP import MMCLIPForPreTraining, MMCLIPProcessor
from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.data.dataset import MMCLIPDataset
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.training.arguments import parse_run_config
from MMCLIP.training.building import build_model_and_processor


MEASURES = {
    "mlm_loss_own": ("EntMLM, cross-entropy of a hidden word",),
    "mlm_loss_other": ("the same with the image of another phantom",),
    "mlm_accuracy_own": ("EntMLM, share of hidden words that it names",),
    "mlm_accuracy_other": ("the same with the image of another phantom",),
    "mim_loss_own": ("AttMIM, squared error of a hidden patch, 1 for its mean",),
    "mim_loss_other": ("the same with the text of another phantom",),
}
TEXT = ("input_ids", "attention_mask", "entity_mask")
CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "phantom_tiny.yaml"


def others(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The batch with what is named moved on by one row."""
    return {**batch, **{name: batch[name].roll(1, dims=0) for name in names}}


def measure(model: MMCLIPForPreTraining, processor: MMCLIPProcessor, num_phantoms: int) -> dict[str, float]:
    rows = phantom_dataset(num_phantoms, size=model.image_size, seed=5, split="val")
    collator = MMCLIPCollator(processor, model.num_patches)
    model.eval()
    model.config.mim_row_ratio = model.config.mlm_row_ratio = 1.0
    totals: dict[str, float] = defaultdict(float)
    num_words = num_rows = 0
    for batch in DataLoader(MMCLIPDataset(rows), batch_size=50, collate_fn=collator):
        labels = batch["mlm_labels"]
        labels = labels[labels != -100]
        num_words, num_rows = num_words + len(labels), num_rows + len(batch["pixel_values"])
        with torch.no_grad():
            own = model(**batch)
            if model.config.mlm_weight > 0:
                for key, output in (("own", own), ("other", model(**others(batch, "pixel_values")))):
                    totals[f"mlm_loss_{key}"] += output.loss_info["mlm"].item() * len(labels)
                    totals[f"mlm_accuracy_{key}"] += (output.mlm_logits.argmax(dim=-1) == labels).sum().item()
            if model.config.mim_weight > 0:
                # the patches that are hidden stay those of the own text: only what may be looked at changes
                other = model(**others(batch, *TEXT), bool_masked_pos=own.bool_masked_pos)
                for key, output in (("own", own), ("other", other)):
                    totals[f"mim_loss_{key}"] += output.loss_info["mim"].item() * len(batch["pixel_values"])
    counts = {"mlm": num_words, "mim": num_rows}
    return {name: totals[name] / counts[name[:3]] for name in MEASURES if name in totals}


def main() -> None:
    parser = argument_parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", default="outputs/demo/checkpoint", help="a checkpoint with both heads")
    args = parser.parse_args()
    if args.quick:
        model_arguments, data_arguments, _ = parse_run_config([str(CONFIG), "--output_dir", "unused"])
        model, processor = build_model_and_processor(model_arguments, data_arguments)
    else:
        model = MMCLIPForPreTraining.from_pretrained(args.model)
        processor = MMCLIPProcessor.from_pretrained(args.model)
    if model.config.mim_weight == model.config.mlm_weight == 0:
        parser.error(f"--model: {args.model} was trained without AttMIM and EntMLM, so there is no head to measure.")
    results = measure(model, processor, 20 if args.quick else 1000)
    about = {**machine(f"{torch.get_num_threads()}", ("torch", "transformers")), "quick": args.quick}
    about["model"] = "untrained" if args.quick else args.model
    write_results(MEASURES, results, about, args.json, {})


if __name__ == "__main__":
    main()
