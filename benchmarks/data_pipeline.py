"""How fast images are decoded, prepared sets loaded and tables indexed: python benchmarks/data_pipeline.py --json FILE

One thread, so every rate is that of one core. What is compared runs in turns, and each number is the median of its
turns. `--quick` shrinks everything to see that it runs; its numbers mean nothing. Whatever they are, it ends with 0.
"""

import os


os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before torch and tokenizers are loaded

import csv
import gc
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from benchmark_tools import argument_parser, in_turns, machine, write_results
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor, load_shrunk
from PIL import Image

from MMCLIP import MMCLIPProcessor
from MMCLIP.data.augmentation import RadiographAugmentation
from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.data.dataset import MMCLIPDataset
from MMCLIP.data.indexing import PreparationOptions, write_index
from MMCLIP.data.phantom import phantom_row
from MMCLIP.data.preparation import prepare
from MMCLIP.data.prepared import read_prepared
from MMCLIP.data.readers import read_csv_manifest
from MMCLIP.text.vocabulary import LABEL_KINDS, vocabulary


WIDTH, HEIGHT = 2544, 3056  # of most films in MIMIC-CXR-JPG
REAL_FILES = Path(__file__).resolve().parents[2] / "shared" / "data" / "originals"
BATCH_SIZE = 64
PROMPT_LABELS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion")
# what is measured, and the target of it where there is one
MEASURES = {
    "decode_speedup": ("decoding a 2,544 x 3,056 JPEG to 224 px, times as fast as Pillow", ">=", 2),
    "decode_difference": ("mean difference from Pillow's, grey levels", "<", 1),
    "decode_ms": ("one such JPEG, ms",),
    "decode_ms_pillow": ("one such JPEG with Pillow's full decode and resize, ms",),
    "decode_speedup_real": ("the same of real JPEGs above 2,000 px, times as fast", ">=", 2),
    "decode_difference_real": ("their mean difference, grey levels", "<", 1),
    "decode_ms_real": ("one of them, ms",),
    "decode_ms_pillow_real": ("one of them with Pillow, ms",),
    "loading_speedup": ("row to batch from a set prepared with longer_side 256, times as fast as originals", ">=", 25),
    "loading_speedup_default": ("the same from a set prepared with shorter_side 256, the default", ">=", 25),
    "loading_ms": ("one row from the first of them, ms",),
    "loading_ms_default": ("one row from the second, ms",),
    "loading_ms_originals": ("one row from originals, ms",),
    "picture_speedup": ("the picture alone, file to pixel_values, from the first, times as fast as originals",),
    "picture_speedup_default": ("the same from the second",),
    "loading_rate": ("row to augmented batch at 256 px from the first, images a second and core", ">=", 400),
    "loading_rate_default": ("the same from the second", ">=", 400),
    "augmentation_ms": ("augmentation of one image of 256 px in a batch, ms",),
    "processor_speedup": ("image processor on a batch of 256 px, times as fast as CLIP's", ">=", 2),
    "processor_speedup_gray": ("the same against CLIP's set to one channel",),
    "processor_rate": ("image processor, images a second",),
    "processor_rate_clip": ("CLIP's, images a second",),
    "processor_rate_clip_gray": ("CLIP's set to one channel, images a second",),
    "epochs_memory_mb": ("memory that 20 more epochs of a prepared set take, MB", "<", 10),
    "index_seconds": ("indexing 377,110 rows, s", "<", 60),
    "index_memory_gb": ("indexing 377,110 rows, peak memory in a fresh process, GB", "<", 2),
    "index_table_mb": ("size of that table, MB",),
}


def memory(field: str) -> float | None:
    """MB of this process: "RssAnon" is its own, "VmHWM" the most it ever had; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --------------------------------------------------------------------------------------------------------- the measures


def write_originals(folder: Path, num_files: int, num_rows: int) -> Path:
    """`num_files` films of full size, phantoms with grain, and a table of `num_rows` that names each many times."""
    for index in range(num_files):
        phantom = Image.open(io.BytesIO(phantom_row(index, size=512)["image"]["bytes"]))
        pixels = np.asarray(phantom.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = np.random.default_rng(index).standard_normal(pixels.shape, dtype=np.float32)
        film = Image.fromarray((pixels + 2 * grain).clip(0, 255).astype(np.uint8))
        film.save(folder / f"{index}.jpg", quality=95)
    reports = [phantom_row(index, size=32)["report"] for index in range(min(num_rows, 100))]
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "labels", "patient_id", "split"])
        for row in range(num_rows):  # every fourth is unpaired
            text, label = ("", PROMPT_LABELS[row % 5]) if row % 4 == 3 else (reports[row % len(reports)], "")
            writer.writerow([f"{row % num_files}.jpg", text, label, row, "train"])
    return folder / "metadata.csv"


def measure_decoding(files: list[Path], num_rounds: int) -> dict[str, float]:
    """`load_shrunk` to 224 pixels against decoding and shrinking the whole picture with Pillow."""

    def whole(file: Path) -> Image.Image:
        with Image.open(file) as image:
            factor = 224 / min(image.size)
            size = round(image.width * factor), round(image.height * factor)
            return image.convert("L").resize(size, Image.Resampling.BICUBIC)

    seconds = in_turns(
        num_rounds,
        ours=lambda: [load_shrunk(file, 224) for file in files],
        pillow=lambda: [whole(file) for file in files],
    )
    differences = [
        np.abs(np.subtract(load_shrunk(file, 224)[0], whole(file), dtype=np.float32)).mean() for file in files
    ]
    return {
        "decode_speedup": seconds["pillow"] / seconds["ours"],
        "decode_difference": float(max(differences)),
        "decode_ms": 1000 * seconds["ours"] / len(files),
        "decode_ms_pillow": 1000 * seconds["pillow"] / len(files),
    }


def make_collator() -> MMCLIPCollator:
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=256), MMCLIPProcessor().tokenizer)
    return MMCLIPCollator(
        processor, num_patches=256, prompt_labels=PROMPT_LABELS, augmentation=RadiographAugmentation()
    )


def batches(dataset: MMCLIPDataset, num_rows: int, collator: MMCLIPCollator) -> Iterator[dict]:
    for start in range(0, num_rows, BATCH_SIZE):
        yield collator([dataset[row] for row in range(start, min(start + BATCH_SIZE, num_rows))])


def augmented(batch: dict, collator: MMCLIPCollator) -> torch.Tensor:
    return collator.augmentation(batch["pixel_values"], batch["augmentation_draws"], batch["has_image"])


def measure_loading(table: Path, prepared: dict[str, Path], num_files: int, num_rounds: int) -> dict[str, float]:
    """Row to batch of 256 pixels, from prepared sets and from the files they were made of."""
    collator = make_collator()
    originals = MMCLIPDataset(read_csv_manifest(table))
    files = [image["path"] for image in originals.rows[:num_files]["image"]]
    processor = collator.processor.image_processor

    def load(dataset: MMCLIPDataset, num_rows: int, augment: bool = False) -> None:
        for batch in batches(dataset, num_rows, collator):
            if augment:
                augmented(batch, collator)

    def read(images: list) -> None:
        for start in range(0, len(images), BATCH_SIZE):
            processor(images[start : start + BATCH_SIZE], return_tensors="pt")

    functions = {"original_rows": partial(load, originals, num_files), "original_pictures": partial(read, files)}
    num_images = {}
    for kind, folder in prepared.items():
        shards = MMCLIPDataset(read_prepared(folder, "train"))
        num_images[kind] = len(shards)
        functions[f"rows{kind}"] = partial(load, shards, len(shards))
        functions[f"augmented{kind}"] = partial(load, shards, len(shards), augment=True)
        functions[f"pictures{kind}"] = partial(read, [image["bytes"] for image in shards.rows["image"]])
    some = next(batches(shards, BATCH_SIZE, collator))
    seconds = in_turns(num_rounds, **functions, augmentation=lambda: augmented(some, collator))
    original, original_picture = (seconds[f"original_{what}"] / num_files for what in ("rows", "pictures"))
    results = {
        "loading_ms_originals": 1000 * original,
        "augmentation_ms": 1000 * seconds["augmentation"] / BATCH_SIZE,
    }
    for kind, number in num_images.items():
        results[f"loading_speedup{kind}"] = original / (seconds[f"rows{kind}"] / number)
        results[f"loading_ms{kind}"] = 1000 * seconds[f"rows{kind}"] / number
        results[f"picture_speedup{kind}"] = original_picture / (seconds[f"pictures{kind}"] / number)
        results[f"loading_rate{kind}"] = number / seconds[f"augmented{kind}"]
    return results


def measure_processor(prepared: Path, num_rounds: int) -> dict[str, float]:
    """A batch of grey 256 x 256 pictures in memory, with the defaults of both: 224 x 224 comes out."""
    rows = read_prepared(prepared, "train").select(range(BATCH_SIZE))
    pictures = [Image.open(io.BytesIO(image["bytes"])).resize((256, 256)) for image in rows["image"]]
    try:
        clip = transformers.CLIPImageProcessor()
    except ImportError:  # older transformers without torchvision
        clip = transformers.CLIPImageProcessorPil()
    ours = MMCLIPImageProcessor()
    gray = type(clip)(do_convert_rgb=False, image_mean=ours.image_mean, image_std=ours.image_std)
    seconds = in_turns(
        num_rounds,
        ours=lambda: ours(pictures, return_tensors="pt"),
        clip=lambda: clip(pictures, return_tensors="pt"),
        gray=lambda: gray(pictures, return_tensors="pt"),
    )
    return {
        "processor_speedup": seconds["clip"] / seconds["ours"],
        "processor_speedup_gray": seconds["gray"] / seconds["ours"],
        "processor_rate": BATCH_SIZE / seconds["ours"],
        "processor_rate_clip": BATCH_SIZE / seconds["clip"],
        "processor_rate_clip_gray": BATCH_SIZE / seconds["gray"],
    }


def write_large_table(path: Path, num_rows: int) -> None:
    """As many rows as MIMIC-CXR has images, with reports of its length and no image behind them."""
    draw = random.Random(0)
    reports = [phantom_row(index, size=32)["report"] for index in range(50)]
    sentences = sorted({sentence.strip() for report in reports for sentence in report.split(".") if sentence.strip()})
    labels = sorted(name for name, concept in vocabulary().items() if concept.kind in LABEL_KINDS)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "labels", "patient_id", "study_id", "view", "split"])
        for row in range(num_rows):
            text = ". ".join(draw.sample(sentences, 8)) + "."
            patient = row * 65_379 // num_rows  # as many as there
            split = "val" if patient % 100 == 0 else "test" if patient % 100 == 1 else "train"
            named = ";".join(draw.sample(labels, 2))
            writer.writerow([f"files/p{patient}/{row}.jpg", text, named, patient, row // 2, "AP", split])


def index_table(table: Path, folder: Path) -> tuple[float, float | None]:
    """Seconds, and the most memory in MB of this process, which does nothing else."""
    start = time.perf_counter()
    write_index(folder, "table", str(table))
    return time.perf_counter() - start, memory("VmHWM")


def measure_index(folder: Path, num_rows: int, num_rounds: int) -> dict[str, float]:
    table = folder / "large.csv"
    write_large_table(table, num_rows)
    runs = [in_fresh_process(index_table, table, folder / f"index-{turn}") for turn in range(num_rounds)]
    most = [megabytes / 1024 for _, megabytes in runs if megabytes is not None]
    return {
        "index_seconds": statistics.median(seconds for seconds, _ in runs),
        "index_memory_gb": max(most) if most else None,
        "index_table_mb": table.stat().st_size / 1e6,
    }


def memory_of_epochs(prepared: Path, cache: Path, num_epochs: int) -> list[float | None]:
    """MB of its own that this process holds after each epoch of loading in drawn order."""
    prepare_process(cache)
    collator = make_collator()
    dataset = MMCLIPDataset(read_prepared(prepared, "train"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collator)
    held = []
    for epoch in range(num_epochs):
        dataset.set_epoch(epoch)
        for batch in loader:
            augmented(batch, collator)
        gc.collect()
        held.append(memory("RssAnon"))
    return held


def measure_memory(prepared: Path, cache: Path, num_epochs: int) -> dict[str, float | None]:
    held = in_fresh_process(memory_of_epochs, prepared, cache, num_epochs)
    # the first two fill caches
    return {"epochs_memory_mb": None if held[-1] is None else held[-1] - held[min(1, num_epochs - 1)]}


# -------------------------------------------------------------------------------------------------------------- the run


def prepare_process(cache: Path) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = cache  # goes with the temporary folder
    transformers.logging.set_verbosity_error()


def run(quick: bool) -> dict[str, float]:
    num_files, num_rows = (2, BATCH_SIZE) if quick else (16, 8 * BATCH_SIZE)
    num_rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_process(folder / "cache")
        (folder / "originals").mkdir()
        table = write_originals(folder / "originals", num_files, num_rows)
        prepared = {"": folder / "longer", "_default": folder / "default"}  # by the ending of their measures
        for path, side in zip(prepared.values(), ({"longer_side": 256}, {}), strict=True):
            options = PreparationOptions(rows_per_shard=num_rows // 4, **side)
            prepare({"films": str(table)}, path, options, num_proc=1 if quick else None)
        results = measure_decoding(sorted((folder / "originals").glob("*.jpg"))[:4], num_rounds)
        real = [file for file in sorted(REAL_FILES.glob("*.jp*g")) if min(Image.open(file).size) > 2000]
        if real and not quick:
            results |= {f"{name}_real": value for name, value in measure_decoding(real, num_rounds).items()}
        results |= measure_loading(table, prepared, num_files, num_rounds)
        results |= measure_processor(prepared["_default"], 2 * num_rounds)
        results |= measure_memory(prepared["_default"], folder / "cache", 2 if quick else 22)
        return results | measure_index(folder, 2000 if quick else 377_110, 1 if quick else 2)


def main():
    arguments = argument_parser(__doc__.partition(":")[0]).parse_args()
    results = run(arguments.quick)
    packages = ("torch", "transformers", "datasets", "tokenizers", "pyarrow", "pillow", "numpy")
    about = {**machine("1 (preparation: one process a core)", packages), "quick": arguments.quick}
    write_results(MEASURES, results, about, arguments.json, details={})


if __name__ == "__main__":
    main()
