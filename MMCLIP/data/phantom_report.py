"""The report of a phantom: sentences for its findings with side and severity, denials, and what is normal."""

from collections.abc import Sequence

import numpy as np

from .phantom_findings import FINDINGS, Finding, choose


_SEVERITY_WORDS = {
    "mild": ("mild", "slight", "minimal"),
    "moderate": ("moderate",),
    "severe": ("severe", "marked"),
    "small": ("small",),
    "large": ("large",),
    "": ("",),
}
_PLACES = {
    "upper": ("{side} upper lobe", "{side} upper zone", "{side} upper lung"),
    "middle": ("{side} mid lung", "{side} mid zone"),
    "lower": ("{side} lower lobe", "{side} lower zone", "{side} lung base"),
}
_BOTH_PLACES = {
    "upper": ("both upper lobes", "both upper zones"),
    "middle": ("both mid zones", "both mid lungs"),
    "lower": ("both lower lobes", "both lung bases", "both lower zones"),
}
# {s} severity, {side}, {place}; the second list is for both sides
_SENTENCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "atelectasis": (
        (
            "There is {s} atelectasis at the {side} lung base.",
            "{s} {side} basilar atelectasis.",
            "{s} plate-like atelectasis is seen in the {place}.",
            "Linear atelectasis at the {side} base, {s}.",
            "{s} volume loss at the {side} base.",
        ),
        (
            "There is {s} bibasilar atelectasis.",
            "{s} atelectasis at both lung bases.",
            "{s} plate-like atelectasis is seen in {place}.",
        ),
    ),
    "cardiomegaly": (
        (
            "There is {s} cardiomegaly.",
            "The heart is enlarged, {s} in degree.",
            "{s} enlargement of the cardiac silhouette.",
            "{s} cardiac enlargement.",
            "{s} cardiomegaly is present.",
        ),
        (),
    ),
    "consolidation": (
        (
            "There is {s} consolidation in the {place}.",
            "{s} airspace consolidation is seen in the {place}.",
            "{s} {place} consolidation with air bronchograms.",
            "{s} airspace opacity in the {place}.",
        ),
        (
            "There is {s} consolidation in {place}.",
            "{s} bilateral airspace consolidation in {place}.",
            "{s} airspace opacities are seen in {place}.",
        ),
    ),
    "edema": (
        (),
        (
            "There is {s} pulmonary edema.",
            "{s} interstitial edema with Kerley lines.",
            "{s} bilateral perihilar edema.",
            "{s} pulmonary edema with vascular redistribution.",
        ),
    ),
    "emphysema": (
        (),
        (
            "There is {s} emphysema.",
            "{s} emphysematous changes in both lungs.",
            "The lungs are hyperinflated, with {s} emphysema.",
            "{s} emphysema with flattened diaphragms.",
        ),
    ),
    "hiatal hernia": (
        (
            "There is a {s} hiatal hernia.",
            "{s} hiatal hernia with an air-fluid level behind the heart.",
            "A {s} retrocardiac hiatal hernia is noted.",
            "{s} hiatus hernia.",
        ),
        (),
    ),
    "mass": (
        (
            "There is a {s} mass in the {place}.",
            "A {s} lung mass is seen in the {place}.",
            "{s} {place} mass.",
            "{s} pulmonary mass in the {place}.",
        ),
        (),
    ),
    "nodule": (
        (
            "There is a {s} nodule in the {place}.",
            "A {s} pulmonary nodule is seen in the {place}.",
            "{s} {place} nodule.",
            "{s} nodular opacity in the {place}.",
        ),
        (
            "There are {s} nodules in {place}.",
            "{s} bilateral pulmonary nodules are seen in {place}.",
            "{s} nodules in {place}.",
        ),
    ),
    "pleural effusion": (
        (
            "There is a {s} {side} pleural effusion.",
            "{s} {side} pleural effusion.",
            "A {s} {side} effusion is present.",
            "{s} effusion on the {side}, blunting the costophrenic angle.",
            "{s} amount of pleural fluid on the {side}.",
        ),
        (
            "There are {s} bilateral pleural effusions.",
            "{s} pleural effusions on both sides.",
            "{s} bilateral effusions are present.",
        ),
    ),
    "pleural thickening": (
        (
            "There is {s} {side} {zone} pleural thickening.",
            "{s} pleural thickening on the {side}, {zone}.",
            "{s} {zone} thickening of the pleura on the {side}.",
        ),
        (
            "There is {s} bilateral {zone} pleural thickening.",
            "{s} {zone} pleural thickening on both sides.",
        ),
    ),
    "pneumothorax": (
        (
            "There is a {s} {side} pneumothorax.",
            "{s} {side} pneumothorax.",
            "A {s} pneumothorax is seen on the {side}.",
            "{s} {side}-sided pneumothorax with a visible pleural line.",
        ),
        (),
    ),
}
_DEVICE_SENTENCES = {
    "pacemaker": (
        "{side} chest pacemaker with leads in the heart.",
        "A {side}-sided cardiac pacemaker is in place.",
        "There is a {side} pacemaker.",
    ),
    "endotracheal tube": (
        "An endotracheal tube ends above the carina.",
        "The endotracheal tube is in standard position.",
        "There is an endotracheal tube.",
    ),
    "central line": (
        "A {side} central venous catheter ends in the superior vena cava.",
        "{side}-sided central line in place.",
        "There is a {side} central venous catheter.",
    ),
    "sternal wires": (
        "Median sternotomy wires are present.",
        "Sternal wires are intact.",
        "There are sternotomy wires.",
    ),
    "nasogastric tube": (
        "A nasogastric tube passes into the stomach.",
        "There is a nasogastric tube.",
        "Nasogastric tube ends below the diaphragm.",
    ),
    "chest tube": (
        "A {side} chest tube is in place.",
        "There is a {side}-sided chest tube.",
        "{side} pleural drain.",
    ),
}
_ABSENT_WORDS = {
    "atelectasis": ("atelectasis",),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "consolidation": ("consolidation", "focal consolidation", "airspace consolidation"),
    "edema": ("pulmonary edema", "edema", "interstitial edema"),
    "emphysema": ("emphysema",),
    "hiatal hernia": ("hiatal hernia",),
    "mass": ("mass", "lung mass"),
    "nodule": ("nodule", "pulmonary nodule"),
    "pleural effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "pleural thickening": ("pleural thickening",),
    "pneumothorax": ("pneumothorax",),
    "support device": ("support device", "support devices"),
}
_DENIALS = ("No {}.", "There is no {}.", "No evidence of {}.", "No {} is seen.", "Negative for {}.")
_LUNG_FINDINGS = {"atelectasis", "consolidation", "edema", "emphysema", "mass", "nodule"}
# what a report may say when none of the findings on the right is there; "" needs an entirely normal film
_NORMAL_SENTENCES: tuple[tuple[tuple[str, ...], frozenset[str]], ...] = (
    (
        ("Heart size is normal.", "The heart is normal in size.", "The cardiac silhouette is not enlarged."),
        frozenset({"cardiomegaly"}),
    ),
    (("The lungs are clear.", "Both lungs are clear.", "Lungs are clear bilaterally."), frozenset(_LUNG_FINDINGS)),
    (
        ("The costophrenic angles are sharp.", "Costophrenic angles are clear."),
        frozenset({"pleural effusion", "pleural thickening"}),
    ),
    (
        ("Pulmonary vascularity is normal.", "The pulmonary vasculature is within normal limits."),
        frozenset({"edema", "emphysema"}),
    ),
    (
        ("Mediastinal contours are normal.", "The mediastinum is unremarkable."),
        frozenset({"hiatal hernia", "cardiomegaly", "mass"}),
    ),
    (("The bones are intact.", "No acute osseous abnormality."), frozenset()),
)
_ALL_NORMAL = ("No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "No acute cardiopulmonary process.")


def _sentence(finding: Finding, rng: np.random.Generator) -> str:
    both = finding.side == "bilateral"
    if finding.name == "support device":
        template = choose(rng, _DEVICE_SENTENCES[finding.zone])
    else:
        template = choose(rng, _SENTENCES[finding.name][1 if both else 0])
    places = (_BOTH_PLACES if both else _PLACES).get(finding.zone, ("",))
    place = choose(rng, places).format(side=finding.side)
    severity = choose(rng, _SEVERITY_WORDS[finding.severity])
    text = template.format(s=severity, side=finding.side, place=place, zone=finding.zone)
    return text[0].upper() + text[1:]


def write_report(findings: Sequence[Finding], rng: np.random.Generator) -> str:
    """3 to 7 sentences that name every finding with its side and severity, and deny some of the others.

    The findings must be complete (`Phantom.findings` are). Sentences that deny or call normal are true of the film.
    """
    present = {item.name for item in findings}
    told = [_sentence(item, rng) for item in findings]
    absent = [name for name in FINDINGS if name not in present]
    allowed = [texts for texts, unless in _NORMAL_SENTENCES if not unless & present]
    normal = [choose(rng, texts) for texts in allowed if rng.random() < 0.45]
    if not present and rng.random() < 0.7:
        normal.append(choose(rng, _ALL_NORMAL))
    denials = []
    rest = list(rng.permutation(absent))[: int(rng.integers(2, 8))]
    while rest:
        count = min(int(rng.integers(1, 4)), len(rest))
        words = [choose(rng, _ABSENT_WORDS[str(name)]) for name in rest[:count]]
        rest = rest[count:]
        listed = words[0] if count == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"
        denials.append(choose(rng, _DENIALS).format(listed))
    room = 7 - len(told)
    others = [str(text) for text in rng.permutation(normal + denials)][:room]
    while len(told) + len(others) < 3:
        others.append(choose(rng, [texts[0] for texts in allowed if not set(texts) & set(others)]))
    sentences = told + others
    if rng.random() < 0.6:  # abnormal first, as most radiologists do; else as the eye wandered
        return " ".join([*(str(t) for t in rng.permutation(told)), *others])
    return " ".join(str(text) for text in rng.permutation(sentences))
