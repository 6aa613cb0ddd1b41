"""The pipelines of transformers on saved folders, and ours, "fill-mask-with-image"."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_processor
from dicom_files import file_bytes, make_dicom
from MMCLIP.pipeline_mmclip import FillMaskWithImagePipeline
from PIL import Image
from test_saved_folder import clean_environment
from transformers import AutoModel, pipeline

from MMCLIP import (
    MMCLIPForImageClassification,
    MMCLIPForPreTraining,
    MMCLIPModel,
)
from MMCLIP.data.phantom import make_phantom


FILL = "fill-mask-with-image"
TEXT = "There is a large left [MASK] effusion."
TRUST = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders `pretraining` and `classifier`, with the models in them, the processor and four pictures."""
    folder = tmp_path_factory.mktemp("pipelines")
    processor = tiny_processor()
    torch.manual_seed(0)
    model = MMCLIPForPreTraining(tiny_config(vocab_size=len(processor.tokenizer))).eval()
    with torch.no_grad():  # an untrained decoder hardly looks at the image
        for parameter in model.mlm_head.parameters():
            parameter.mul_(3).add_(0.3 * torch.randn_like(parameter))
    model.processor = processor  # for `encode`
    classifier = MMCLIPForImageClassification(
        tiny_config(num_labels=3, id2label={0: "edema", 1: "mass", 2: "fracture"})
    )
    for name, each in (("pretraining", model), ("classifier", classifier.eval())):
        each.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    pixels = [make_phantom(0, index, 64).image for index in range(2)]
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "b.png")
    Image.fromarray(pixels[1].astype(np.uint16) * 200).save(folder / "deep.png")
    (folder / "film.dcm").write_bytes(file_bytes(make_dicom(pixels[1].astype(np.uint16) * 16, bits=12)))
    return folder, model, classifier, processor


@pytest.fixture(scope="module")
def fill(saved):
    return pipeline(task=FILL, model=str(saved[0] / "pretraining"), device="cpu", **TRUST)


# ------------------------------------------------------------------------------------------ pipelines of transformers


def test_zero_shot_image_classification_is_the_softmax_over_the_sentences(saved):
    folder, model, _, processor = saved
    pipe = pipeline(task="zero-shot-image-classification", model=str(folder / "pretraining"), device="cpu", **TRUST)
    sentences = ["There is a pleural effusion.", "Normal chest radiograph.", "There is cardiomegaly."]
    found = pipe(str(folder / "a.png"), candidate_labels=sentences, hypothesis_template="{}")
    images, texts = model.encode(folder / "a.png", sentences)
    expected = (model.similarity_scale() * images @ texts.T).softmax(dim=-1)[0].tolist()
    scores = {entry["label"]: entry["score"] for entry in found}
    assert [scores[sentence] for sentence in sentences] == pytest.approx(expected, abs=1e-5)


def test_image_classification_gives_each_label_its_own_probability(saved):
    folder, _, classifier, processor = saved
    pipe = pipeline(task="image-classification", model=str(folder / "classifier"), device="cpu", **TRUST)
    single, batch = pipe(str(folder / "a.png")), pipe([str(folder / "a.png"), str(folder / "b.png")], batch_size=2)
    with torch.no_grad():
        logits = classifier(processor(images=folder / "a.png")["pixel_values"]).logits[0]
    expected = dict(zip(["edema", "mass", "fracture"], logits.sigmoid().tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in single} == pytest.approx(expected, abs=1e-5)
    assert {entry["label"]: entry["score"] for entry in batch[0]} == pytest.approx(expected, abs=1e-5)
    assert batch[1] != batch[0]


def test_image_feature_extraction_gives_the_embedding_of_the_image(saved):
    folder, model, _, _ = saved
    pipe = pipeline(task="image-feature-extraction", model=str(folder / "pretraining"), device="cpu", **TRUST)
    (features,) = pipe(str(folder / "a.png"))
    torch.testing.assert_close(torch.tensor(features), model.encode(folder / "a.png")[0][0], atol=1e-5, rtol=0)


def test_the_pipelines_of_transformers_open_files_themselves_so_deep_ones_go_through_the_processor(saved):
    folder, model, _, _ = saved
    pipe = pipeline(task="image-feature-extraction", model=str(folder / "pretraining"), device="cpu", **TRUST)
    right = model.encode(folder / "deep.png")[0]
    wrong = torch.tensor(pipe(str(folder / "deep.png")))
    assert (wrong - right).abs().max() > 1e-3  # 16 bits saturate to white, as the README says
    with pytest.raises(Exception, match="cannot identify image file"):
        pipe(str(folder / "film.dcm"))


# -------------------------------------------------------------------------------------------------------------- ours


def test_fill_mask_scores_are_those_of_entmlm_for_this_image_and_text(saved, fill):
    folder, model, _, processor = saved
    answers = fill(folder / "a.png", TEXT, top_k=4)
    inputs = processor(images=folder / "a.png", text=TEXT)
    with torch.no_grad():
        logits = model(**inputs, input_ids_masked=inputs["input_ids"]).mlm_logits[0]
    place = inputs["input_ids"][0].tolist().index(processor.tokenizer.mask_token_id)
    scores, tokens = logits[place].softmax(dim=-1).topk(4)
    assert [answer["token"] for answer in answers] == tokens.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(scores.tolist(), rel=1e-4)
    (word,) = fill(folder / "a.png", TEXT, targets="pleural")
    assert word["token"] == processor.tokenizer.convert_tokens_to_ids("pleural") and word["token_str"] == "pleural"
    assert word["sequence"] == "there is a large left pleural effusion."


def test_fill_mask_answers_differ_with_the_image_and_without_one(saved, fill):
    folder = saved[0]
    scores = [fill(image, TEXT)[0]["score"] for image in (folder / "a.png", folder / "b.png", None)]
    assert len(set(np.round(scores, 6))) == 3
    assert fill(folder / "a.png", TEXT) == fill(folder / "a.png", TEXT)  # nothing is drawn at random


def test_fill_mask_reads_16_bit_and_dicom_files_as_the_processor_does(saved, fill):
    folder = saved[0]
    plain = fill(folder / "b.png", TEXT)
    for name in ("deep.png", "film.dcm"):
        answers = fill(folder / name, TEXT)
        assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in plain], rel=0.05), name


def test_fill_mask_of_several_masks_and_reports_is_a_list_of_lists_in_batches_too(saved, fill):
    folder = saved[0]
    texts = [TEXT, "[MASK] [MASK]: no pneumothorax."]
    one_by_one = [fill(folder / "a.png", text) for text in texts]
    assert isinstance(one_by_one[0][0], dict) and [len(answers) for answers in one_by_one[1]] == [5, 5]
    assert "[MASK]" in one_by_one[1][0][0]["sequence"] and one_by_one[1][0] != one_by_one[1][1]
    together = fill(folder / "a.png", texts, batch_size=2)
    as_dicts = fill([{"image": folder / "a.png", "text": text} for text in texts])
    for found in (together, as_dicts):
        assert found[0][0]["score"] == pytest.approx(one_by_one[0][0]["score"], rel=1e-4)
        assert [a["token"] for a in found[1][1]] == [a["token"] for a in one_by_one[1][1]]
    assert fill(folder / "a.png", []) == []
    other = fill([folder / "a.png", folder / "b.png"], [TEXT, TEXT])
    assert other[0] == one_by_one[0] and other[1] == fill(folder / "b.png", TEXT)


def test_fill_mask_targets_are_scored_among_all_words(saved, fill):
    folder = saved[0]
    every = {answer["token_str"]: answer["score"] for answer in fill(folder / "a.png", TEXT, top_k=10_000)}
    assert sum(every.values()) == pytest.approx(1, abs=1e-3)
    found = fill(folder / "a.png", TEXT, targets=["pleural", "edema"], top_k=1)
    assert len(found) == 1 and found[0]["token_str"] == max(("pleural", "edema"), key=every.get)
    assert found[0]["score"] == pytest.approx(every[found[0]["token_str"]], rel=1e-4)


def test_fill_mask_says_what_is_wrong_with_its_input(saved, fill):
    folder = saved[0]
    image = folder / "a.png"
    for arguments, options, message in (
        ((image, "No mask here."), {}, r"must have a \[MASK\] in place of the hidden word, but it is missing"),
        ((image, "The lungs are clear. " * 40 + TEXT), {}, r"stands beyond the 64 of its \d{3} tokens that are read"),
        ((image, TEXT + " The lungs are clear." * 40 + TEXT), {}, "stands beyond the 64 of its"),  # one of two
        ((image, TEXT), {"targets": ["hepatosplenomegalic"]}, "must be one token"),
        ((image, TEXT), {"top_k": 0}, "`top_k` must be 1 or more, got 0"),
        ((image,), {}, "needs `text`, a report with a mask"),
        (([image], [TEXT, TEXT]), {}, "got 1 images and 2 texts"),
        (([image, image], TEXT), {}, "got a list of 2 images and one text"),
        ((folder / "nowhere.png", TEXT), {}, "there is no such image file"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(*arguments, **options)


def test_fill_mask_needs_a_checkpoint_with_entmlm(saved, tmp_path):
    folder, _, _, processor = saved
    with pytest.raises(ValueError, match="`mlm_weight` above 0"):
        FillMaskWithImagePipeline(MMCLIPForPreTraining(tiny_config(mlm_weight=0.0)), processor=processor)
    MMCLIPModel.from_pretrained(folder / "pretraining").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this one is of MMCLIPModel"):  # its EntMLM would be random
        pipeline(task=FILL, model=str(tmp_path), **TRUST)


def test_only_a_folder_that_can_fill_masks_says_so(saved, tmp_path):
    folder = saved[0]

    def listed(path) -> dict:
        return json.loads((path / "config.json").read_text()).get("custom_pipelines", {})

    assert list(listed(folder / "pretraining")) == [FILL] and not listed(folder / "classifier")
    AutoModel.from_pretrained(folder / "pretraining").save_pretrained(tmp_path / "towers")
    assert not listed(tmp_path / "towers")
    MMCLIPForPreTraining(tiny_config(mlm_weight=0.0)).save_pretrained(tmp_path / "without")
    assert not listed(tmp_path / "without")
    MMCLIPForPreTraining.from_pretrained(folder / "pretraining").save_pretrained(tmp_path / "again")
    assert listed(tmp_path / "again") == listed(folder / "pretraining")


def test_importing_mmclip_registers_the_pipeline_for_a_model_in_memory(saved):
    folder, model, _, processor = saved
    pipe = pipeline(task=FILL, model=model, processor=processor, device="cpu")
    assert type(pipe) is FillMaskWithImagePipeline and len(pipe(folder / "a.png", TEXT)) == 5


CLEAN_PROCESS = """
import sys
sys.modules["MMCLIP"] = None
import json
from transformers import pipeline

pipe = pipeline(task="fill-mask-with-image", model=sys.argv[1], trust_remote_code=True, device="cpu")
print("RESULT" + json.dumps([type(pipe).__module__.split(".")[0], pipe(sys.argv[2], sys.argv[3])]))
"""


def test_the_saved_folder_brings_the_pipeline_to_a_process_without_mmclip(saved, fill, tmp_path):
    folder = saved[0]
    command = [sys.executable, "-P", "-c", CLEAN_PROCESS, str(folder / "pretraining"), str(folder / "a.png"), TEXT]
    run = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    module, answers = json.loads(run.stdout.split("RESULT")[-1])
    assert module == "transformers_modules"
    expected = fill(folder / "a.png", TEXT)
    assert [answer["token"] for answer in answers] == [answer["token"] for answer in expected]
    assert [answer["score"] for answer in answers] == pytest.approx([e["score"] for e in expected], rel=1e-4)
