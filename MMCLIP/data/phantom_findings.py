"""Which findings a phantom has: their kinds, sides, severities and places, and how they are drawn by lot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


FINDINGS = (
    "atelectasis", "cardiomegaly", "consolidation", "edema", "emphysema", "hiatal hernia", "mass", "nodule",
    "pleural effusion", "pleural thickening", "pneumothorax", "support device",
)  # fmt: skip

GRADES = ("mild", "moderate", "severe")
SIZES = ("small", "moderate", "large")
# what a finding may be: severities, sides with their probabilities, zones ("" = the finding has no place to name)
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, float], tuple[str, ...]]] = {
    "atelectasis": (GRADES, {"left": 0.38, "right": 0.34, "bilateral": 0.28}, ("lower",)),
    "cardiomegaly": (GRADES, {"": 1.0}, ("",)),
    "consolidation": (GRADES, {"left": 0.42, "right": 0.46, "bilateral": 0.12}, ("upper", "middle", "lower")),
    "edema": (GRADES, {"bilateral": 1.0}, ("",)),
    "emphysema": (GRADES, {"bilateral": 1.0}, ("",)),
    "hiatal hernia": (SIZES, {"": 1.0}, ("retrocardiac",)),
    "mass": (SIZES, {"left": 0.5, "right": 0.5}, ("upper", "middle", "lower")),
    "nodule": (("small", "large"), {"left": 0.42, "right": 0.42, "bilateral": 0.16}, ("upper", "middle", "lower")),
    "pleural effusion": (SIZES, {"left": 0.36, "right": 0.36, "bilateral": 0.28}, ("",)),
    "pleural thickening": (GRADES, {"left": 0.38, "right": 0.38, "bilateral": 0.24}, ("apical", "lateral")),
    "pneumothorax": (SIZES, {"left": 0.5, "right": 0.5}, ("",)),
    "support device": (
        ("",),
        {},  # the side follows from the kind of device
        ("pacemaker", "endotracheal tube", "central line", "sternal wires", "nasogastric tube", "chest tube"),
    ),
}
DEVICE_SIDES: dict[str, dict[str, float]] = {
    "pacemaker": {"left": 0.8, "right": 0.2},
    "endotracheal tube": {"": 1.0},
    "central line": {"left": 0.3, "right": 0.7},
    "sternal wires": {"": 1.0},
    "nasogastric tube": {"": 1.0},
    "chest tube": {"left": 0.5, "right": 0.5},
}


@dataclass(frozen=True)
class Finding:
    """One abnormality. `side` is "left", "right", "bilateral" or "" (midline); `zone` its place, or the kind of device.

    An empty `severity` or `zone` that the finding has is drawn at random when a phantom is made; `side=None` is too.
    """

    name: str
    side: str | None = None
    severity: str = ""
    zone: str = ""


# --- which findings a patient has -------------------------------------------------------------------------------------

_NUM_FINDINGS = (0.25, 0.25, 0.25, 0.17, 0.08)  # probability of 0, 1, 2, 3, 4 findings
# pairs that one illness brings; the factor multiplies the second finding's weight once the first is there
_TOGETHER = {
    ("cardiomegaly", "edema"): 2.5, ("edema", "cardiomegaly"): 2.5, ("edema", "pleural effusion"): 2.0,
    ("cardiomegaly", "pleural effusion"): 1.6, ("pleural effusion", "atelectasis"): 1.6,
    ("pneumothorax", "support device"): 1.6, ("emphysema", "pneumothorax"): 1.4, ("emphysema", "cardiomegaly"): 0.4,
    ("cardiomegaly", "emphysema"): 0.4, ("edema", "emphysema"): 0.3, ("emphysema", "edema"): 0.3,
}  # fmt: skip


def choose(rng: np.random.Generator, options: Sequence, weights: Sequence[float] | None = None):
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]


def draw_findings(rng: np.random.Generator) -> list[Finding]:
    weights = dict.fromkeys(FINDINGS, 1.0) | {"hiatal hernia": 0.85, "pleural effusion": 1.25, "support device": 1.2}
    findings: list[Finding] = []
    for _ in range(choose(rng, range(5), _NUM_FINDINGS)):
        name = choose(rng, list(weights), list(weights.values()))
        del weights[name]
        for (first, second), factor in _TOGETHER.items():
            if first == name and second in weights:
                weights[second] *= factor
        findings.append(Finding(name))
    return findings


def fill_in(findings: Sequence[Finding | str], rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw what the findings leave open, so that none hides another; raises ValueError for what no finding has."""
    given = [Finding(item) if isinstance(item, str) else item for item in findings]
    for item in given:
        if item.name not in FINDINGS:
            raise ValueError(f"Finding {item.name!r} cannot be drawn. Choose from {', '.join(FINDINGS)}.")
        severities, sides, zones = _KINDS[item.name]
        if item.name == "support device":
            sides = {side: 1.0 for kind in zones for side in DEVICE_SIDES[kind] if item.zone in ("", kind)}
        for value, allowed, what in (
            (item.severity, severities, "severity"),
            (item.zone, zones, "zone"),
            (item.side, sides, "side"),
        ):
            if value not in ("" if what != "side" else None, *allowed):
                raise ValueError(f"{item.name}: {what} is {value!r}, expected one of {tuple(allowed)}.")
    names = [item.name for item in given]
    if len(set(names)) != len(names):
        raise ValueError(f"A finding is given twice in {names}. Use side='bilateral' for both sides.")
    filled: dict[str, Finding] = {}
    # what takes much room first; then what has to find a place beside it
    order = ("pneumothorax", "pleural effusion", "mass", *FINDINGS)
    for item in sorted(given, key=lambda item: order.index(item.name)):
        filled[item.name] = _fill_in_one(item, filled, rng)
    return tuple(filled[name] for name in names)


def _fill_in_one(item: Finding, others: dict[str, Finding], rng: np.random.Generator) -> Finding:
    severities, sides, zones = _KINDS[item.name]
    severity = item.severity or choose(rng, severities)
    zone = item.zone or choose(rng, zones)
    if item.name == "support device":
        sides = DEVICE_SIDES[zone]
    effusion, pneumothorax, mass = (others.get(k) for k in ("pleural effusion", "pneumothorax", "mass"))
    side = item.side
    if side is None:
        sides = dict(sides)
        lung_lesion = item.name in ("atelectasis", "consolidation", "mass", "nodule", "pleural thickening")
        crowded = []  # what leaves no room on its side
        if pneumothorax and (lung_lesion or (item.name == "pleural effusion" and pneumothorax.severity == "large")):
            crowded.append(pneumothorax)
        hiding = ("moderate", "large") if item.name == "atelectasis" else ("large",)
        if effusion and lung_lesion and effusion.severity in hiding:
            crowded.append(effusion)
        if mass and item.name in ("nodule", "consolidation"):
            crowded.append(mass)
        for other in crowded:
            if other.side != "bilateral":
                sides = {s: p for s, p in sides.items() if s not in (other.side, "bilateral")} or sides
        if item.name == "support device" and zone == "chest tube" and pneumothorax is not None:
            sides = {pneumothorax.side: 1.0}
        side = choose(rng, list(sides), list(sides.values()))
    if effusion is not None and effusion.severity != "small" and not item.zone:
        if item.name in ("consolidation", "mass", "nodule") and side in (effusion.side, "bilateral"):
            zone = "upper"
        if item.name == "pleural thickening":
            zone = "apical"
    if item.name == "consolidation" and zone == "middle" and side != "right" and not item.zone:
        zone = "lower"  # the middle lobe is on the right
    return replace(item, side=side, severity=severity, zone=zone)
