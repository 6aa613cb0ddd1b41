"""Retrieval: does an image find its report among all reports, and a report its image among all images?

Candidates are all reports, or all images, of the rows, however often the same words occur: normal studies share theirs.
So each number is given under two rules, side by side:

- `identical_texts_count`: a report that is word for word the own one is a hit too, as is the image of such a report.
- `own_text_only`: only the very pair is a hit. Reports of the same words cannot be told apart, so that even a perfect
  model stays below 1 here; they are ties.

Ties: a hit that is as similar as other candidates counts as if these stood in random order. Recall@k is the chance that
the first hit then stands among the first k, the rank its mean place. So a collapsed model, which gives all the same
embedding, scores exactly what stands beside each number as `..._chance`.
Images of one report (two views of a study) share one candidate, and the report is found when any of them is.

Ranks are counted, so no matrix of all similarities is held. Up to `EXACT_LIMIT` candidates blocks of matrix products
are counted; beyond it FAISS lists the nearest `NUM_LISTED` of each query, which settles every query whose hit is
clearly among them, and the others are counted as before. Both give the same answers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
from torch import Tensor

from ..data.manifest import has_image
from .bootstrap import first_and_second
from .metrics import percentile_interval, resample_patients


DEPTHS = (1, 5, 10)  # the k of Recall@k
DIRECTIONS = ("image_to_text", "text_to_image")
WAYS = ("identical_texts_count", "own_text_only")
MEASURES = (*(f"recall_at_{depth}" for depth in DEPTHS), "median_rank")
BACKENDS = ("auto", "exact", "faiss")
EXACT_LIMIT = 100_000  # candidates that "auto" searches by matrix products
NUM_LISTED = 128  # candidates that FAISS lists for each query
SAME = 1e-6  # similarities this close are equal: float32 towers differ so much for one text in other batches
_FAISS_ERROR = 2e-5  # far above what float32 sums of unit vectors can be wrong by
_FAISS_QUERIES = 4096  # of one call: small calls take four times as long for each query
_BLOCK = 4_000_000  # numbers held at once


class QueryRanks(NamedTuple):
    """Of each query: the mean `rank` (q,) of its first hit, 1 the best, and `recall` (q, 3) in [0, 1] at `DEPTHS`."""

    rank: np.ndarray
    recall: np.ndarray


class RetrievalRanks(NamedTuple):
    """The ranks behind the metrics, by rule of `WAYS`.

    Queries of `image_to_text` are the n rows, those of `text_to_image` the m reports; `report_of_row` (n,) tells which
    report a row has. `image_patients` (n) and `text_patients` (m) are the patients of the queries.
    """

    row_ids: list[str]
    report_of_row: np.ndarray
    image_to_text: dict[str, QueryRanks]
    text_to_image: dict[str, QueryRanks]
    image_patients: list[str]
    text_patients: list[str]

    def table(self) -> list[dict]:
        """A line for each row, for a CSV: its id, and the ranks of its image's report and of its report's image."""
        columns = {
            f"{direction}_{way}": ranks[way].rank[rows]
            for direction, ranks, rows in (
                ("image_to_text", self.image_to_text, slice(None)),
                ("text_to_image", self.text_to_image, self.report_of_row),
            )
            for way in WAYS
        }
        return [
            {"row_id": row_id, **{name: float(ranks[number]) for name, ranks in columns.items()}}
            for number, row_id in enumerate(self.row_ids)
        ]


# --------------------------------------------------------------------------------------------------------------- rows


def retrieval_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with an image and a report, in their order; there may be none."""
    pairs = zip(has_image(rows), rows["report"], strict=True)
    return rows.select([number for number, (image, report) in enumerate(pairs) if image and report])


def report_names(rows: datasets.Dataset) -> list[str]:
    """A name for the report of each row: rows of one study with the same text share one report.

    A row without `study_id` has a report of its own.
    """
    fields = ("row_id", "source", "patient_id", "study_id", "report")
    return [
        "\0".join((source, patient, study, report)) if study else f"\0{row_id}"
        for row_id, source, patient, study, report in zip(*(rows[field] for field in fields), strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- search


def _unit_rows(embeds: Tensor | np.ndarray, name: str) -> np.ndarray:
    embeds = embeds.detach().cpu().numpy() if isinstance(embeds, Tensor) else np.asarray(embeds)
    if embeds.ndim != 2 or 0 in embeds.shape:
        raise ValueError(f"`{name}` must be (rows, dimensions) with at least one of each, but is {embeds.shape}.")
    embeds = embeds.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite, but {len(bad)} of {len(embeds)} rows hold NaN or infinity, the first is row "
            f"{bad[0]}. Look for diverged weights or a half-precision overflow in the model."
        )
    lengths = np.linalg.norm(embeds, axis=1)
    worst = int(np.abs(lengths - 1).argmax())
    if abs(lengths[worst] - 1) > 0.01:  # bfloat16 is this exact
        raise ValueError(
            f"`{name}` must have rows of length 1, but row {worst} has length {lengths[worst]:.4g}. Divide each row by "
            "its length, or take the embeddings of image_features and text_features."
        )
    return embeds


class _Candidates:
    """Candidates to search, each distinct embedding once: `embeds` (u, D), how many have it, and who."""

    def __init__(self, embeds: np.ndarray, backend: str):
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
        numbers: dict[bytes, int] = {}
        self.number = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in embeds])  # (m,)
        self.embeds = embeds[np.unique(self.number, return_index=True)[1]]
        self.counts = np.bincount(self.number)
        self.members = np.split(np.argsort(self.number, kind="stable"), np.cumsum(self.counts)[:-1])
        self.index = None
        if backend == "faiss" or (backend == "auto" and len(embeds) > EXACT_LIMIT):
            self.index = _faiss_index(self.embeds)

    def listed(
        self, queries: np.ndarray, num: int, width: int = 1
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """By FAISS: a slice of `queries`, the distinct candidates (b, num) nearest to each and their similarities.

        Last comes a bound (b,) that no candidate which is not listed exceeds. The caller holds `width` more numbers
        for each query.
        """
        for start in range(0, len(queries), _FAISS_QUERIES):
            found, nearest = self.index.search(queries[start : start + _FAISS_QUERIES].astype(np.float32), num)
            bounds = found[:, -1] + _FAISS_ERROR if num < len(self.embeds) else np.full(len(found), -np.inf)
            for part in _blocks(len(found), max(width, num * self.embeds.shape[1])):
                block = slice(start + part.start, start + part.stop)
                similarity = np.einsum("bd,bkd->bk", queries[block], self.embeds[nearest[part]])  # in float64
                yield block, nearest[part], similarity, bounds[part]


def _blocks(num: int, width: int) -> Iterator[slice]:
    """Slices of `num` rows for each of which `width` numbers can be held."""
    size = max(1, _BLOCK // width)
    yield from (slice(start, min(start + size, num)) for start in range(0, num, size))


def _faiss_index(embeds: np.ndarray):
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"FAISS is needed to search more than {EXACT_LIMIT} candidates, or for backend='faiss', but is not "
            "installed. Run `pip install faiss-cpu`, or take backend='exact', which gives the same answers slower."
        ) from error
    index = faiss.IndexFlatIP(embeds.shape[1])  # compares with every candidate, so it is exact
    index.add(np.ascontiguousarray(embeds, dtype=np.float32))
    return index


def nearest(
    queries: Tensor | np.ndarray, candidates: Tensor | np.ndarray, k: int, backend: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` candidates nearest to each query, (q, k) int64, and their cosine similarities, (q, k) float64.

    `queries` (q, D) and `candidates` (m, D) are L2-normalised; there are never more than m columns. The most similar
    comes first; candidates with the same embedding come in their order. `backend` is "exact", "faiss" or "auto",
    FAISS beyond `EXACT_LIMIT` candidates; the answers are the same. Raises `ValueError` for embeddings that are not
    finite, not of length 1, or of another size, for `k` below 1, and where FAISS is needed but not installed.
    """
    queries, embeds = _unit_rows(queries, "queries"), _unit_rows(candidates, "candidates")
    if queries.shape[1] != embeds.shape[1]:
        raise ValueError(
            f"`queries` {queries.shape} and `candidates` {embeds.shape} must have embeddings of one size, of one model."
        )
    if k < 1:
        raise ValueError(f"k is {k}, expected 1 or more.")
    pool = _Candidates(embeds, backend)
    k, num = min(k, len(embeds)), min(k, len(pool.embeds))
    indices, similarities = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k))

    def settle(row: int, distinct: np.ndarray, similarity: np.ndarray) -> None:
        """From the distinct candidates that may be among the first, in the order of their numbers."""
        order = np.argsort(-similarity, kind="stable")[:num]
        everyone = np.concatenate([pool.members[number] for number in distinct[order]])
        indices[row] = everyone[:k]
        similarities[row] = np.repeat(similarity[order], pool.counts[distinct[order]])[:k]

    left = np.ones(len(queries), dtype=bool)
    if pool.index is not None:
        for block, listed, similarity, bound in pool.listed(queries, min(num + NUM_LISTED, len(pool.embeds))):
            last = np.partition(similarity, -num, axis=1)[:, -num]
            for row in np.flatnonzero(last > bound):
                order = np.argsort(listed[row])
                settle(block.start + row, listed[row][order], similarity[row][order])
            left[block] = last <= bound
    remaining = np.flatnonzero(left)
    for block in _blocks(len(remaining), len(pool.embeds)):
        for row, similarity in zip(remaining[block], queries[remaining[block]] @ pool.embeds.T, strict=True):
            last = np.partition(similarity, -num)[-num]
            distinct = np.flatnonzero(similarity >= last)
            settle(row, distinct, similarity[distinct])
    return indices, similarities


# -------------------------------------------------------------------------------------------------------------- ranks


class _Hits:
    """Which candidates are hits of a query: those of the group that it names."""

    def __init__(self, group_of_query: np.ndarray, group_of_candidate: np.ndarray):
        order = np.argsort(group_of_candidate, kind="stable")
        sizes = np.bincount(group_of_candidate)
        self.members = np.split(order, np.cumsum(sizes)[:-1])
        self.group_of_query = group_of_query
        self.counts = sizes[group_of_query]

    def pairs(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (query, hit) of some `queries` (b,): the place of the query, the candidate, and where a query begins."""
        counts = self.counts[queries]
        hits = np.concatenate([self.members[group] for group in self.group_of_query[queries]])
        return np.repeat(np.arange(len(queries)), counts), hits, np.cumsum(counts) - counts


def _first_place(num: np.ndarray, num_hits: np.ndarray, depth: np.ndarray | int) -> np.ndarray:
    """P that one of `num_hits` among `num` in random order stands in the first `depth`, at most `DEPTHS[-1]`."""
    missed = np.ones(np.broadcast_shapes(np.shape(num), np.shape(depth)))
    for place in range(DEPTHS[-1]):
        others = np.clip(num - num_hits - place, 0, None) / np.maximum(num - place, 1)
        missed *= np.where(place < depth, others, 1.0)
    return 1 - missed


def _random_order(above: np.ndarray, tied: np.ndarray, hits: np.ndarray) -> QueryRanks:
    """Ranks when `above` candidates are more similar than the best hit, and `tied` as similar, `hits` of them hits."""
    recall = [_first_place(tied, hits, np.clip(depth - above, 0, None)) for depth in DEPTHS]
    return QueryRanks(above + (tied + 1) / (hits + 1), np.stack(recall, axis=1))


def _count(queries: np.ndarray, pool: _Candidates, hits: Sequence[_Hits]) -> list[QueryRanks]:
    """The ranks of all `queries` (q, D), under each rule of what a hit is."""
    counted = np.empty((len(hits), 3, len(queries)), dtype=np.int64)  # above, tied, tied hits
    left = np.ones((len(hits), len(queries)), dtype=bool)
    width = max(rule_hits.counts.max() for rule_hits in hits)
    if pool.index is not None:
        for block, listed, similarity, bound in pool.listed(queries, min(NUM_LISTED, len(pool.embeds)), width):
            rows = np.arange(len(queries))[block]
            for rule, rule_hits in enumerate(hits):
                place, candidate, starts = rule_hits.pairs(rows)
                own = _products(queries, rows[place], pool.embeds, pool.number[candidate])
                counted[rule][:, block], best = _compare(similarity, pool.counts[listed], own, place, starts)
                left[rule, block] = best - SAME <= bound
    remaining = np.flatnonzero(left.any(axis=0))
    weights = pool.counts.astype(np.float64)
    for block in _blocks(len(remaining), max(width, len(pool.embeds))):
        rows = remaining[block]
        similarity = queries[rows] @ pool.embeds.T
        for rule, rule_hits in enumerate(hits):
            place, candidate, starts = rule_hits.pairs(rows)
            own = similarity[place, pool.number[candidate]]
            counted[rule][:, rows], _ = _compare(similarity, weights, own, place, starts)
    return [_random_order(*numbers) for numbers in counted]


def _products(queries: np.ndarray, rows: np.ndarray, candidates: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Similarity of `queries[rows[i]]` to `candidates[numbers[i]]`, for each i."""
    parts = _blocks(len(rows), queries.shape[1])
    return np.concatenate([np.einsum("bd,bd->b", queries[rows[part]], candidates[numbers[part]]) for part in parts])


def _compare(
    similarity: np.ndarray, counts: np.ndarray, own: np.ndarray, place: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(above, tied, tied hits) as (3, b), and the similarity of the best hit (b,).

    `similarity` (b, k) is to distinct candidates, of which there are `counts` (k,) or (b, k); `own` to hits, those of a
    query together, beginning at its entry of `starts`; `place` is the query of each.
    """
    best = np.maximum.reduceat(own, starts)
    not_below = similarity >= best[:, None] - SAME
    above = similarity > best[:, None] + SAME
    counts = np.broadcast_to(counts, similarity.shape)
    num_above, num_not_below = (np.einsum("bk,bk->b", where, counts) for where in (above, not_below))
    tied_hits = np.add.reduceat((own >= best[place] - SAME).astype(np.int64), starts)
    return np.stack([num_above, num_not_below - num_above, tied_hits]), best


# ------------------------------------------------------------------------------------------------------------ metrics


def evaluate_retrieval(
    image_embeds: Tensor | np.ndarray,
    text_embeds: Tensor | np.ndarray,
    texts: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    backend: str = "auto",
    *,
    report_ids: Sequence[str] | None = None,
    row_ids: Sequence[str] | None = None,
) -> tuple[dict, RetrievalRanks]:
    """Recall@1, 5 and 10 and the median rank of both directions, under both rules of the module, and the ranks.

    `image_embeds` and `text_embeds` (n, D) are L2-normalised, row k of each from the same study, whose report is
    `texts[k]`. Rows with one entry of `report_ids` ([`report_names`]) share one report; without, each row has its own.
    Beside each number stand its 95 % bootstrap interval over patients, `..._ci`, and what a model without knowledge
    scores, `..._chance`. An interval is None for a single patient, which `no_interval_because` then says, and for
    `num_bootstrap=0`. `backend` says how to search, and changes no number. Raises `ValueError` for fewer than two
    reports, shapes that disagree, and embeddings that are not finite or not of length 1.
    """
    images, every_text = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    row_ids = [str(row) for row in range(len(images))] if row_ids is None else list(row_ids)
    patients = [""] * len(images) if patient_ids is None else list(patient_ids)
    names = [str(row) for row in range(len(images))] if report_ids is None else list(report_ids)
    _check(images, every_text, {"texts": texts, "patient_ids": patients, "report_ids": names, "row_ids": row_ids})
    patients = [patient or f"\0{name}" for patient, name in zip(patients, names, strict=True)]
    words = [" ".join(text.split()) for text in texts]
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        other = first.setdefault(name, row)
        for what, entries in (("texts", words), ("patients", patients)):
            if entries[row] != entries[other]:
                raise ValueError(
                    f"Rows {row_ids[other]!r} and {row_ids[row]!r} have one entry in `report_ids`, but are of two "
                    f"{what}. Name each report apart."
                )
    if len(first) < 2:
        raise ValueError(
            f"Retrieval needs at least 2 reports to choose from, but {len(images)} rows have {len(first)}. Check the "
            "split, and that rows have an image and a report."
        )
    number = {name: report for report, name in enumerate(first)}
    report_of_row = np.array([number[name] for name in names])
    firsts = np.array(list(first.values()))
    wording = np.unique(words, return_inverse=True)[1]  # (n,)
    groups_of_images = (wording, report_of_row)  # in the order of WAYS
    groups_of_texts = (wording[firsts], np.arange(len(firsts)))
    to_text = [_Hits(images_, texts_) for images_, texts_ in zip(groups_of_images, groups_of_texts, strict=True)]
    to_image = [_Hits(texts_, images_) for images_, texts_ in zip(groups_of_images, groups_of_texts, strict=True)]
    ranks = RetrievalRanks(
        row_ids,
        report_of_row,
        dict(zip(WAYS, _count(images, _Candidates(every_text[firsts], backend), to_text), strict=True)),
        dict(zip(WAYS, _count(every_text[firsts], _Candidates(images, backend), to_image), strict=True)),
        patients,
        [patients[row] for row in firsts],
    )
    num_patients = len(set(patients))
    shared = np.bincount(wording[firsts])[wording[firsts]] > 1
    result = {
        "image_to_text": _described(ranks.image_to_text, to_text, len(firsts), patients, num_bootstrap, seed),
        "text_to_image": _described(
            ranks.text_to_image, to_image, len(images), ranks.text_patients, num_bootstrap, seed
        ),
        "num_images": len(images),
        "num_texts": len(firsts),
        "num_distinct_texts": len(set(words)),
        "num_identical": int(shared.sum()),  # reports whose words are those of another report too
        "num_patients": num_patients,
        "ties": "equal similarities in random order, in the mean",
        "candidates": "all reports and all images of these rows, identical texts included",
        "no_interval_because": None if num_patients > 1 else "all rows are of one patient",
        "num_bootstrap": num_bootstrap,
    }
    return result, ranks


def _check(images: np.ndarray, texts: np.ndarray, lists: dict[str, Sequence]) -> None:
    if images.shape != texts.shape:
        raise ValueError(
            f"`image_embeds` and `text_embeds` must have one shape, a row of each for each pair, but are "
            f"{images.shape} and {texts.shape}."
        )
    for name, entries in lists.items():
        if isinstance(entries, str) or len(entries) != len(images):
            raise ValueError(
                f"`{name}` must be a list of {len(images)} entries, one for each row of `image_embeds`, but has "
                f"{len(entries)}."
            )
    if len(set(lists["row_ids"])) < len(images):
        raise ValueError("Each of `row_ids` may occur once.")


def _described(
    ranks: dict[str, QueryRanks],
    hits: Sequence[_Hits],
    num_candidates: int,
    patients: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> dict:
    draws = _draws(ranks, patients, num_bootstrap, seed)
    result = {}
    for way, way_hits in zip(WAYS, hits, strict=True):
        num = np.full(len(patients), num_candidates)
        chance = _summary(_random_order(np.zeros_like(num), num, way_hits.counts))
        values = {"num_queries": len(patients)}
        for column, name in enumerate(MEASURES):
            interval = percentile_interval(draws[way][:, column], num_bootstrap) if len(set(patients)) > 1 else None
            values |= {name: float(_summary(ranks[way])[column]), f"{name}_ci": interval}
            values[f"{name}_chance"] = float(chance[column])
        result[way] = values
    return result


def _summary(ranks: QueryRanks) -> list[float]:
    return [*ranks.recall.mean(axis=0), np.median(ranks.rank)]


def _draws(
    ranks: dict[str, QueryRanks], patients: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """By way, what [`_summary`] gives for patients drawn with replacement: (R, 4)."""
    order = {way: np.argsort(inner.rank, kind="stable") for way, inner in ranks.items()}
    blocks = {way: [np.empty((0, len(MEASURES)))] for way in ranks}
    for weights in resample_patients(patients, len(patients), num_bootstrap, seed):
        total = weights.sum(axis=1, keepdims=True)
        for way, inner in ranks.items():
            upto = np.cumsum(weights[:, order[way]], axis=1)  # (r, q)
            middle = [(upto <= place).sum(axis=1) for place in ((total - 1) // 2, total // 2)]
            median = inner.rank[order[way]][np.stack(middle)].mean(axis=0)
            blocks[way].append(np.column_stack([weights @ inner.recall / total, median]))
    return {way: np.concatenate(parts) for way, parts in blocks.items()}


def compare_retrieval(first: RetrievalRanks, second: RetrievalRanks, num_bootstrap: int = 1000, seed: int = 0) -> dict:
    """Two models on the same rows: each measure of both, `first` minus `second`, its 95 % interval and p-value.

    Keys are `<direction>_<way>_<measure>`. Patients are drawn for both alike. The p-value is that of
    `bootstrap.py`; it and the interval are None for a single patient. Raises `ValueError` where the rows, their reports
    or patients differ.
    """
    same = all(getattr(first, name) == getattr(second, name) for name in ("row_ids", "image_patients", "text_patients"))
    if not same or not np.array_equal(first.report_of_row, second.report_of_row):
        raise ValueError(
            f"Only ranks of the same rows, reports and patients can be compared, but those of {len(first.row_ids)} and "
            f"{len(second.row_ids)} rows differ. Evaluate both models on the same rows."
        )
    result = {}
    for direction, patients in zip(DIRECTIONS, (first.image_patients, first.text_patients), strict=True):
        ranks = [getattr(model, direction) for model in (first, second)]
        draws = [_draws(inner, patients, num_bootstrap, seed) for inner in ranks]
        for way in WAYS:
            values = [_summary(inner[way]) for inner in ranks]
            leads = draws[0][way] - draws[1][way]
            leads = leads if len(set(patients)) > 1 else leads[:0]
            for column, measure in enumerate(MEASURES):
                result[f"{direction}_{way}_{measure}"] = first_and_second(
                    values[0][column], values[1][column], leads[:, column], num_bootstrap
                )
    return result
