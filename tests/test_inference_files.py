import os

import numpy as np
import pytest
import torch
from conftest import save_tiny
from dicom_files import file_bytes, make_dicom
from PIL import Image

from MMCLIP.inference.files import find_images, read_films
from MMCLIP.inference.loading import load_model
from MMCLIP.inference.tables import TableWriter


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(save_tiny(tmp_path_factory.mktemp("model")), device="cpu")


def refuse(path, reason):
    raise AssertionError(f"{path}: {reason}")


def test_images_are_found_once_in_the_order_that_was_given_and_sorted_in_folders(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a/x.dcm", "a/.hidden/y.png", "a/readme.md", "a/DICOMDIR", "z.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "a" / "1.2.840.1").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "a" / "no.suffix").write_bytes(b"\0" * 200)
    sources = [tmp_path / "z.png", tmp_path / "b", tmp_path, tmp_path / "a" / "readme.md"]
    found = [os.path.relpath(path, tmp_path) for path in find_images(sources, refuse)]
    assert found == ["z.png", "b/10.jpg", "b/2.PNG", "a/1.2.840.1", "a/x.dcm", "a/readme.md"]


def test_linked_folders_are_searched_once_and_pipes_are_not_waited_for(tmp_path):
    for name in ("films/a.png", "archive/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "films" / "archive").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "round").symlink_to(tmp_path / "films")
    os.mkfifo(tmp_path / "films" / "pipe")
    found = find_images([tmp_path / "films"], refuse)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["films/a.png", "films/archive/b.png"]


def test_films_have_the_embeddings_of_the_processor_even_where_all_is_nearly_black(loaded, tmp_path):
    model, processor = loaded
    dark = make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), WindowCenter=32768, WindowWidth=65536)
    (tmp_path / "dark.dcm").write_bytes(file_bytes(dark))
    deep = np.random.default_rng(0).integers(0, 60_000, (40, 30)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.uint8)).save(tmp_path / "gray.png")
    Image.new("RGBA", (30, 40), (200, 30, 30, 128)).save(tmp_path / "glass.png")
    paths = [str(tmp_path / name) for name in ("dark.dcm", "deep.png", "gray.png", "glass.png")]
    films = list(read_films(model, processor, paths, refuse, batch_size=3))
    assert [film.name for film in films] == paths
    expected = model.encode(paths)[0]
    torch.testing.assert_close(torch.cat([film.embeds for film in films]), expected, atol=1e-6, rtol=0)
    assert expected.std(dim=0).max() > 1e-3  # they are four different pictures


def test_a_film_without_a_finite_embedding_is_named_and_the_others_are_kept(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("L", (20, 20), 50 * number).save(path)
    project = model.project_image

    def broken(pooled):
        embeds = project(pooled).clone()
        embeds[1] = float("nan")
        return embeds

    monkeypatch.setattr(model, "project_image", broken)
    told = []
    films = list(read_films(model, processor, paths, lambda *problem: told.append(problem)))
    assert [film.name for film in films] == [paths[0], paths[2]]
    assert told == [(paths[1], "the model gives NaN or infinity for it; look for diverged weights")]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_a_table_that_is_broken_off_leaves_nothing_and_keeps_what_was_there(suffix, tmp_path):
    path = tmp_path / f"table.{suffix}"
    path.write_text("old")
    with pytest.raises(RuntimeError), TableWriter(path) as table:
        for number in range(2000):  # more than one row group of Parquet
            table.write({"path": str(number), "score": 0.5})
        raise RuntimeError("power cut")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_parquet_of_several_row_groups_and_missing_numbers(tmp_path):
    import pyarrow.parquet as pq

    with TableWriter(tmp_path / "t.parquet") as table:
        for number in range(2500):
            table.write({"path": "a", "number": number, "probability": None if number < 2000 else 0.25})
    read = pq.read_table(tmp_path / "t.parquet")
    assert (
        read.column("number").to_pylist() == list(range(2500))
        and pq.read_metadata(tmp_path / "t.parquet").num_row_groups == 3
    )
    assert read.column("probability").null_count == 2000 and read.column("probability")[2499].as_py() == 0.25
