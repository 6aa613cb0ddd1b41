"""How long the evaluation takes: python benchmarks/evaluation.py --json FILE

Bootstrap: made-up scores of 25,000 images of some 9,000 patients and 14 findings, from rare to frequent, with every
metric of `classification_metrics`. Beside it the plain loop that calls scikit-learn for each draw, class and metric; of
that loop three draws are timed and multiplied, as all of them would take hours.

Zero-shot: phantoms of 224 px, 14 findings, and ten positive and ten negative prompts for each, by an untrained ViT-S/16
and a BERT of six layers, with every metric and its interval. Which part of it goes into reading the images and into the
image tower? `--quick` only shows that both run.
"""

import time
from pathlib import Path

import numpy as np
import sklearn.metrics
import torch
from benchmark_tools import argument_parser, in_turns, machine, write_results

from MMCLIP import MMCLIPConfig, MMCLIPImageProcessor, MMCLIPModel, MMCLIPProcessor
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.evaluation import zero_shot
from MMCLIP.evaluation.bootstrap import resample_patients
from MMCLIP.evaluation.calibration import NUM_BINS, bin_numbers
from MMCLIP.evaluation.metrics import classification_metrics
from MMCLIP.text.prompt_sets import PromptSet


# what is measured, and the target of it where there is one
MEASURES = {
    "bootstrap_seconds": ("classification_metrics, 1,000 resamples x 14 classes x 25,000 images, s", "<=", 20),
    "bootstrap_memory_mb": ("the most memory that it adds to the process, MB", "<=", 500),
    "sklearn_seconds": ("a loop over draws with scikit-learn, from three draws, s",),
    "bootstrap_speedup": ("times as fast as that loop",),
    "zero_shot_seconds": ("zero-shot, 1,000 images x 14 findings x 10 prompts and their denials, s",),
    "zero_shot_image_share": ("of this in the image tower and its preprocessing", ">=", 0.95),
}
SPECIFICITY = 0.9


def memory(key: str) -> float | None:
    """A line of /proc/self/status in MB, None where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


def made_up_study(num_images: int, num_classes: int = 14) -> dict:
    rng = np.random.default_rng(0)
    labels = (rng.random((num_images, num_classes)) < np.linspace(0.01, 0.5, num_classes)).astype(np.int64)
    scores = labels + rng.normal(size=labels.shape)
    names = [f"finding {number}" for number in range(num_classes)]
    patients = rng.integers(0, max(2, num_images * 9 // 25), num_images)
    return {
        "labels": labels,
        "scores": scores,
        "names": names,
        "patient_ids": [f"p{number}" for number in patients],
        "thresholds": dict.fromkeys(names, 0.5),
        "probabilities": 1 / (1 + np.exp(0.5 - scores)),
    }


def one_draw_with_sklearn(study: dict, weight: np.ndarray) -> list[list[float]]:
    """The metrics of each class, as one writes them down without a thought for speed."""
    found = []
    for column in range(study["labels"].shape[1]):
        labels, scores, probabilities = (study[key][:, column] for key in ("labels", "scores", "probabilities"))
        predicted, options = scores >= 0.5, {"sample_weight": weight}
        false, true, _ = sklearn.metrics.roc_curve(labels, scores, **options)
        excess = np.bincount(bin_numbers(probabilities), weight * (probabilities - labels), NUM_BINS)
        found.append(
            [
                sklearn.metrics.roc_auc_score(labels, scores, **options),
                sklearn.metrics.average_precision_score(labels, scores, **options),
                true[1 - false >= SPECIFICITY].max(),
                sklearn.metrics.f1_score(labels, predicted, **options),
                sklearn.metrics.accuracy_score(labels, predicted, **options),
                sklearn.metrics.matthews_corrcoef(labels, predicted, **options),
                sklearn.metrics.recall_score(labels, predicted, **options),
                sklearn.metrics.recall_score(labels, predicted, pos_label=0, **options),
                sklearn.metrics.brier_score_loss(labels, probabilities, **options),
                np.abs(excess).sum() / weight.sum(),
            ]
        )
    return found


def measure_bootstrap(num_images: int, num_bootstrap: int, num_rounds: int) -> dict[str, float | None]:
    study = made_up_study(num_images)
    (weights,) = resample_patients(study["patient_ids"], num_images, 3)
    before = memory("VmRSS")
    classification_metrics(**study, num_bootstrap=num_bootstrap, specificity=SPECIFICITY)
    added = None if before is None else memory("VmHWM") - before
    seconds = in_turns(
        num_rounds,
        ours=lambda: classification_metrics(**study, num_bootstrap=num_bootstrap, specificity=SPECIFICITY),
        sklearn=lambda: [one_draw_with_sklearn(study, weight) for weight in weights],
    )
    sklearn_seconds = seconds["sklearn"] / len(weights) * num_bootstrap
    return {
        "bootstrap_seconds": seconds["ours"],
        "bootstrap_memory_mb": added,
        "sklearn_seconds": sklearn_seconds,
        "bootstrap_speedup": sklearn_seconds / seconds["ours"],
    }


def measure_zero_shot(num_images: int, num_labels: int, num_layers: int) -> dict[str, float]:
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=224))
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    torch.manual_seed(0)
    model = MMCLIPModel(
        MMCLIPConfig(
            vision_config={"model_type": "vit", "num_channels": 1, "num_hidden_layers": 2 * num_layers, **small},
            text_config={
                "model_type": "bert", "vocab_size": len(processor.tokenizer), "num_hidden_layers": num_layers, **small
            },
        )
    )  # fmt: skip
    rows = phantom_dataset(num_images, size=224, split="test")
    labels = [
        "cardiomegaly",
        "edema",
        "mass",
        "nodule",
        "pneumothorax",
        "fracture",
        "pneumonia",
        "fibrosis",
        "emphysema",
        "atelectasis",
        "consolidation",
        "infiltration",
        "pleural effusion",
        "no finding",
    ]
    labels = labels[:num_labels]  # fmt: skip
    wordings = ["There is {}.", "{} is seen.", "Findings of {}.", "{}.", "The film shows {}.", "Signs of {}.",
                "Impression: {}.", "Consistent with {}.", "Evidence of {}.", "Known {}."]  # fmt: skip
    prompts = PromptSet(
        "ten",
        "this benchmark",
        "mean_embedding",
        {
            label: tuple(tuple(wording.format(said) for wording in wordings) for said in (label, f"no {label}"))
            for label in labels
        },
    )
    in_images, encode = [], zero_shot.image_features

    def timed(*arguments, **options):
        start = time.perf_counter()
        features = encode(*arguments, **options)
        in_images.append(time.perf_counter() - start)
        return features

    zero_shot.image_features = timed
    start = time.perf_counter()
    zero_shot.evaluate_zero_shot(model, processor, rows, labels, prompts=prompts)
    seconds = time.perf_counter() - start
    zero_shot.image_features = encode
    return {"zero_shot_seconds": seconds, "zero_shot_image_share": sum(in_images) / seconds}


def run(quick: bool) -> dict[str, float | None]:
    results = measure_bootstrap(200 if quick else 25_000, 20 if quick else 1000, 1 if quick else 5)
    return results | (measure_zero_shot(8, 2, 1) if quick else measure_zero_shot(1000, 14, 6))


def main():
    arguments = argument_parser(__doc__.partition(":")[0]).parse_args()
    results = run(arguments.quick)
    about = {**machine("all", ("numpy", "scipy", "scikit-learn", "torch")), "quick": arguments.quick}
    write_results(MEASURES, results, about, arguments.json, details={})


if __name__ == "__main__":
    main()
