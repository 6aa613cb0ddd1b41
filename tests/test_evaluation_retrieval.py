import json
import math
import sys

import numpy as np
import pytest
import torch

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation import retrieval
from MMCLIP.evaluation.retrieval import (
    DIRECTIONS,
    WAYS,
    compare_retrieval,
    evaluate_retrieval,
    nearest,
    report_names,
    retrieval_rows,
)


COUNTED, OWN = WAYS
NUMBERS = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank")


def on_circle(*degrees: float) -> np.ndarray:
    """Unit vectors (n, 2) at these angles; the nearer the angles, the more similar."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def unit(embeds: np.ndarray) -> np.ndarray:
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def study(num: int, num_texts: int, noise: float = 0.8, size: int = 8, seed: int = 0):
    """Images near their texts, some of which share their words: (images, texts, words), float32."""
    rng = np.random.default_rng(seed)
    wording = rng.integers(0, num_texts, num)
    texts = unit(rng.normal(size=(num_texts, size)))[wording]
    images = unit(texts + noise * rng.normal(size=(num, size)))
    return images.astype(np.float32), texts.astype(np.float32), [f"report {number}" for number in wording]


@pytest.fixture(params=["exact", "faiss"])
def backend(request, monkeypatch):
    if request.param == "faiss":
        pytest.importorskip("faiss")
        monkeypatch.setattr(retrieval, "NUM_LISTED", 6)  # so that some queries are settled by the list, some are not
    return request.param


# ------------------------------------------------------------------------------------------------------------ by hand


def test_recall_and_median_rank_can_be_counted_by_hand(backend):
    # nearest text of each image: 0 -> 0, 10 -> 12 (own), 50 -> 40 then 12 then own at 90, 33 -> 40 (own)
    images, texts = on_circle(0, 10, 50, 33), on_circle(1, 12, 90, 40)
    result, ranks = evaluate_retrieval(images, texts, list("abcd"), num_bootstrap=0, backend=backend)
    assert ranks.image_to_text[OWN].rank.tolist() == [1, 1, 3, 1]
    found = result["image_to_text"][OWN]
    assert [found[name] for name in NUMBERS] == [0.75, 1.0, 1.0, 1.0]
    assert [found[f"{name}_chance"] for name in NUMBERS] == pytest.approx([0.25, 1.0, 1.0, 2.5])
    # nearest image of each text: 1 -> 0, 12 -> 10, 90 -> 50 (own), 40 -> 33 (own)
    assert ranks.text_to_image[OWN].rank.tolist() == [1, 1, 1, 1]
    assert result["text_to_image"][OWN]["recall_at_1"] == 1.0


def test_an_identical_text_counts_under_one_rule_and_ties_under_the_other(backend):
    # images 0 and 1 have the same report; that of image 2 is nearer to image 1
    images, texts = on_circle(0, 30, 60), on_circle(10, 10, 35)
    words = ["No change.", "No  change.\n", "Edema."]
    result, ranks = evaluate_retrieval(images, texts, words, num_bootstrap=0, backend=backend)
    assert ranks.image_to_text[COUNTED].rank.tolist() == [1, 2, 1]
    assert ranks.image_to_text[OWN].rank.tolist() == [1.5, 2.5, 1]
    np.testing.assert_allclose(ranks.image_to_text[OWN].recall[:, 0], [0.5, 0, 1])
    # both texts "No change." find image 0 first, which is the very own one of the first alone
    assert ranks.text_to_image[COUNTED].rank.tolist() == [1, 1, 2]
    assert ranks.text_to_image[OWN].rank.tolist() == [1, 2, 2]
    assert (result["num_identical"], result["num_distinct_texts"], result["num_texts"]) == (2, 2, 3)
    # by chance one of two hits among three stands first in 2 of 3 orders, the only one in 1 of 3
    assert result["image_to_text"][COUNTED]["recall_at_1_chance"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert result["image_to_text"][OWN]["recall_at_1_chance"] == pytest.approx(1 / 3)


def test_images_of_one_report_share_it_and_the_report_finds_any_of_them(backend):
    images, texts = on_circle(0, 50, 85), on_circle(10, 10, 90)
    words, names = ["Edema.", "Edema.", "Clear."], ["study", "study", "other"]
    options = {"num_bootstrap": 0, "backend": backend}
    result, ranks = evaluate_retrieval(images, texts, words, report_ids=names, **options)
    assert (result["num_images"], result["num_texts"], result["num_identical"]) == (3, 2, 0)
    # the second image is as near to 90 as to 10: two candidates, a tie
    assert ranks.image_to_text[OWN].rank.tolist() == [1, 1.5, 1]
    assert ranks.text_to_image[OWN].rank.tolist() == [1, 1]
    assert ranks.report_of_row.tolist() == [0, 0, 1]
    assert [line["text_to_image_own_text_only"] for line in ranks.table()] == [1, 1, 1]
    # two of three images are hits of the shared report, one of the other
    assert result["text_to_image"][OWN]["recall_at_1_chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    apart = evaluate_retrieval(images, texts, words, **options)[1]
    assert apart.text_to_image[OWN].rank.tolist() == [1, 2, 1]


def test_the_table_names_rows_and_holds_no_text():
    images, texts = on_circle(0, 10), on_circle(1, 12)
    ranks = evaluate_retrieval(images, texts, ["Edema.", "Clear."], num_bootstrap=0, row_ids=["x", "y"])[1]
    assert ranks.table()[1] == {"row_id": "y"} | {f"{direction}_{way}": 1.0 for direction in DIRECTIONS for way in WAYS}


# --------------------------------------------------------------------------------------------------------- properties


def test_a_model_that_finds_every_pair_scores_one_and_leads_chance(backend):
    embeds = np.eye(20)
    result = evaluate_retrieval(embeds, embeds, [str(n) for n in range(20)], num_bootstrap=0, backend=backend)[0]
    for direction in DIRECTIONS:
        for way in WAYS:
            assert [result[direction][way][name] for name in NUMBERS] == [1, 1, 1, 1]
            chance = [result[direction][way][f"{name}_chance"] for name in NUMBERS]
            assert chance == pytest.approx([1 / 20, 5 / 20, 10 / 20, 10.5])


def test_a_perfect_model_finds_each_wording_but_cannot_tell_identical_texts_apart(backend):
    embeds = np.eye(4)[[0, 0, 1, 2, 3]]
    result = evaluate_retrieval(embeds, embeds, list("aabcd"), num_bootstrap=0, backend=backend)[0]
    for direction in DIRECTIONS:
        assert result[direction][COUNTED]["recall_at_1"] == 1
        assert result[direction][OWN]["recall_at_1"] == pytest.approx((0.5 + 0.5 + 3) / 5)


@pytest.mark.parametrize("noise", [0.0, 1e-4])  # 1e-4 changes similarities by 1e-8
def test_a_collapsed_model_scores_chance(backend, noise):
    words = [f"report {number % 7}" for number in range(30)]
    rng = np.random.default_rng(0)
    images, texts = (unit(np.ones((30, 16)) + noise * rng.normal(size=(30, 16))) for _ in range(2))
    result = evaluate_retrieval(images, texts, words, num_bootstrap=0, backend=backend)[0]
    for direction in DIRECTIONS:
        for way in WAYS:
            for name in NUMBERS:
                found = result[direction][way]
                assert found[name] == pytest.approx(found[f"{name}_chance"], abs=1e-12)
        assert result[direction][OWN]["recall_at_5"] == pytest.approx(5 / 30)
        assert result[direction][OWN]["median_rank"] == 15.5
    # 30 reports of 7 wordings, two of which have 5 reports, five 4: first of 10 that is a hit
    missed = [math.comb(30 - hits, 10) / math.comb(30, 10) for hits in (5, 4)]
    expected = 1 - (10 * missed[0] + 20 * missed[1]) / 30
    assert result["image_to_text"][COUNTED]["recall_at_10"] == pytest.approx(expected)


def by_brute_force(images, texts, words):
    """Own ranks by sorting the whole matrix, in both rules; for distinct similarities."""
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    above = (similarity > np.diag(similarity)[:, None] + 1e-6).sum(axis=1)
    same = np.array(words)[:, None] == np.array(words)
    return above + 1, above + (1 + same.sum(axis=1)) / 2


@pytest.mark.parametrize("block", [1, 7, 1000, 4_000_000])
def test_ranks_are_those_of_sorting_the_whole_matrix_whatever_the_block(backend, monkeypatch, block):
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    images, texts, words = study(90, 60)
    ranks = evaluate_retrieval(images, texts, words, num_bootstrap=0, backend=backend)[1]
    counted, own = by_brute_force(images, texts, words)
    np.testing.assert_array_equal(ranks.image_to_text[COUNTED].rank, counted)
    np.testing.assert_array_equal(ranks.image_to_text[OWN].rank, own)
    similarity = texts.astype(np.float64) @ images.astype(np.float64).T
    best = np.where(np.array(words)[:, None] == np.array(words), similarity, -2).max(axis=1)
    np.testing.assert_array_equal(ranks.text_to_image[COUNTED].rank, 1 + (similarity > best[:, None] + 1e-6).sum(1))
    own = np.diag(similarity)
    np.testing.assert_array_equal(ranks.text_to_image[OWN].rank, 1 + (similarity > own[:, None] + 1e-6).sum(1))


@pytest.mark.parametrize("listed", [1, 6, 128, 1000])
@pytest.mark.parametrize("noise", [0.2, 1.0, 5.0])
def test_faiss_and_matrix_products_give_the_same_answers(monkeypatch, listed, noise):
    pytest.importorskip("faiss")
    monkeypatch.setattr(retrieval, "NUM_LISTED", listed)
    images, texts, words = study(400, 250, noise, size=16, seed=1)
    names = [f"{word} {number // 2}" for number, word in enumerate(words)]
    options = {"num_bootstrap": 20, "report_ids": names}
    exact = evaluate_retrieval(images, texts, words, backend="exact", **options)
    faiss = evaluate_retrieval(images, texts, words, backend="faiss", **options)
    assert exact[0] == faiss[0] and exact[1].table() == faiss[1].table()


def test_what_faiss_settles_is_not_counted_again(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(retrieval, "NUM_LISTED", 6)
    widths, compare = set(), retrieval._compare
    monkeypatch.setattr(retrieval, "_compare", lambda table, *rest: widths.add(table.shape[1]) or compare(table, *rest))
    evaluate_retrieval(np.eye(20), np.eye(20), [str(n) for n in range(20)], num_bootstrap=0, backend="faiss")
    assert widths == {6}
    evaluate_retrieval(np.eye(20), -np.eye(20), [str(n) for n in range(20)], num_bootstrap=0, backend="faiss")
    assert widths == {6, 20}


def test_the_order_of_the_rows_changes_nothing(backend):
    images, texts, words = study(80, 50)
    patients = [f"p{number // 2}" for number in range(80)]
    order = np.random.default_rng(5).permutation(80)
    first, ranks = evaluate_retrieval(images, texts, words, patients, 0, backend=backend)
    shuffled = (images[order], texts[order], [words[n] for n in order], [patients[n] for n in order])
    second, moved = evaluate_retrieval(*shuffled, 0, backend=backend)
    for direction in DIRECTIONS:
        for way in WAYS:
            found = [[result[direction][way][name] for name in NUMBERS] for result in (first, second)]
            assert found[0] == pytest.approx(found[1], abs=1e-12)
            expected = getattr(ranks, direction)[way].rank[order]
            np.testing.assert_array_equal(getattr(moved, direction)[way].rank, expected)


def test_tensors_and_arrays_give_the_same_and_results_fit_into_json():
    images, texts, words = study(40, 30)
    from_arrays = evaluate_retrieval(images, texts, words, num_bootstrap=20)[0]
    tensors = torch.from_numpy(images).requires_grad_(), torch.from_numpy(texts)
    assert evaluate_retrieval(*tensors, words, num_bootstrap=20)[0] == from_arrays
    assert json.loads(json.dumps(from_arrays, allow_nan=False)) == from_arrays


# ---------------------------------------------------------------------------------------------------------- intervals


def test_intervals_hold_the_value_and_are_those_of_repeating_patients():
    images, texts, words = study(60, 60, noise=1.0)
    patients = [f"p{number // 3}" for number in range(60)]
    result, ranks = evaluate_retrieval(images, texts, words, patients, num_bootstrap=300, seed=4)
    draws = {name: [] for name in NUMBERS}
    (weights,) = retrieval.resample_patients(patients, 60, 300, 4)
    inner = ranks.image_to_text[OWN]
    for counts in weights:
        drawn = np.repeat(np.arange(60), counts)
        for name, value in zip(NUMBERS, [*inner.recall[drawn].mean(0), np.median(inner.rank[drawn])], strict=True):
            draws[name].append(value)
    found = result["image_to_text"][OWN]
    for name in NUMBERS:
        assert found[f"{name}_ci"] == pytest.approx(np.percentile(draws[name], [2.5, 97.5]).tolist())
        assert found[f"{name}_ci"][0] <= found[name] <= found[f"{name}_ci"][1]


def test_images_of_one_patient_are_drawn_together():
    images, texts, words = study(120, 120, noise=1.0)

    def width(patients):
        low, high = evaluate_retrieval(images, texts, words, patients)[0]["image_to_text"][OWN]["recall_at_10_ci"]
        return high - low

    assert width([f"p{number // 40}" for number in range(120)]) != width(None)
    # rows without a patient are a patient each
    assert width([""] * 120) == width(None)
    assert evaluate_retrieval(images, texts, words, ["", *["p"] * 60, *[""] * 59])[0]["num_patients"] == 61


def test_one_patient_gives_no_interval_and_says_why():
    images, texts, words = study(10, 10)
    result = evaluate_retrieval(images, texts, words, ["p"] * 10, num_bootstrap=50)[0]
    assert result["num_patients"] == 1 and result["no_interval_because"] == "all rows are of one patient"
    assert result["image_to_text"][OWN]["recall_at_1_ci"] is None
    several = evaluate_retrieval(images, texts, words, num_bootstrap=50)[0]
    assert several["no_interval_because"] is None and several["image_to_text"][OWN]["recall_at_1_ci"] is not None


# --------------------------------------------------------------------------------------------------------- comparison


def test_two_models_are_compared_on_the_same_draws_of_patients():
    images, texts, words = study(80, 80, noise=1.0)
    worse = unit(images + 0.6 * np.random.default_rng(3).normal(size=images.shape))
    patients = [f"p{number // 2}" for number in range(80)]
    first, ranks = evaluate_retrieval(images, texts, words, patients)
    second, other = evaluate_retrieval(worse, texts, words, patients)
    compared = compare_retrieval(ranks, other)
    assert len(compared) == 2 * 2 * 4
    found = compared[f"image_to_text_{OWN}_recall_at_10"]
    values = [result["image_to_text"][OWN]["recall_at_10"] for result in (first, second)]
    assert [found["first"], found["second"], found["difference"]] == pytest.approx([*values, values[0] - values[1]])
    low, high = found["difference_ci"]
    assert 0 < low < found["difference"] < high and 0 < found["p_value"] < 0.05
    widths = [np.diff(result["image_to_text"][OWN]["recall_at_10_ci"])[0] for result in (first, second)]
    assert high - low < math.hypot(*widths)  # what two draws of their own would give
    back = compare_retrieval(other, ranks)[f"image_to_text_{OWN}_recall_at_10"]
    assert back["difference"] == -found["difference"] and back["p_value"] == found["p_value"]
    itself = compare_retrieval(ranks, ranks)[f"text_to_image_{COUNTED}_median_rank"]
    assert (itself["difference"], itself["difference_ci"], itself["p_value"]) == (0, [0, 0], 1)


def test_only_the_same_rows_can_be_compared_and_one_patient_gives_no_p_value():
    images, texts, words = study(10, 10)
    ranks = evaluate_retrieval(images, texts, words, ["p"] * 10, 0)[1]
    assert compare_retrieval(ranks, ranks)[f"image_to_text_{OWN}_recall_at_1"]["p_value"] is None
    with pytest.raises(ValueError, match="10 and 9 rows differ"):
        compare_retrieval(ranks, evaluate_retrieval(images[1:], texts[1:], words[1:], ["p"] * 9, 0)[1])
    with pytest.raises(ValueError, match="same rows, reports and patients"):
        compare_retrieval(ranks, evaluate_retrieval(images, texts, words, ["p"] * 5 + ["q"] * 5, 0)[1])


# ------------------------------------------------------------------------------------------------------------ nearest


def test_the_nearest_come_first_with_their_cosine(backend):
    indices, similarity = nearest(on_circle(0, 90), on_circle(80, 30, 10), 2, backend)
    assert indices.tolist() == [[2, 1], [0, 1]]
    np.testing.assert_allclose(similarity, np.cos(np.radians([[10, 30], [10, 60]])))


def test_equal_embeddings_come_in_their_order_and_k_beyond_the_candidates_is_all_of_them(backend):
    candidates = on_circle(40, 10, 40, 10, 10)
    indices, similarity = nearest(on_circle(0), candidates, 4, backend)
    assert indices.tolist() == [[1, 3, 4, 0]]
    assert nearest(on_circle(0), candidates, 9, backend)[0].tolist() == [[1, 3, 4, 0, 2]]
    np.testing.assert_allclose(similarity[0], np.cos(np.radians([10, 10, 10, 40])))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_is_sorting_the_whole_matrix_with_both_backends(backend, monkeypatch, k):
    monkeypatch.setattr(retrieval, "_BLOCK", 5000)
    queries, candidates, _ = study(150, 80, size=16)
    indices, similarity = nearest(queries, candidates, k, backend)
    matrix = queries.astype(np.float64) @ candidates.astype(np.float64).T
    # copies of one text differ by rounding in a matrix product, so compare to 12 digits
    expected = np.argsort(-matrix.round(12), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarity, np.take_along_axis(matrix, expected, axis=1), atol=1e-12)


def test_nearly_equal_candidates_are_put_in_order_by_both_backends(backend):
    # differences far below what float32, in which FAISS compares, can tell
    candidates = on_circle(*(10 + 1e-7 * np.arange(30)))
    assert nearest(on_circle(0, 90), candidates, 3, backend)[0].tolist() == [[0, 1, 2], [29, 28, 27]]
    assert nearest(on_circle(90, 0), candidates, 3, backend)[0].tolist() == [[29, 28, 27], [0, 1, 2]]


def test_faiss_is_taken_beyond_the_limit_and_its_absence_is_an_error_that_says_what_to_do(monkeypatch):
    images, texts, words = study(20, 20)
    monkeypatch.setitem(sys.modules, "faiss", None)
    evaluate_retrieval(images, texts, words, num_bootstrap=0)
    monkeypatch.setattr(retrieval, "EXACT_LIMIT", 19)
    for search in (
        lambda: evaluate_retrieval(images, texts, words, num_bootstrap=0),
        lambda: nearest(images, texts, 1),
        lambda: nearest(images, texts[:3], 1, "faiss"),
    ):
        with pytest.raises(ValueError, match="more than 19 candidates.*pip install faiss-cpu.*backend='exact'"):
            search()
    assert nearest(images, texts, 1, "exact")[0].shape == (20, 1)
    assert nearest(images, texts[:19], 1)[0].shape == (20, 1)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_fewer_than_two_reports_are_an_error():
    with pytest.raises(ValueError, match="at least 2 reports.*1 rows have 1"):
        evaluate_retrieval(on_circle(0), on_circle(0), ["a"])
    with pytest.raises(ValueError, match="at least 2 reports.*2 rows have 1"):
        evaluate_retrieval(on_circle(0, 1), on_circle(0, 1), ["a", "a"], report_ids=["s", "s"])
    with pytest.raises(ValueError, match="at least one of each"):
        evaluate_retrieval(np.zeros((0, 2)), np.zeros((0, 2)), [])


def test_embeddings_that_are_not_finite_or_not_of_length_one_are_refused_by_name_and_row():
    good, bad = on_circle(0, 10), on_circle(0, 10)
    bad[1] = np.nan
    with pytest.raises(ValueError, match="`image_embeds` must be finite.*row 1"):
        evaluate_retrieval(bad, good, ["a", "b"])
    with pytest.raises(ValueError, match="`text_embeds` must have rows of length 1, but row 0 has length 3"):
        evaluate_retrieval(good, 3 * good, ["a", "b"])
    with pytest.raises(ValueError, match="`candidates`.*length 2"):
        nearest(good, 2 * good, 1)


def test_shapes_and_lists_that_disagree_are_refused():
    two, three = on_circle(0, 10), on_circle(0, 10, 20)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 2\)"):
        evaluate_retrieval(two, three, ["a", "b"])
    with pytest.raises(ValueError, match="`texts` must be a list of 2 entries.*has 3"):
        evaluate_retrieval(two, two, ["a", "b", "c"])
    with pytest.raises(ValueError, match="`texts` must be a list"):
        evaluate_retrieval(two, two, "ab")
    with pytest.raises(ValueError, match="`patient_ids` must be a list of 2"):
        evaluate_retrieval(two, two, ["a", "b"], ["p"])
    with pytest.raises(ValueError, match="`row_ids` may occur once"):
        evaluate_retrieval(two, two, ["a", "b"], row_ids=["x", "x"])
    with pytest.raises(ValueError, match=r"\(2, 2\) and `candidates` \(2, 3\)"):
        nearest(two, np.eye(3)[:2], 1)
    with pytest.raises(ValueError, match="k is 0"):
        nearest(two, two, 0)
    with pytest.raises(ValueError, match="backend is 'fais', expected one of auto, exact, faiss"):
        nearest(two, two, 1, "fais")


def test_one_report_with_two_texts_or_two_patients_is_an_error_that_names_the_rows():
    embeds = on_circle(0, 10, 20)
    with pytest.raises(ValueError, match="'1' and '2'.*two texts"):
        evaluate_retrieval(embeds, embeds, ["a", "b", "c"], report_ids=["r", "s", "s"])
    with pytest.raises(ValueError, match="'1' and '2'.*two patients"):
        evaluate_retrieval(embeds, embeds, ["a", "b", "b"], ["p", "p", "q"], report_ids=["r", "s", "s"])


# --------------------------------------------------------------------------------------------------------------- rows


def make_rows(*rows: dict):
    neutral = {"image": b"png", "source": "a", "report": "Edema."}
    return rows_to_dataset(make_row(**{"row_id": str(n), **neutral, **row}) for n, row in enumerate(rows))


def test_rows_with_image_and_report_are_picked_in_their_order():
    rows = make_rows({}, {"image": None}, {"report": None, "present": ["edema"]}, {"report": "Clear."})
    assert retrieval_rows(rows)["row_id"] == ["0", "3"]
    assert len(retrieval_rows(rows.select([1, 2]))) == 0


def test_a_report_is_that_of_a_study_and_its_text():
    shared = {"patient_id": "p", "study_id": "s"}
    rows = make_rows(
        shared,
        shared,
        {**shared, "report": "Clear."},
        {**shared, "source": "b"},
        {**shared, "patient_id": "q"},
        {"patient_id": "p"},
        {"patient_id": "p"},
    )
    names = report_names(rows)
    assert names[0] == names[1] and len(set(names)) == 6
