"""A prepared folder as `datasets` loads and streams it, as training reads it, and a run from it."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from MMCLIP.data.dataset import MMCLIPDataset
from MMCLIP.data.indexing import PreparationOptions
from MMCLIP.data.manifest import FEATURES, check_rows
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.data.preparation import prepare
from MMCLIP.data.prepared import concatenate_rows, read_manifest, read_prepared
from MMCLIP.text.entities import Entity, LexiconRecognizer
from MMCLIP.training.arguments import DataArguments
from MMCLIP.training.building import build_rows


ROOT = Path(__file__).resolve().parent.parent
NUM_PHANTOMS, NUM_FILMS = 40, 14
REPORTS = {"0": "Small left effusion. No mass.", "1": "", "2": "Clear lungs."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 phantoms, 30 with a report, and 14 made-up films of a table, in several shards of three splits."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "own").mkdir()
    lines = ["file,text,labels,absent_labels,source,patient_id,split"]
    for i in range(NUM_FILMS):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(noise).save(place / "own" / f"{i}.png")
        text, label = REPORTS[str(i % 3)], ("mass", "edema", "nodule")[i % 3]
        lines.append(f"{i}.png,{text},{label},,nih,{i},{('train', 'train', 'val', 'test')[i % 4]}")
    lines.append(",Pacemaker on the left.,,,nih,,train")
    (place / "own" / "metadata.csv").write_text("\n".join(lines))
    prepare(
        {"own": str(place / "own"), "phantom": str(NUM_PHANTOMS)},
        place / "D",
        PreparationOptions(rows_per_shard=6, image_format="png", val_share=0.2),
        source_options={"phantom": {"size": "48", "num_unpaired": "10"}},
        num_proc=1,
    )
    return place / "D"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def all_ids() -> set[str]:
    films = {f"own/{i}.png" for i in range(NUM_FILMS)} | {"own/metadata.csv:16"}
    return films | {f"phantom-0-train-{i:06d}" for i in range(NUM_PHANTOMS)}


# ------------------------------------------------------------------------------------------------- plain `datasets`


def test_load_dataset_takes_the_folder_with_its_splits_pictures_and_entities(folder):
    loaded = datasets.load_dataset(str(folder))
    assert set(loaded) == {"train", "validation", "test"}
    rows = {row["row_id"]: row for part in loaded.values() for row in part}
    assert set(rows) == all_ids() and sum(map(len, loaded.values())) == len(rows)
    film = rows["own/0.png"]
    assert film["image"].size == (50, 40) and film["image"].mode == "L"
    assert (np.asarray(film["image"]) == np.asarray(Image.open(folder.parent / "own" / "0.png"))).all()
    spans = {(e["concept"], e["assertion"]): film["report"][e["start"] : e["end"]] for e in film["entities"]}
    assert spans["pleural effusion", "present"] == "effusion" and spans["mass", "absent"] == "mass"
    assert rows["own/metadata.csv:16"]["image"] is None and rows["own/1.png"]["report"] is None


def test_streaming_gives_the_rows_of_loading_in_the_same_order(folder):
    loaded = datasets.load_dataset(str(folder), split="train")
    streamed = list(datasets.load_dataset(str(folder), split="train", streaming=True))
    assert [row["row_id"] for row in streamed] == loaded["row_id"][:]
    assert streamed[3]["entities"] == loaded[3]["entities"] and streamed[3]["masks"] == loaded[3]["masks"]
    shards = sorted(str(path) for path in (folder / "val").glob("*.parquet"))
    files = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)
    assert {row["split"] for row in files} == {"val"}


def test_streams_of_several_processes_and_workers_give_each_row_once(folder):
    seen = []
    for rank in range(2):
        stream = datasets.load_dataset(str(folder), split="train", streaming=True).select_columns("row_id")
        stream = split_dataset_by_node(stream, rank=rank, world_size=2)
        seen += [row_id for batch in DataLoader(stream, batch_size=4, num_workers=2) for row_id in batch["row_id"]]
    assert sorted(seen) == sorted(read_prepared(folder, "train")["row_id"])


# --------------------------------------------------------------------------------------------------------- reading back


def test_rows_read_back_are_manifest_rows_of_the_wanted_split(folder):
    parts = {split: read_prepared(folder, split) for split in ("train", "val", "test")}
    check_rows(*parts.values())
    for split, rows in parts.items():
        assert set(rows["split"]) == {split}
        assert {name: rows.features[name] for name in FEATURES} == dict(FEATURES)
    assert {row_id for rows in parts.values() for row_id in rows["row_id"]} == all_ids()
    assert read_prepared(folder)["row_id"][:] == [row_id for rows in parts.values() for row_id in rows["row_id"]]


def test_a_folder_that_is_not_finished_and_a_split_that_is_not_there_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no preparation.json; run examples/prepare_data.py to its end"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="no row has the split 'validate'; the splits there are train, val, test"):
        read_manifest(folder, "validate")


@pytest.mark.parametrize("damage", ["end", "pages"])
def test_a_shard_that_cannot_be_read_is_named(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "D")
    shard = sorted((tmp_path / "D" / "train").glob("*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    if damage == "end":
        del content[-40:]
    else:
        content[4:60] = bytes(56)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name}: the shard cannot be read \([^$]*Copy it anew, or prepare"):
        read_manifest(tmp_path / "D", "train")


def test_a_table_is_still_a_table(folder):
    rows = read_manifest(folder.parent / "own" / "metadata.csv", "val", fully_labelled=("nih",))
    assert rows["row_id"][:] == ["own/2.png", "own/6.png", "own/10.png"]
    assert rows[0]["absent"] == ["edema", "mass"]


def test_fully_labelled_sources_have_absent_labels_after_preparation_too(folder):
    rows = read_manifest(folder, "val", fully_labelled=("nih",))
    absent = dict(zip(rows["row_id"], rows["absent"], strict=True))
    # labels of all splits count, though of one split only the rows are read
    assert absent["own/2.png"] == ["edema", "mass"] and absent["own/6.png"] == ["edema", "nodule"]
    plain = read_manifest(folder, "val")
    assert dict(zip(plain["row_id"], plain["absent"], strict=True))["own/2.png"] == []
    check_rows(rows)
    assert rows.features["absent"] == FEATURES["absent"] and rows[0]["image"] == plain[0]["image"]


class Counting(LexiconRecognizer):
    texts: list[str] = []

    def find(self, texts):
        self.texts.extend(texts)
        return super().find(texts)


def test_entities_found_ahead_are_used_by_the_recogniser_that_would_find_the_same(folder):
    rows = read_prepared(folder, "train")
    Counting.texts.clear()
    dataset = MMCLIPDataset(rows, recognizer=Counting())
    index = rows["row_id"][:].index("own/0.png")
    assert Entity(11, 19, "pleural effusion", "finding", "present") in dataset[index]["entities"]
    assert not Counting.texts
    known = {name: concept for name, concept in LexiconRecognizer().concepts.items() if name != "pleural effusion"}
    other = MMCLIPDataset(rows, recognizer=Counting(known))
    assert all(entity.concept != "pleural effusion" for entity in other[index]["entities"])
    assert len(Counting.texts) == sum(report is not None for report in rows["report"])


def test_entities_of_another_version_of_the_recogniser_are_not_read(folder, tmp_path):
    info = json.loads((folder / "preparation.json").read_text())
    (tmp_path / "preparation.json").write_text(json.dumps({**info, "entities": "an older one"}))
    (tmp_path / "train").symlink_to(folder / "train")
    rows = read_prepared(tmp_path, "train")
    Counting.texts.clear()
    found = MMCLIPDataset(rows, recognizer=Counting())
    assert len(Counting.texts) == sum(report is not None for report in rows["report"])
    expected = MMCLIPDataset(read_prepared(folder, "train"))
    assert [found[i]["entities"] for i in range(10)] == [expected[i]["entities"] for i in range(10)]


def test_together_with_rows_of_a_table_only_common_columns_stay(folder):
    prepared, drawn = read_prepared(folder, "val"), phantom_dataset(2, size=32, split="val")
    assert concatenate_rows([prepared, prepared]).column_names == prepared.column_names
    mixed = concatenate_rows([drawn, prepared])
    assert mixed.column_names == list(FEATURES) and len(mixed) == 2 + len(prepared)
    assert len(MMCLIPDataset(mixed)[len(mixed) - 1]["entities"]) >= 0


# ------------------------------------------------------------------------------------------------------------- training


def as_it_is(samples: list[dict]) -> list[str]:
    return [sample["row_id"] for sample in samples]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_workers_of_a_loader_see_each_row_once_an_epoch(folder, num_workers):
    dataset = MMCLIPDataset(read_prepared(folder))
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers, collate_fn=as_it_is)
    for _ in range(2):
        assert sorted(row_id for batch in loader for row_id in batch) == sorted(all_ids())


def test_two_processes_see_each_row_once_an_epoch_and_a_rest_is_dropped_by_asking(folder):
    dataset = MMCLIPDataset(read_prepared(folder))  # 55 rows: 13 batches of 4 and a rest of 3

    def seen(drop_last: bool) -> list[list[str]]:
        batches = BatchSampler(SequentialSampler(dataset), batch_size=4, drop_last=drop_last)
        shares = [BatchSamplerShard(batches, num_processes=2, process_index=rank) for rank in range(2)]
        loaders = [DataLoader(dataset, batch_sampler=share, num_workers=1, collate_fn=as_it_is) for share in shares]
        return [[row_id for batch in loader for row_id in batch] for loader in loaders]

    first, second = seen(drop_last=True)
    assert len(first) == len(second) == 24 and len({*first, *second}) == 48
    first, second = seen(drop_last=False)  # filled up to whole batches with rows from the start
    assert {*first, *second} == all_ids() and len(first) == len(second) == 28


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of the process from /proc")
def test_memory_does_not_grow_while_all_shards_are_read(tmp_path):
    (tmp_path / "own").mkdir()
    lines = ["file,labels"]
    for i in range(120):
        noise = np.random.default_rng(i).integers(0, 256, (512, 512), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "own" / f"{i}.png", compress_level=0)
        lines.append(f"{i}.png,mass")
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(lines))
    options = PreparationOptions(shorter_side=512, image_format="png", rows_per_shard=20, val_share=0.0)
    prepare({"own": str(tmp_path / "own")}, tmp_path / "D", options, num_proc=1)
    dataset = MMCLIPDataset(read_prepared(tmp_path / "D"))

    def own_memory() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024  # MB; pages of mapped files are not counted

    for index in range(20):
        dataset[index]
    before = own_memory()
    for _ in range(2):
        for index in range(len(dataset)):
            dataset[index]
    assert own_memory() - before < 10  # the pictures are 30 MB


def test_a_run_takes_its_splits_from_the_folder_and_rows_of_others_beside_them(folder):
    data = DataArguments(train_manifest=[str(folder)], validation_manifest=[str(folder)])
    train, validation = build_rows(data)
    assert set(train["split"]) == {"train"} and set(validation["split"]) == {"val"}
    assert "entities" in train.column_names
    more = DataArguments(train_manifest=[str(folder)], num_phantoms=3, phantom_seed=1, phantom_size=32)
    assert len(build_rows(more)[0]) == len(train) + 3


def test_a_picture_that_another_folder_validates_on_is_an_error(folder, tmp_path):
    line = "0.png,,mass,train"
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "0.png").symlink_to(folder.parent / "own" / "0.png")
    (tmp_path / "again" / "metadata.csv").write_text(f"file,text,labels,split\n{line}\n")
    prepare({"again": str(tmp_path / "again")}, tmp_path / "D", PreparationOptions(image_format="png"), num_proc=1)
    data = DataArguments(
        train_manifest=[str(folder)], validation_manifest=[str(tmp_path / "D")], validation_split="train"
    )
    with pytest.raises(ValueError, match="1 of 1 pictures to validate on are trained on too, .*'again/0.png'"):
        build_rows(data)


def test_validation_on_a_set_known_to_be_inside_the_training_set_is_warned_of(tmp_path, caplog):
    for name, size in (("chestxray14", 4), ("rsna", 5)):
        Image.new("L", (size, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.csv").write_text(f"file,labels,source,split\n{name}.png,mass,{name},train\n")

    def run(trained: str, validated: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_rows(
                DataArguments(
                    train_manifest=[str(tmp_path / f"{trained}.csv")],
                    validation_manifest=[str(tmp_path / f"{validated}.csv")],
                    validation_split="train",
                )
            )
        return caplog.text

    assert "Images of rsna are in chestxray14" in run("chestxray14", "rsna")
    (tmp_path / "other.csv").write_text("file,labels,source,split\nrsna.png,mass,other,train\n")
    assert "Images of" not in run("chestxray14", "other")


TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {"model_type": "vit", "num_channels": 1, "image_size": 32, "patch_size": 8, **TOWER}
TEXT = {"model_type": "bert", "max_position_embeddings": 64, **TOWER}


def training_words(folder: Path, output_dir: Path) -> list[str]:
    fields = {
        "train_manifest": str(folder),
        "validation_manifest": str(folder),
        "vision_config": json.dumps(VISION), "text_config": json.dumps(TEXT),
        "projection_dim": 16, "decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2,
        "prompt_labels": "all", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no",
        "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "output_dir": str(output_dir),
    }  # fmt: skip
    return [word for key, value in fields.items() for word in (f"--{key}", str(value))]


def test_a_run_trains_and_validates_on_the_folder(folder, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("run_pretrain", ROOT / "examples" / "run_pretrain.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *training_words(folder, tmp_path)])
    script.main()
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_macro_auroc" in entry for entry in log)
    assert log[-1]["step"] == 2 and np.isfinite(log[-1]["train_loss"])
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_real_processes_with_workers_see_each_row_once_an_epoch(folder, tmp_path):
    script = tmp_path / "seen.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "from MMCLIP.training.arguments import parse_run_config\n"
        "from MMCLIP.training.building import build_datasets, build_model_and_processor, build_rows\n"
        "from MMCLIP.training.trainer import MMCLIPTrainer\n"
        "place = Path(sys.argv.pop(1))\n"
        "model_arguments, data, arguments = parse_run_config()\n"
        "model, processor = build_model_and_processor(model_arguments, data)\n"
        "with arguments.main_process_first():\n"
        "    rows, _ = build_rows(data)\n"
        "    dataset, _ = build_datasets(rows, data, model, processor, seed=0)\n"
        "collate = lambda samples: {'index': __import__('torch').tensor([s['sample_seed'][2] for s in samples])}\n"
        "trainer = MMCLIPTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)\n"
        "seen = [index for batch in trainer.get_train_dataloader() for index in batch['index'].tolist()]\n"
        "(place / f'{arguments.process_index}.json').write_text(json.dumps([len(dataset), seen]))\n"
    )
    words = [*training_words(folder, tmp_path), "--eval_strategy", "no"]
    words += ["--dataloader_num_workers", "2", "--dataloader_drop_last", "True"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path), *words], check=True, env=environment, timeout=300)
    (number, first), (_, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == number // 8 * 4
    assert len({*first, *second}) == len(first) + len(second)
    assert torch.tensor(first + second).max() < number
