import dataclasses
from pathlib import Path

import numpy as np
import pytest

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation.controls import (
    class_control_results,
    control_results,
    group_scores,
    shuffled_control,
)
from MMCLIP.evaluation.metrics import UNKNOWN
from MMCLIP.evaluation.protocols import protocol, protocol_rows


SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "cxr-mini" / "metadata.csv"


def make_rows(*groups):
    """Rows of (view, source)."""
    return rows_to_dataset(
        make_row(str(number), b"", view=view, source=source) for number, (view, source) in enumerate(groups)
    )


def column(*values):
    return np.array(values)[:, None]


# ------------------------------------------------------------------------------------------------------------- shuffled


def test_shuffled_labels_bring_a_perfect_score_to_chance():
    targets = np.random.default_rng(0).integers(2, size=(400, 2))
    result = shuffled_control(targets, targets * 1.0, ["mass", "edema"], [""] * 400)
    low, high = result["macro_auroc_range"]
    assert 0.45 < low < 0.5 < high < 0.55 and low < result["macro_auroc"] < high
    assert result["macro_auroc"] == pytest.approx(np.mean(list(result["per_class"].values())))
    assert list(result["per_class"]) == ["mass", "edema"] and result["num_permutations"] == 20


def test_the_labels_of_a_patient_go_to_one_patient_where_counts_are_equal():
    patients = [name for name in "abcdef" for _ in range(2)]  # two films each, three patients ill
    ill = np.repeat([1, 0, 1, 0, 1, 0], 2)
    # scores rank the patients: an AUROC over films is then one over patients, so of the values k / 9
    scores = np.repeat([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2)
    for seed in range(10):
        result = shuffled_control(ill[:, None], scores[:, None], ["mass"], patients, num_permutations=1, seed=seed)
        assert 9 * result["macro_auroc"] == pytest.approx(round(9 * result["macro_auroc"]))


def test_films_of_a_patient_need_not_be_neighbours():
    patients = ["a", "b", "a", "b"]
    targets, scores = column(1, 0, 1, 0), column(4.0, 3.0, 2.0, 1.0)
    areas = {
        shuffled_control(targets, scores, ["mass"], patients, num_permutations=1, seed=seed)["macro_auroc"]
        for seed in range(20)
    }
    assert areas == {0.75, 0.25}  # a and b keep or swap their labels: 3 or 1 of 4 pairs are in order


def test_unknown_labels_move_with_the_others():
    targets, scores = column(1, UNKNOWN, 0), column(3.0, 2.0, 2.0)
    areas = {
        shuffled_control(targets, scores, ["mass"], [""] * 3, num_permutations=1, seed=seed)["macro_auroc"]
        for seed in range(30)
    }
    assert areas == {0.0, 0.5, 1.0}  # a half where the first image is the unknown one and the others tie


def test_another_seed_deals_otherwise_and_the_same_one_alike():
    rng = np.random.default_rng(1)
    arguments = rng.integers(2, size=(30, 1)), rng.normal(size=(30, 1)), ["mass"], [""] * 30
    assert shuffled_control(*arguments, seed=1) == shuffled_control(*arguments, seed=1)
    assert shuffled_control(*arguments, seed=1) != shuffled_control(*arguments, seed=2)


def test_what_cannot_be_shuffled_is_told():
    one = shuffled_control(column(1, 0), column(0.3, 0.2), ["mass"], ["a", "a"])
    assert one["macro_auroc"] is None and one["reason"] == "there is one patient only"
    none = shuffled_control(column(1, 1), column(0.3, 0.2), ["mass"], ["a", "b"])
    assert none["macro_auroc"] is None and none["reason"] == "no label has images with and without it"
    with pytest.raises(ValueError, match=r"must both be \(3, 1\).* but are \(2, 1\) and \(2, 1\)"):
        shuffled_control(column(1, 0), column(0.3, 0.2), ["mass"], ["a", "b", "c"])


# ---------------------------------------------------------------------------------------------------- scores of a group


def test_the_score_of_a_group_is_its_share_drawn_to_the_overall_share():
    targets = np.array([[1, 1], [1, UNKNOWN], [0, 0], [0, 1]])
    scores = group_scores(["AP", "AP", "PA", "PA"], targets, ["PA", "AP", "OTHER"])
    # first label: overall (2 + 0.5) / 5 = 0.5; AP (2 + 0.5) / 3, PA (0 + 0.5) / 3
    assert scores[:, 0] == pytest.approx([0.5 / 3, 2.5 / 3, 0.5])
    # second: overall (2 + 0.5) / 4 = 0.625; AP knows one image: 1.625 / 2; PA 1.625 / 3
    assert scores[:, 1] == pytest.approx([1.625 / 3, 1.625 / 2, 0.625])


def test_targets_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"`train_targets` must be \(2, F\).* but is \(1, 1\)"):
        group_scores(["AP", "PA"], column(1), ["AP"])


# ----------------------------------------------------------------------------------------------- view and source alone


def test_a_view_that_gives_the_label_away_is_found_and_a_source_that_does_not_is_not():
    train = make_rows(("AP", "x"), ("AP", "y"), ("PA", "x"), ("PA", "y"))
    test = make_rows(("PA", "x"), ("PA", "y"), ("AP", "x"), ("AP", "y"), ("PA", "x"))
    targets = column(0, 0, 1, 1, UNKNOWN)
    results = control_results(test, targets, ["mass"], [""] * 5, train, column(1, 1, 0, 0), num_bootstrap=50)
    assert results["view_only"]["macro_auroc"] == 1.0 and results["source_only"]["macro_auroc"] == 0.5
    assert results["view_and_source"]["macro_auroc"] == 1.0
    assert results["view_only"]["fitted_on"] == "train" and results["view_only"]["macro_auroc_ci"] == [1.0, 1.0]
    assert results["view_only"]["per_class"]["mass"]["num_negative"] == 2


def test_a_view_is_learned_from_the_training_rows_alone():
    train, test = make_rows(("AP", "x"), ("PA", "x")), make_rows(("AP", "x"), ("PA", "x"))
    results = control_results(test, column(1, 0), ["mass"], ["", ""], train, column(0, 1), num_bootstrap=0)
    assert results["view_only"]["macro_auroc"] == 0.0  # the other way round in training


def test_view_and_source_together_find_what_neither_tells_alone():
    groups = [("AP", "x"), ("PA", "y"), ("AP", "y"), ("PA", "x")]
    rows, targets = make_rows(*groups), column(1, 1, 0, 0)
    results = control_results(rows, targets, ["mass"], [""] * 4, rows, targets, num_bootstrap=0)
    areas = {name: values["macro_auroc"] for name, values in results.items()}
    assert areas == {"view_only": 0.5, "source_only": 0.5, "view_and_source": 1.0}


def test_one_view_for_all_tells_nothing_and_says_so():
    rows = make_rows(("PA", "x"), ("PA", "y"))
    results = control_results(rows, column(1, 0), ["mass"], ["", ""], rows, column(1, 0), num_bootstrap=0)
    assert results["view_only"]["macro_auroc"] is None and results["view_only"]["per_class"] == {}
    assert results["view_only"]["reason"] == "all images have the same view ('PA'), which tells nothing"
    assert results["source_only"]["macro_auroc"] == 1.0


def test_groups_that_training_lacks_are_counted():
    train, test = make_rows(("AP", "x"), ("PA", "x")), make_rows(("AP", "x"), ("AP", "z"), ("PA", "z"))
    results = control_results(test, column(1, 0, 0), ["mass"], [""] * 3, train, column(1, 0), num_bootstrap=0)
    assert (results["view_only"]["num_unseen"], results["source_only"]["num_unseen"]) == (0, 2)


def test_without_training_rows_no_patient_predicts_himself():
    # each patient has a view of his own: only his own images could give his label away
    patients = [f"p{number}" for number in range(60) for _ in range(2)]
    rows = make_rows(*((name, "x") for name in patients))
    targets = np.repeat(np.random.default_rng(0).integers(2, size=60), 2)[:, None]
    results = control_results(rows, targets, ["mass"], patients, num_bootstrap=0)
    assert results["view_only"]["macro_auroc"] == 0.5
    assert results["view_only"]["fitted_on"] == "test, 5 folds of patients"
    as_images = control_results(rows, targets, ["mass"], [""] * 120, num_bootstrap=0)
    assert as_images["view_only"]["macro_auroc"] > 0.7  # what taking images for patients would give


def test_without_training_rows_a_telling_view_is_found():
    ill = np.random.default_rng(0).integers(2, size=200)
    rows = make_rows(*(("AP" if value else "PA", "x") for value in ill))
    assert control_results(rows, ill[:, None], ["mass"], [""] * 200, num_bootstrap=0)["view_only"]["macro_auroc"] == 1


def test_rows_and_targets_that_do_not_belong_together_are_refused():
    rows = make_rows(("AP", "x"), ("PA", "x"))
    with pytest.raises(ValueError, match="go together"):
        control_results(rows, column(1, 0), ["mass"], ["", ""], rows)
    with pytest.raises(ValueError, match="2 train rows, but targets of 1"):
        control_results(rows, column(1, 0), ["mass"], ["", ""], rows, column(1))
    with pytest.raises(ValueError, match="must name 2 patients, a row each, but has 1"):
        control_results(rows, column(1, 0), ["mass"], [""])


# -------------------------------------------------------------------------------------------------------------- classes


def test_the_most_frequent_class_of_a_group_is_predicted():
    train = make_rows(*[("AP", "x")] * 3, *[("PA", "x")] * 4)
    train_classes = np.array([0, 0, 1, 1, 2, 2, 2])
    test = make_rows(("AP", "x"), ("AP", "x"), ("PA", "x"), ("OTHER", "x"))
    classes = np.array([0, 1, 2, 2])
    arguments = classes, ["edema", "mass", "nodule"], [""] * 4, train, train_classes
    results = class_control_results(test, *arguments, num_bootstrap=200)
    assert results["view_only"]["accuracy"] == 0.75  # AP is edema, PA nodule, and so are views never seen
    assert results["majority_class"]["class"] == "nodule" and results["majority_class"]["accuracy"] == 0.5
    low, high = results["view_only"]["accuracy_ci"]
    assert low < 0.75 < high <= 1
    assert results["source_only"]["accuracy"] is None and "same source ('x')" in results["source_only"]["reason"]


def test_a_tie_goes_to_the_class_that_is_more_frequent_overall():
    train = make_rows(("AP", "x"), ("AP", "x"), ("PA", "x"))
    test = make_rows(("AP", "x"), ("PA", "x"))
    arguments = np.array([1, 1]), ["edema", "mass"], ["", ""], train, np.array([0, 1, 1])
    assert class_control_results(test, *arguments, num_bootstrap=0)["view_only"]["accuracy"] == 1.0


def test_classes_without_training_rows_are_learned_from_the_test_rows_and_never_below_the_commonest_class():
    classes = np.random.default_rng(0).integers(3, size=90)
    rows = make_rows(*((str(number), "x") for number in classes))
    results = class_control_results(rows, classes, ["edema", "mass", "nodule"], [""] * 90, num_bootstrap=0)
    assert results["view_only"]["accuracy"] == 1.0 and results["view_only"]["accuracy_ci"] is None
    assert results["majority_class"]["accuracy"] == np.bincount(classes).max() / 90
    assert results["majority_class"]["fitted_on"] == results["view_only"]["fitted_on"] == "test"
    even = np.repeat(np.arange(3), 30)  # a view that tells nothing, and classes as frequent as each other
    rows = make_rows(*(("AP" if number % 2 else "PA", "x") for number in range(90)))
    results = class_control_results(rows, even, ["edema", "mass", "nodule"], [""] * 90, num_bootstrap=0)
    assert results["view_only"]["accuracy"] == pytest.approx(1 / 3)


def test_one_patient_has_no_interval_of_an_accuracy():
    rows = make_rows(("AP", "x"), ("PA", "x"))
    results = class_control_results(rows, np.array([0, 1]), ["edema", "mass"], ["a", "a"], num_bootstrap=20)
    assert results["view_only"]["accuracy"] == 1.0 and results["view_only"]["accuracy_ci"] is None
    assert results["majority_class"]["accuracy"] == 0.5 and results["majority_class"]["accuracy_ci"] is None


# --------------------------------------------------------------------------------------------------------- real samples


@pytest.mark.skipif(not SAMPLES.is_file(), reason="the real samples are not beside this checkout")
def test_controls_of_the_real_samples_are_those_of_the_results():
    from MMCLIP.evaluation.zero_shot import label_matrix, patient_names, scored_rows

    names = ["covid-19", "pneumonia", "no finding"]
    complete = dataclasses.replace(protocol("own"), fully_labelled=("nih-chestxray8",))
    parts = {role: scored_rows(protocol_rows(complete, SAMPLES, role), names)[0] for role in ("test", "train")}

    def macro(unlisted_is_absent):
        test, train = (
            label_matrix(rows, names, unlisted_is_absent, complete.fully_labelled)[0] for rows in parts.values()
        )
        patients = patient_names(parts["test"])
        results = control_results(parts["test"], test, names, patients, parts["train"], train, num_bootstrap=0)
        return [results[control]["macro_auroc"] for control in ("view_only", "source_only")]

    assert macro(True) == pytest.approx([0.591, 0.834], abs=2e-3)
    assert macro(None) == pytest.approx([0.635, 0.735], abs=2e-3)  # NIH does not say who has no covid-19
