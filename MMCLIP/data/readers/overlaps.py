"""Which public sets are inside others, so that an evaluation set was trained on without anybody noticing."""

from collections.abc import Iterable


_INSIDE = {  # (evaluated, trained on): what is known
    ("rsna", "chestxray14"): "all 30,000 RSNA images are ChestX-ray14 images (21,804 train_val, 8,196 test)",
    ("chestxray14", "rsna"): "all 30,000 RSNA images are ChestX-ray14 images, 8,196 of them of its test list",
    ("siim", "chestxray14"): "SIIM-ACR images are ChestX-ray14 images; no list maps one to the other",
    ("chestxray14", "siim"): "SIIM-ACR images are ChestX-ray14 images; no list maps one to the other",
    ("siim", "rsna"): "both were drawn from ChestX-ray14 and may share images",
    ("rsna", "siim"): "both were drawn from ChestX-ray14 and may share images",
    ("covidx", "rsna"): "negatives of COVIDx are RSNA images",
    ("covidx", "chestxray14"): "negatives of COVIDx are RSNA images, which are ChestX-ray14 images",
    ("covidx", "siim"): "negatives of COVIDx are RSNA images, which are from ChestX-ray14 as SIIM-ACR is",
    ("rsna", "covidx"): "negatives of COVIDx are RSNA images",
    ("siim", "covidx"): "negatives of COVIDx are RSNA images, which are from ChestX-ray14 as SIIM-ACR is",
    ("chestxray14", "covidx"): "negatives of COVIDx are RSNA images, which are ChestX-ray14 images",
}


def known_overlaps(training: Iterable[str], evaluation: Iterable[str]) -> list[str]:
    """A sentence for each pair of an evaluated and a trained `source` of rows that are known to share images.

    The parts of one source are kept apart by its split, so a source is no overlap of itself. Of the collections in
    COVIDx, "covidx-rsna" is known to be elsewhere; where its lists do not name them, all of "covidx" may be.
    """
    names = {"covidx-rsna": "covidx"}
    training = sorted(set(training))
    return [
        f"Images of {evaluated} are in {trained}, which is trained on: {fact}. Scores on {evaluated} may be too high."
        for evaluated in dict.fromkeys(evaluation)
        for trained in training
        if (fact := _INSIDE.get((names.get(evaluated, evaluated), names.get(trained, trained))))
    ]
