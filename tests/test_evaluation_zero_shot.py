import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_processor
from MMCLIP.modeling_mmclip import MMCLIPModel, evaluating
from PIL import Image
from torch import nn
from transformers import BatchFeature

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.data.readers.tables import completed_absent
from MMCLIP.evaluation.metrics import UNKNOWN
from MMCLIP.evaluation.zero_shot import (
    check_scorable,
    evaluate_zero_shot,
    evaluate_zero_shot_classes,
    label_matrix,
    prompt_margins,
    zero_shot_scores,
)
from MMCLIP.text.prompt_sets import PromptSet, prompt_set, prompt_set_names
from MMCLIP.text.prompts import negative_prompts, positive_prompts


def gray_png(level: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), level).save(file, format="PNG")
    return file.getvalue()


def make_rows(*rows: dict):
    """Manifest rows with what a test does not say left neutral."""
    neutral = {"source": "a", "split": "test"}
    return rows_to_dataset(
        make_row(**{"row_id": str(number), "image": gray_png(number), **neutral, **row})
        for number, row in enumerate(rows)
    )


class AngleProcessor:
    """Texts become 1 (positive) or 0 (negative); an image becomes its grey level over 255."""

    def image_processor(self, images, return_tensors):
        levels = [np.asarray(Image.open(io.BytesIO(image["bytes"])), dtype=np.float32).mean() / 255 for image in images]
        return {"pixel_values": torch.tensor(levels)[:, None, None, None]}

    def __call__(self, text, return_tensors):
        signs = [[0 if " no " in f" {entry.lower()}" or " not " in entry else 1] for entry in text]
        return BatchFeature({"input_ids": torch.tensor(signs), "attention_mask": torch.ones(len(signs), 1)})


class AngleModel(nn.Module):
    """Positive texts lie at (1, 0), negative ones at (0, 1); an image of grey level g at (g, sqrt(1 - g²))."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(projection_dim=2)

    def __init__(self, scale: float = 10.0):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.frozen, self.dropout = nn.Dropout(), nn.Dropout()
        self.num_texts = 0

    def similarity_scale(self):
        return self.logit_scale.exp()

    def encode_image(self, pixel_values):
        assert not self.dropout.training and not torch.is_grad_enabled()
        return pixel_values.flatten(1)[:, :1], None, None

    def project_image(self, pooled):
        return torch.cat([pooled, (1 - pooled**2).sqrt()], dim=-1)

    def get_text_features(self, input_ids, attention_mask):
        self.num_texts += len(input_ids)
        return SimpleNamespace(pooler_output=torch.stack([input_ids[:, 0], 1 - input_ids[:, 0]], dim=-1).float())


@pytest.fixture(scope="module")
def real():
    """The real model and processor, tiny and untrained."""
    processor = tiny_processor()
    torch.manual_seed(0)
    return MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer))).eval(), processor


def test_score_is_the_softmax_over_the_prompt_pair_at_the_models_temperature():
    image = {"path": None, "bytes": gray_png(153)}  # 153 / 255 = 0.6, so the image lies at (0.6, 0.8)
    scores = zero_shot_scores(AngleModel(scale=10), AngleProcessor(), [image], ["edema"])
    assert scores.dtype == np.float64
    assert scores[0, 0] == pytest.approx(math.exp(6) / (math.exp(6) + math.exp(8)), rel=1e-5)


def test_images_that_all_round_to_one_are_still_ranked():
    rows = make_rows(
        {"image": gray_png(254), "present": ["edema"]},
        {"image": gray_png(252), "absent": ["edema"]},
    )
    results, predictions = evaluate_zero_shot(AngleModel(scale=100), AngleProcessor(), rows, num_bootstrap=0)
    assert predictions.scores[:, 0].tolist() == [1.0, 1.0]
    assert results["zero_shot"]["per_class"]["edema"]["auroc"] == 1.0


def unit_rows(number, size=16):
    embeds = torch.randn(number, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.functional.normalize(embeds, dim=-1)


def text_embeds(real, texts):
    model, processor = real
    with torch.no_grad():
        return model.get_text_features(**processor(text=list(texts))).pooler_output.double()


def test_mean_embedding_is_the_similarity_to_the_mean_of_a_side_at_unit_length(real):
    images = unit_rows(3)
    margins = prompt_margins(*real, images, ["edema", "mass"])
    positive, negative = (
        text_embeds(real, prompts("mass")).mean(0) for prompts in (positive_prompts, negative_prompts)
    )
    expected = real[0].similarity_scale() * images @ (positive / positive.norm() - negative / negative.norm())
    assert margins.shape == (3, 2) and margins.dtype == torch.float64
    torch.testing.assert_close(margins[:, 1], expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean_score", "max_score"])
def test_scores_are_pooled_over_the_texts_of_a_side(real, pooling):
    images, scale = unit_rows(5), real[0].similarity_scale().detach()
    texts = {
        "edema": (("Edema.", "Fluid overload.", "Septal lines."), ("No edema.", "Dry lungs.", "Clear.")),
        "mass": (("Mass.",), ()),
    }
    margins = prompt_margins(*real, images, ["mass", "edema"], PromptSet("mine", "", pooling, texts))
    positive, negative = (images @ text_embeds(real, side).T for side in texts["edema"])  # (5, 3)
    pool = (lambda scores: scores.mean(1)) if pooling == "mean_score" else (lambda scores: scores.max(1).values)
    torch.testing.assert_close(margins[:, 1], scale * (pool(positive) - pool(negative)), atol=1e-5, rtol=0)
    alone = images @ text_embeds(real, ["Mass."])[0]
    torch.testing.assert_close(margins[:, 0], scale * alone, atol=1e-5, rtol=0)


def test_every_named_set_scores_its_labels_and_no_two_alike(real):
    images = unit_rows(4)
    scored = {}
    for name in prompt_set_names():
        label = "pneumonia" if "pneumonia" in prompt_set(name).prompts else "edema"
        scored[name] = prompt_margins(*real, images, [label], name)
    assert all(torch.isfinite(margins).all() for margins in scored.values())
    assert len({tuple(margins.flatten().tolist()) for margins in scored.values()}) == len(scored) - 1
    # these two differ by a capital, which the tokenizer does not see
    torch.testing.assert_close(scored["chexzero"], scored["cxr-clip"])


def test_the_prompts_that_were_used_are_in_the_results_and_a_missing_label_is_an_error_before_any_image_is_read(real):
    rows = make_rows({"present": ["edema"]}, {"present": ["pneumonia"]})
    results, _ = evaluate_zero_shot(*real, rows, prompts="sentence", num_bootstrap=0)
    assert results["zero_shot"]["prompts"]["name"] == "sentence"
    assert results["zero_shot"]["prompts"]["pooling"] == "mean_embedding"
    unreadable = make_rows({"present": ["edema"], "image": b"no picture"}, {"present": ["pneumonia"]})
    with pytest.raises(ValueError, match="'biovil-rsna' has no text for edema.*pneumonia"):
        evaluate_zero_shot(*real, unreadable, prompts="biovil-rsna")
    only = evaluate_zero_shot(*real, rows, ["Pneumonia"], prompts="biovil-rsna", num_bootstrap=0)[1]
    assert only.margins.shape == (2, 1)


def test_a_file_with_prompts_for_a_label_that_the_rows_lack_is_an_error_unless_the_labels_are_chosen(real, tmp_path):
    rows = make_rows({"present": ["edema"]}, {"present": ["mass"]})
    path = tmp_path / "mine.yaml"
    path.write_text("labels: {edema: {positive: [Edema.]}, mass: {positive: [Mass.]}, Hernia: {positive: [Hernia.]}}")
    with pytest.raises(
        ValueError, match="mine.yaml: there are texts for hiatal hernia, .*rows state edema, mass.*--labels"
    ):
        evaluate_zero_shot(*real, rows, prompts=str(path), num_bootstrap=0)
    chosen = evaluate_zero_shot(*real, rows, ["edema", "mass"], prompts=str(path), num_bootstrap=0)[1]
    assert chosen.labels == ["edema", "mass"]


def test_each_prompt_is_embedded_once_however_many_images_there_are():
    model = AngleModel()
    zero_shot_scores(model, AngleProcessor(), [{"path": None, "bytes": gray_png(9)}] * 7, ["edema"], batch_size=2)
    assert model.num_texts == len(positive_prompts("edema")) + len(negative_prompts("edema"))


def test_scores_do_not_depend_on_batches_and_shuffle_with_the_images(real):
    model, processor = real
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 40), dtype=np.uint8) for _ in range(5)]
    labels = ["edema", "no finding", "mass"]
    scores = zero_shot_scores(model, processor, images, labels)
    assert scores.shape == (5, 3) and len(np.unique(scores)) == 15
    np.testing.assert_allclose(zero_shot_scores(model, processor, images, labels, batch_size=2), scores, atol=1e-6)
    np.testing.assert_allclose(zero_shot_scores(model, processor, images[::-1], labels), scores[::-1], atol=1e-6)
    with_workers = zero_shot_scores(model, processor, images, labels, num_workers=1)
    np.testing.assert_allclose(with_workers, scores, atol=1e-6)


def test_scores_are_the_ones_of_the_models_own_forward(real):
    model, processor = real
    image = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    texts = [positive_prompts("edema")[0], negative_prompts("edema")[0]]
    with torch.no_grad():
        logits = model(**processor(images=[image], text=texts)).logits_per_image
    scores = zero_shot_scores(model, processor, [image], ["edema"], prompts="sentence")
    assert scores[0, 0] == pytest.approx(logits.softmax(dim=-1)[0, 0].item(), abs=1e-5)


def test_every_module_keeps_its_mode_also_after_an_error():
    model = AngleModel().train()
    model.frozen.eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and model.dropout.training and not model.frozen.training
    zero_shot_scores(model, AngleProcessor(), [{"path": None, "bytes": gray_png(9)}], ["edema"])
    assert model.training and model.dropout.training and not model.frozen.training


def test_targets_are_what_a_row_lists_and_unknown_where_it_is_silent():
    rows = make_rows({"present": ["edema"], "absent": ["mass"], "uncertain": ["nodule"]})
    targets, num_by_rule = label_matrix(rows, ["edema", "mass", "nodule", "fracture"])
    assert targets.tolist() == [[1, 0, UNKNOWN, UNKNOWN]] and num_by_rule == 0
    targets, num_by_rule = label_matrix(rows, ["edema", "mass", "nodule", "fracture"], unlisted_is_absent=True)
    assert targets.tolist() == [[1, 0, UNKNOWN, 0]] and num_by_rule == 1


def test_unlisted_counts_as_absent_by_default_only_where_no_absent_label_is_listed():
    rows = make_rows({"present": ["edema"]}, {"present": ["edema"], "absent": ["nodule"]}, {"report": "A report."})
    targets, num_by_rule = label_matrix(rows, ["edema", "mass"])
    assert targets.tolist() == [[1, 0], [1, UNKNOWN], [UNKNOWN, UNKNOWN]] and num_by_rule == 1
    assert label_matrix(rows, ["edema", "mass"], unlisted_is_absent=False)[0].tolist()[0] == [1, UNKNOWN]


def test_a_fully_labelled_source_makes_absent_only_what_it_uses():
    rows = make_rows(
        {"source": "nih", "present": ["no finding"]},
        {"source": "nih", "present": ["mass"]},
        {"source": "other", "present": ["covid-19"]},
    )
    targets, _ = label_matrix(rows, ["covid-19", "mass", "no finding"], fully_labelled=["nih"])
    assert targets.tolist() == [[UNKNOWN, 0, 1], [UNKNOWN, 1, 0], [1, 0, 0]]


def test_a_fully_labelled_row_is_completed_only_where_it_lists_a_label_as_the_reader_does():
    rows = make_rows(
        {"source": "nih", "present": ["mass"]},
        {"source": "nih", "uncertain": ["edema"]},
        {"source": "nih", "absent": ["edema"]},
    )
    targets, num_completed = label_matrix(rows, ["edema", "mass"], fully_labelled=["nih"])
    assert targets.tolist() == [[UNKNOWN, 1], [UNKNOWN, UNKNOWN], [0, 0]] and num_completed == 2
    assert [completed_absent(row, {"nih": {"mass"}}) for row in rows] == [[], [], ["edema", "mass"]]


def test_a_narrower_label_makes_the_broader_one_present_unless_the_row_denies_it():
    rows = make_rows({"present": ["covid-19"]}, {"present": ["covid-19"], "absent": ["pneumonia"]})
    assert label_matrix(rows, ["pneumonia"])[0].tolist() == [[1], [0]]


def test_a_label_both_present_and_absent_is_an_error_that_names_the_row():
    with pytest.raises(ValueError, match="'film7'.*edema"):
        label_matrix(make_rows({"row_id": "film7", "present": ["edema"], "absent": ["edema"]}), ["edema"])


def test_rows_without_image_or_label_are_left_out_and_counted():
    rows = make_rows(
        {"present": ["edema"], "patient_id": "1"},
        {"absent": ["edema"], "patient_id": "1"},
        {"report": "Heart size is normal."},
        {"report": "Edema.", "present": ["edema"], "image": None},
    )
    results, predictions = evaluate_zero_shot(AngleModel(), AngleProcessor(), rows, num_bootstrap=0)
    zero_shot = results["zero_shot"]
    assert (zero_shot["num_images"], zero_shot["num_without_label"], zero_shot["num_without_image"]) == (2, 1, 1)
    assert zero_shot["num_patients"] == 1
    assert predictions.row_ids == ["0", "1"] and predictions.labels == ["edema"]
    assert zero_shot["macro_auroc"] == 0.0  # the absent image is the brighter one


def test_sources_are_also_scored_apart_and_their_patients_kept_apart():
    rows = make_rows(
        {"source": "a", "present": ["edema"], "patient_id": "1", "image": gray_png(200)},
        {"source": "a", "present": ["mass"], "patient_id": "2", "image": gray_png(210)},
        {"source": "b", "present": ["mass"], "patient_id": "1", "image": gray_png(10)},
    )
    zero_shot = evaluate_zero_shot(AngleModel(), AngleProcessor(), rows, ["Edema"], num_bootstrap=0)[0]["zero_shot"]
    assert zero_shot["per_class"]["edema"]["auroc"] == 0.5
    assert zero_shot["by_source"]["a"]["per_class"]["edema"]["auroc"] == 0.0
    assert zero_shot["by_source"]["b"]["macro_auroc"] is None and zero_shot["by_source"]["b"]["num_skipped"] == 1
    assert zero_shot["num_patients"] == 3


def test_the_accuracy_of_classes_is_told_within_each_source(real):
    rows = make_rows({"source": "a"}, {"source": "a"}, {"source": "b"})
    predictions = evaluate_zero_shot_classes(*real, rows, np.array([0, 0, 0]), ["edema", "mass"], num_bootstrap=0)[1]
    predicted = predictions.logits.argmax(axis=1)
    classes = np.array([predicted[0], 1 - predicted[1], predicted[2]])
    results, _ = evaluate_zero_shot_classes(*real, rows, classes, ["edema", "mass"], num_bootstrap=0)
    assert results["zero_shot"]["by_source"] == {
        "a": {"accuracy": 0.5, "num_images": 2},
        "b": {"accuracy": 1.0, "num_images": 1},
    }


def test_labels_may_be_spelt_as_the_data_sets_spell_them():
    rows = make_rows({"present": ["pleural effusion"]}, {"present": ["mass"]})
    labels = evaluate_zero_shot(AngleModel(), AngleProcessor(), rows, ["Effusion"], num_bootstrap=0)[1].labels
    assert labels == ["pleural effusion"]
    with pytest.raises(ValueError, match="unknown label 'Efusion'"):
        evaluate_zero_shot(AngleModel(), AngleProcessor(), rows, ["Efusion"])


def test_nothing_to_evaluate_is_an_error_with_counts():
    with pytest.raises(ValueError, match="None of 1 rows .*1 have an image, 0 a label"):
        evaluate_zero_shot(AngleModel(), AngleProcessor(), make_rows({"report": "A report."}))


def test_an_unreadable_image_is_an_error_that_names_the_row(real):
    rows = make_rows({"row_id": "film7", "present": ["edema"], "image": b"no picture"})
    with pytest.raises(ValueError, match="Row 'film7'"):
        evaluate_zero_shot(*real, rows)


def test_rows_on_which_every_label_would_be_skipped_are_found_before_a_run():
    rows = make_rows({"present": ["edema"], "absent": ["mass"]}, {"present": ["edema"], "absent": ["nodule"]})
    with pytest.raises(ValueError, match="No label can be scored on the 2 rows.*edema"):
        check_scorable(rows)
    both = make_rows({"present": ["edema"], "absent": ["mass"]}, {"absent": ["edema"]})
    check_scorable(both)
    with pytest.raises(ValueError, match="mass"):
        check_scorable(both, labels=["mass"])
