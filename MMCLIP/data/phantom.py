"""Made-up frontal chest radiographs with findings, lesion masks, labels and reports: runs need no download.

    python -m MMCLIP.data.phantom --num 24 --size 256 --output sheet.png

A phantom is drawn in millimetres of a patient who faces the viewer: x grows to the image's right, which is the
patient's left, y grows downwards. What weakens the beam is added up over the film, and a film curve turns the sum into
grey. Edges are smoothed over one pixel, so the same patient can be drawn at any size. Findings are drawn from what they
do to the film (fluid takes the place of air, a pneumothorax takes vessels away). Anatomy, lesions and exposure have a
random stream each, so that nothing but the finding tells of the finding.
"""

import argparse
import functools
import hashlib
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .manifest import FEATURES


FINDINGS = (
    "atelectasis", "cardiomegaly", "consolidation", "edema", "emphysema", "hiatal hernia", "mass", "nodule",
    "pleural effusion", "pleural thickening", "pneumothorax", "support device",
)  # fmt: skip

_GRADES = ("mild", "moderate", "severe")
_SIZES = ("small", "moderate", "large")
# what a finding may be: severities, sides with their probabilities, zones ("" = the finding has no place to name)
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, float], tuple[str, ...]]] = {
    "atelectasis": (_GRADES, {"left": 0.38, "right": 0.34, "bilateral": 0.28}, ("lower",)),
    "cardiomegaly": (_GRADES, {"": 1.0}, ("",)),
    "consolidation": (_GRADES, {"left": 0.42, "right": 0.46, "bilateral": 0.12}, ("upper", "middle", "lower")),
    "edema": (_GRADES, {"bilateral": 1.0}, ("",)),
    "emphysema": (_GRADES, {"bilateral": 1.0}, ("",)),
    "hiatal hernia": (_SIZES, {"": 1.0}, ("retrocardiac",)),
    "mass": (_SIZES, {"left": 0.5, "right": 0.5}, ("upper", "middle", "lower")),
    "nodule": (("small", "large"), {"left": 0.42, "right": 0.42, "bilateral": 0.16}, ("upper", "middle", "lower")),
    "pleural effusion": (_SIZES, {"left": 0.36, "right": 0.36, "bilateral": 0.28}, ("",)),
    "pleural thickening": (_GRADES, {"left": 0.38, "right": 0.38, "bilateral": 0.24}, ("apical", "lateral")),
    "pneumothorax": (_SIZES, {"left": 0.5, "right": 0.5}, ("",)),
    "support device": (
        ("",),
        {},  # the side follows from the kind of device
        ("pacemaker", "endotracheal tube", "central line", "sternal wires", "nasogastric tube", "chest tube"),
    ),
}
_DEVICE_SIDES: dict[str, dict[str, float]] = {
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


@dataclass
class Phantom:
    """A radiograph `image` ((S, S) uint8) with all that is known of it.

    `masks` maps (finding, side) to (S, S) bool, True where the finding changes the film (cardiomegaly: the heart,
    emphysema: the lungs); `present` and `absent` together are FINDINGS; `report` names every present finding and some
    absent ones.
    """

    image: np.ndarray
    findings: tuple[Finding, ...]
    masks: dict[tuple[str, str], np.ndarray]
    report: str
    present: list[str]
    absent: list[str]


# --- which findings a patient has -------------------------------------------------------------------------------------

_NUM_FINDINGS = (0.25, 0.25, 0.25, 0.17, 0.08)  # probability of 0, 1, 2, 3, 4 findings
# pairs that one illness brings; the factor multiplies the second finding's weight once the first is there
_TOGETHER = {
    ("cardiomegaly", "edema"): 2.5, ("edema", "cardiomegaly"): 2.5, ("edema", "pleural effusion"): 2.0,
    ("cardiomegaly", "pleural effusion"): 1.6, ("pleural effusion", "atelectasis"): 1.6,
    ("pneumothorax", "support device"): 1.6, ("emphysema", "pneumothorax"): 1.4, ("emphysema", "cardiomegaly"): 0.4,
    ("cardiomegaly", "emphysema"): 0.4, ("edema", "emphysema"): 0.3, ("emphysema", "edema"): 0.3,
}  # fmt: skip


def _choose(rng: np.random.Generator, options: Sequence, weights: Sequence[float] | None = None):
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]


def _draw_findings(rng: np.random.Generator) -> list[Finding]:
    weights = dict.fromkeys(FINDINGS, 1.0) | {"hiatal hernia": 0.85, "pleural effusion": 1.25, "support device": 1.2}
    findings: list[Finding] = []
    for _ in range(_choose(rng, range(5), _NUM_FINDINGS)):
        name = _choose(rng, list(weights), list(weights.values()))
        del weights[name]
        for (first, second), factor in _TOGETHER.items():
            if first == name and second in weights:
                weights[second] *= factor
        findings.append(Finding(name))
    return findings


def _fill_in(findings: Sequence[Finding | str], rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw what the findings leave open, so that none hides another; raises ValueError for what no finding has."""
    given = [Finding(item) if isinstance(item, str) else item for item in findings]
    for item in given:
        if item.name not in FINDINGS:
            raise ValueError(f"Finding {item.name!r} cannot be drawn. Choose from {', '.join(FINDINGS)}.")
        severities, sides, zones = _KINDS[item.name]
        if item.name == "support device":
            sides = {side: 1.0 for kind in zones for side in _DEVICE_SIDES[kind] if item.zone in ("", kind)}
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
    severity = item.severity or _choose(rng, severities)
    zone = item.zone or _choose(rng, zones)
    if item.name == "support device":
        sides = _DEVICE_SIDES[zone]
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
        side = _choose(rng, list(sides), list(sides.values()))
    if effusion is not None and effusion.severity != "small" and not item.zone:
        if item.name in ("consolidation", "mass", "nodule") and side in (effusion.side, "bilateral"):
            zone = "upper"
        if item.name == "pleural thickening":
            zone = "apical"
    if item.name == "consolidation" and zone == "middle" and side != "right" and not item.zone:
        zone = "lower"  # the middle lobe is on the right
    return replace(item, side=side, severity=severity, zone=zone)


# --- the chest --------------------------------------------------------------------------------------------------------

_FIELD = 360.0  # side of the film in mm
_MARGIN, _STEP = 60.0, 0.5  # tables of contours reach this far beyond the film, with one entry every half millimetre
_TABLE = np.arange(-_MARGIN, _FIELD + _MARGIN, _STEP, dtype=np.float32)  # y of the entries; x is this minus _FIELD / 2
_TABLE_X = _TABLE - _FIELD / 2


def _edge(depth: np.ndarray, blur: float) -> np.ndarray:
    """0 outside, 1 inside, a ramp of `blur` mm around the border; `depth` is the distance inwards in mm."""
    return np.minimum(np.maximum(depth * (1.0 / blur) + 0.5, 0.0), 1.0)


def _curve(ys: Sequence[float], xs: Sequence[float], smooth: float = 12.0) -> np.ndarray:
    """A contour table through points, rounded over `smooth` mm."""
    table = np.interp(_TABLE, ys, xs)
    window = max(int(smooth / _STEP) | 1, 3)
    return ndimage.uniform_filter1d(ndimage.uniform_filter1d(table, window), window).astype(np.float32)


class _Film:
    """The pixels of a film in patient coordinates, and how to look up tables and to draw lines on it."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size = size
        self.pixel = _FIELD / size  # mm
        self.zoom = rng.uniform(0.96, 1.05)
        self.angle = float(np.deg2rad(np.clip(rng.normal(0, 1.5), -4, 4)))
        self.shift = rng.uniform(-7, 7, size=2)
        ticks = ((np.arange(size, dtype=np.float32) + 0.5) * self.pixel - _FIELD / 2) / self.zoom
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        tx, ty = ticks[None, :] - np.float32(self.shift[0]), ticks[:, None] - np.float32(self.shift[1])
        self.x = cos * tx + sin * ty  # (S, S) mm from the midline
        self.y = cos * ty - sin * tx + np.float32(_FIELD / 2)  # (S, S) mm from the top
        self.row, self.column = self.index(self.x, self.y)
        self.scale = max(1, min(4, round(400 / size)))  # lines are drawn this much finer, then averaged

    @staticmethod
    def index(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = len(_TABLE) - 1
        row = np.clip((y + _MARGIN) * (1 / _STEP), 0, last).astype(np.int32)
        column = np.clip((x + (_FIELD / 2 + _MARGIN)) * (1 / _STEP), 0, last).astype(np.int32)
        return row, column

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Patient points (..., 2) in mm to positions on the fine canvas."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        placed = (points - (0, _FIELD / 2)) @ np.array([[cos, sin], [-sin, cos]]) + self.shift
        return (placed * self.zoom + _FIELD / 2) * (self.scale / self.pixel)

    def draw(self, lines: Sequence[tuple[np.ndarray, float, float]]) -> np.ndarray:
        """(S, S) float in [0, 1] with polylines (points (n, 2) in mm, width in mm, strength in [0, 1])."""
        canvas = Image.new("L", (self.size * self.scale,) * 2)
        draw = ImageDraw.Draw(canvas)
        per_mm = self.scale / self.pixel * self.zoom
        placed = self.to_pixels(np.concatenate([points for points, _, _ in lines])).ravel().tolist()
        start = 0
        for points, width, strength in lines:
            stop = start + 2 * len(points)
            pixels = width * per_mm
            strength *= min(1.0, pixels)  # thinner than a fine pixel: paler instead
            draw.line(
                placed[start:stop],
                fill=int(255 * strength),
                width=max(1, int(pixels + 0.5)),
                joint="curve" if pixels > 4 else None,
            )
            start = stop
        if self.scale > 1:
            canvas = canvas.reduce(self.scale)
        return np.asarray(canvas, dtype=np.float32) * np.float32(1 / 255)

    def cloud(self, rng: np.random.Generator, cell: float, octaves: int = 3) -> np.ndarray:
        """(S, S) smooth random field, mean 0, deviation about 1, with lumps of `cell` mm and finer ones."""
        total = np.zeros((self.size, self.size), dtype=np.float32)
        for octave in range(octaves):
            count = int(_FIELD / cell * 2**octave) + 2
            grid = rng.standard_normal((count, count), dtype=np.float32)
            resized = Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC)
            total += np.asarray(resized) * np.float32(0.6**octave * 1.25)
        return total


class _Chest:
    """One patient on one film: the constructor chooses the anatomy, methods put findings in, `expose` takes the image.

    `anatomy`, `lesions` and `exposure` are the streams that shape, findings and film are drawn from.
    """

    def __init__(
        self,
        size: int,
        findings: Sequence[Finding],
        anatomy: np.random.Generator,
        lesions: np.random.Generator,
        exposure: np.random.Generator,
    ):
        self.rng, self.lesions, self.exposure = anatomy, lesions, exposure
        self.film = _Film(size, anatomy)
        self.pixel = self.film.pixel
        self.findings = {item.name: item for item in findings}
        self.masks: dict[tuple[str, str], np.ndarray] = {}
        self._choose_shape()
        self._build_lungs()

    # ---- anatomy

    def _choose_shape(self) -> None:
        rng, found = self.rng, self.findings
        uniform = rng.uniform
        self.half_width = uniform(116, 136)  # of the inner thorax at its widest
        self.wall = float(np.clip(rng.gamma(3.0, 7.0), 8, 42))  # mm of soft tissue over the ribs
        self.apex = uniform(36, 50)
        inspiration = uniform(184, 216)  # apex to right dome
        left_lower = uniform(3, 13)
        self.recess = uniform(26, 38)  # dome to costophrenic angle
        self.turn = float(np.clip(rng.normal(0, 4), -9, 9))  # rotated patient: the mediastinum leaves the midline
        ratio = uniform(0.40, 0.475)
        self.heart_tilt = uniform(0.64, 0.71)  # share of the heart's width left of the midline
        domes = {"right": 0.0, "left": left_lower}
        unwell = self.lesions.uniform
        if "emphysema" in found:
            grade = _GRADES.index(found["emphysema"].severity)
            inspiration = unwell(218, 226) + 7 * grade
            self.recess = unwell(12, 15) - 2 * grade
            ratio = unwell(0.35, 0.41)
            self.half_width = min(self.half_width + 4 + 2 * grade, 142)
        if "cardiomegaly" in found:
            low = (0.54, 0.59, 0.65)[_GRADES.index(found["cardiomegaly"].severity)]
            ratio = unwell(low, low + 0.05)
        if "atelectasis" in found and found["atelectasis"].severity != "mild":
            lift = unwell(10, 16) if found["atelectasis"].severity == "moderate" else unwell(18, 28)
            for side in self.sides("atelectasis"):
                domes[side] -= lift
            if found["atelectasis"].severity == "severe" and found["atelectasis"].side != "bilateral":
                self.turn += 9 if found["atelectasis"].side == "left" else -9
        if "pneumothorax" in found and found["pneumothorax"].severity == "large":
            self.turn += unwell(6, 16) * (-1 if found["pneumothorax"].side == "left" else 1)
        if "pleural effusion" in found and found["pleural effusion"].severity == "large":
            self.turn += {"left": -7, "right": 7, "bilateral": 0}[found["pleural effusion"].side]
        self.ratio = ratio
        self.dome = {side: self.apex + inspiration + extra for side, extra in domes.items()}
        self.base = self.apex + inspiration + self.recess  # y of the deepest angle, for scale
        self.hilum = {"right": (self.turn - 36, self.level(0.44)), "left": (self.turn + 37, self.level(0.41))}

    def level(self, fraction: float) -> float:
        """y at this fraction of the way from the apex to the right dome."""
        return self.apex + fraction * (self.dome["right"] - self.apex)

    def sides(self, name: str) -> tuple[str, ...]:
        side = self.findings[name].side
        return ("right", "left") if side == "bilateral" else (side,)

    def _build_lungs(self) -> None:
        film, pixel = self.film, self.pixel
        blur = max(1.3, pixel)
        fall = np.clip((_TABLE - self.apex) / (0.80 * (self.base - self.apex)), 0, 1)
        top = 0.36 * self.half_width
        self.outer = (top + (self.half_width - top) * np.sqrt(1 - (1 - fall) ** 2) ** 1.08).astype(np.float32)
        self.outer[_TABLE < self.apex] = -20
        self.outer = ndimage.uniform_filter1d(self.outer, 9)
        slope = np.gradient(self.outer, _STEP)
        self.lean = (1 / np.sqrt(1 + np.minimum(slope, 6) ** 2)).astype(np.float32)  # horizontal to true distance
        # inner border of the air, behind the mediastinum
        rise = np.clip((_TABLE - self.apex) / 46, 0, 1)
        self.inner = (top - (top - 9) * np.sqrt(1 - (1 - rise) ** 2)).astype(np.float32)
        self.diaphragm = self._diaphragm_table()
        self.right = film.x < 0
        self.ax = np.abs(film.x)
        self.outer_map = self.outer[film.row]
        self.depth_lateral = (self.outer_map - self.ax) * self.lean[film.row]
        self.depth_below = self.diaphragm[film.column] - film.y
        depth_inner = self.ax - self.inner[film.row]
        self.depth = np.minimum(np.minimum(self.depth_lateral, self.depth_below), depth_inner)
        self.lung = _edge(self.depth, blur)  # (S, S) where air is, behind the heart too
        self._build_heart(blur)
        # vessels and bronchi end where the lung ends
        self.field = self.lung * (1 - self.heart)
        thickness = 0.70 + 0.30 * (1 - np.exp(np.minimum(-self.depth_lateral, 0) * (1 / 20)))
        apical = np.clip((film.y - self.apex) * (1 / 70), 0, 1)
        self.air = self.lung * thickness * (0.82 + 0.18 * apical)
        self.opacity = np.zeros_like(self.air)  # share of the air that something else has taken
        self.extra = np.zeros_like(self.air)  # beam lost to what is added on top: metal, walls, lines
        self.vessel_gain = np.ones_like(self.air)

    def _diaphragm_table(self) -> np.ndarray:
        table = np.empty_like(_TABLE_X)
        for side, sign in (("right", -1), ("left", 1)):
            across = sign * _TABLE_X / self.half_width
            peak = 0.46 if side == "right" else 0.50
            lateral = np.clip((across - peak) / (1.0 - peak), 0, 1.6)
            medial = np.clip((peak - across) / peak, 0, 1.0)
            y = self.dome[side] + self.recess * lateral**2.1 + 9 * medial**2
            table = np.where(sign * _TABLE_X >= 0, y, table)
        return ndimage.uniform_filter1d(table, 25).astype(np.float32)

    def _build_heart(self, blur: float) -> None:
        film, level = self.film, self.level
        width = self.ratio * 2 * self.half_width
        left, right = self.heart_tilt * width, (1 - self.heart_tilt) * width
        knob = self.rng.uniform(29, 36)
        bottom = max(self.dome.values()) + 12
        self.left_border = _curve(
            [0, level(0.1), level(0.20), level(0.25), level(0.30), level(0.345), level(0.40), level(0.46),
             level(0.56), level(0.70), level(0.83), level(0.93), level(1.02), bottom + 10],
            [19, 20, 24, knob, knob, 26, 32, 36, 0.55 * left + 12, 0.86 * left, 1.02 * left, left, 0.88 * left,
             0.4 * left],
            smooth=9,
        )  # fmt: skip
        self.right_border = _curve(
            [0, level(0.1), level(0.25), level(0.45), level(0.56), level(0.70), level(0.84), level(0.97), bottom + 10],
            [17, 21, 24, 25, 0.5 * right + 14, 0.96 * right, 1.02 * right, 0.92 * right, 0.6 * right],
            smooth=10,
        )
        self.heart_left, self.heart_right = self.left_border + self.turn, self.right_border - self.turn
        depth = np.minimum(self.heart_left[film.row] - film.x, self.heart_right[film.row] + film.x)
        self.heart_depth = depth
        self.heart = _edge(depth, blur * 1.6)

    def opacify(self, name: str, side: str, amount: np.ndarray, threshold: float = 0.22) -> None:
        """Let `amount` (S, S) in [0, 1] of the air be replaced, and mark where that shows as the finding's mask."""
        self.opacity = 1 - (1 - self.opacity) * (1 - amount)
        self.mark(name, side, amount * self.lung, threshold)

    def mark(self, name: str, side: str, change: np.ndarray, threshold: float) -> None:
        mask = change > min(threshold, 0.6 * float(change.max()))
        key = (name, side)
        self.masks[key] = self.masks[key] | mask if key in self.masks else mask

    def side_map(self, side: str) -> np.ndarray:
        return self.right if side == "right" else ~self.right

    # ---- findings

    def add_findings(self) -> None:
        # lung first, pleura and devices last, as they lie on top
        order = (
            "emphysema", "edema", "consolidation", "atelectasis", "mass", "nodule", "pneumothorax", "pleural effusion",
            "pleural thickening", "cardiomegaly", "hiatal hernia", "support device",
        )  # fmt: skip
        for name in order:
            if name in self.findings:
                getattr(self, "_add_" + name.replace(" ", "_"))(self.findings[name])

    def _add_cardiomegaly(self, finding: Finding) -> None:
        silhouette = self.heart * _edge(self.film.y - self.level(0.46), 4) * _edge(self.depth_below + 6, 4)
        self.mark("cardiomegaly", "", silhouette, 0.5)

    def _add_emphysema(self, finding: Finding) -> None:
        grade = _GRADES.index(finding.severity)
        patch = np.clip(0.5 + 0.35 * self.film.cloud(self.lesions, 60, 2), 0, 1)
        self.air = self.air * (1.10 + 0.06 * grade + 0.10 * patch)
        self.vessel_gain = self.vessel_gain * (1 - (0.25 + 0.15 * grade) * (0.5 + patch))
        self.mark("emphysema", "bilateral", self.field, 0.5)
        for _ in range((0, 1, 3)[grade]):  # bullae: thin-walled air in the upper zones
            side = _choose(self.lesions, ("left", "right"))
            radius = self.lesions.uniform(13, 24)
            x, y = self.place(side, radius, 0.05, 0.35)
            inside = radius - np.hypot(self.film.x - x, self.film.y - y)
            disc = _edge(inside, 2) * self.lung
            self.air = self.air * (1 + 0.12 * disc)
            self.vessel_gain = self.vessel_gain * (1 - disc)
            self.extra += 0.06 * np.exp(-((inside / max(1.0, 0.5 * self.pixel)) ** 2)) * self.lung

    def _add_edema(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        grade = _GRADES.index(finding.severity)
        cloud = film.cloud(rng, 26)
        amount = np.zeros_like(self.air)
        for _side, (hx, hy) in self.hilum.items():
            sign = 1 if hx > 0 else -1
            reach_x, reach_y = 46 + 12 * grade, 56 + 16 * grade
            distance = ((film.x - hx - sign * 12) / reach_x) ** 2 + ((film.y - hy - 20) / reach_y) ** 2
            amount = np.maximum(amount, np.exp(-distance))
        amount = amount * np.clip(1 + 0.28 * cloud, 0.3, 1.5) * (0.38, 0.55, 0.78)[grade]
        lines = []  # Kerley B: short, horizontal, at the lateral bases
        for side in ("right", "left"):
            sign = 1 if side == "left" else -1
            for y in np.arange(self.dome[side] - 62, self.dome[side] + 10, rng.uniform(6, 8)):
                edge = float(np.interp(y, _TABLE, self.outer))
                length = rng.uniform(12, 22)
                start = edge - rng.uniform(1, 3)
                lines.append((np.array([[sign * start, y], [sign * (start - length), y + rng.uniform(-2, 2)]]), 1.3, 1))
        kerley = film.draw(lines) * self.lung
        self.extra += 0.10 * kerley
        upper = np.clip((self.level(0.48) - film.y) / 20, 0, 1)
        self.vessel_gain = self.vessel_gain * (1 + (0.5 + 0.3 * grade) * upper)
        self.opacify("edema", "bilateral", np.clip(amount, 0, 0.9) * (1 - 0.5 * self.heart), 0.18)
        self.mark("edema", "bilateral", ndimage.maximum_filter(kerley, 3), 0.35)

    def lobe(self, side: str, zone: str) -> np.ndarray:
        """Soft (S, S) map of where a lobe is seen: fissures bound it."""
        film, level = self.film, self.level
        sign = 1 if side == "left" else -1
        across = sign * film.x / self.half_width
        minor = film.y - (level(0.50) + 6 * across)  # the minor fissure, nearly level
        if zone == "upper":
            part = _edge(-minor, 3.0) if side == "right" else _edge(-minor - 4, 14.0)
        elif zone == "middle":
            part = _edge(minor, 3.0) * _edge(level(0.92) - film.y + 10 * (1 - across), 16.0) * _edge(0.80 - across, 0.2)
        else:
            part = _edge(film.y - level(0.62), 26.0)
        return part * self.side_map(side)

    def _add_consolidation(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        grade = _GRADES.index(finding.severity)
        for side in self.sides("consolidation"):
            low, high = {"upper": (0.14, 0.42), "middle": (0.56, 0.78), "lower": (0.70, 0.92)}[finding.zone]
            radius = (24, 34, 48)[grade] * rng.uniform(0.9, 1.15)
            x, y = self.place(side, 0.55 * radius, low, high)
            cloud = film.cloud(rng, 22)
            distance = np.hypot((film.x - x) / (1.1 * radius), (film.y - y) / radius)
            fluffy = np.clip((1.0 - distance + 0.22 * cloud) * 1.9, 0, 1)
            amount = fluffy * self.lobe(side, finding.zone) * (0.72 + 0.1 * grade)
            hx, hy = self.hilum[side]
            bronchi = []
            heading = np.arctan2(y - hy, x - hx)
            for turn in rng.uniform(-0.55, 0.55, size=4):
                length = np.linspace(0, 1, 6)[:, None] * (np.hypot(x - hx, y - hy) + 0.7 * radius)
                bend = heading + turn * np.linspace(0.3, 1.3, 6)
                bronchi.append((np.array([hx, hy]) + length * np.stack((np.cos(bend), np.sin(bend)), 1), 2.4, 1.0))
            amount = amount * (1 - 0.42 * film.draw(bronchi))
            self.opacify("consolidation", finding.side, np.clip(amount, 0, 0.95), 0.25)

    def _add_atelectasis(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        grade = _GRADES.index(finding.severity)
        for side in self.sides("atelectasis"):
            sign = 1 if side == "left" else -1
            inside = self.side_map(side)
            for _ in range((1, 2, 2)[grade] + int(rng.integers(2))):
                length, width = rng.uniform(34, 66), rng.uniform(2.2, 3.6) + 0.5 * grade
                x = sign * rng.uniform(0.42, 0.70) * self.half_width
                y = self.dome[side] - rng.uniform(10, 44)
                angle = rng.uniform(-0.30, 0.30)
                cos, sin = math.cos(angle), math.sin(angle)
                along = (film.x - x) * cos + (film.y - y) * sin
                across = (film.y - y) * cos - (film.x - x) * sin
                across = across + along**2 * rng.uniform(-0.002, 0.002)
                band = np.exp(-((across / width) ** 2)) * _edge(length / 2 - np.abs(along), 10) * inside
                self.opacify("atelectasis", finding.side, 0.72 * band, 0.25)
            if grade == 2:  # a collapsed lower lobe: a wedge beside the spine, its edge runs from hilum to diaphragm
                hx, hy = self.hilum[side]
                reach = rng.uniform(0.48, 0.62) * self.half_width
                border = np.abs(hx) * 0.6 + (reach - np.abs(hx) * 0.6) * (film.y - hy) / (self.dome[side] - hy)
                wedge = _edge(border - sign * film.x, 3.0) * _edge(film.y - hy, 20) * inside
                self.opacify("atelectasis", finding.side, 0.80 * wedge, 0.25)

    def place(self, side: str, radius: float, low: float, high: float) -> tuple[float, float]:
        """A point in the visible lung of `side` between two levels, where a disc of `radius` mm shows in full."""
        sign = 1 if side == "left" else -1
        border = self.heart_left if side == "left" else self.heart_right
        best, best_room = (sign * 0.6 * self.half_width, self.level(0.3)), -np.inf
        for y, share in zip(self.lesions.uniform(low, high, 8), self.lesions.random(8).tolist(), strict=True):
            y = float(self.level(y))
            at = int((y + _MARGIN) / _STEP)
            inner = float(max(border[at], self.inner[at])) + radius + 3
            outer = float(self.outer[at]) - radius - 5
            room = outer - inner
            if room > best_room:
                best, best_room = (sign * (inner + share * max(room, 0)), y), room
            if room > 8:
                break
        return best

    _ZONES = {"upper": (0.16, 0.38), "middle": (0.42, 0.62), "lower": (0.66, 0.84)}

    def _add_nodule(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        count = int(rng.integers(1, 3))
        for side in self.sides("nodule"):
            for _ in range(count):
                diameter = rng.uniform(8, 13) if finding.severity == "small" else rng.uniform(14, 20)
                x, y = self.place(side, diameter / 2, *self._ZONES[finding.zone])
                radius = np.hypot(film.x - x, film.y - y)
                ball = _edge(diameter / 2 - radius, max(1.5, self.pixel))
                dense = ball * np.sqrt(np.clip(1.15 - (radius / (0.5 * diameter)) ** 2, 0.15, 1))
                self.opacify("nodule", finding.side, 0.72 * dense, 0.25)

    def _add_mass(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        low = (30, 39, 49)[_SIZES.index(finding.severity)]
        diameter = rng.uniform(low, low + 10)
        x, y = self.place(finding.side, diameter / 2, *self._ZONES[finding.zone])
        angle = np.arctan2(film.y - y, film.x - x)
        phase, wave = rng.uniform(0, 2 * np.pi, 3).tolist(), np.zeros_like(angle)
        for lobes, p in zip((2, 3, 5), phase, strict=True):
            wave += (0.10, 0.06, 0.04)[(2, 3, 5).index(lobes)] * np.cos(lobes * angle + p)
        spicule = 0.05 * np.abs(np.sin(9 * angle + phase[0])) if rng.random() < 0.5 else 0.0
        radius = np.hypot(film.x - x, film.y - y)
        edge = 0.5 * diameter * (1 + wave + spicule)
        ball = _edge(edge - radius, 3.0) * np.sqrt(np.clip(1.3 - (radius / edge) ** 2, 0.3, 1))
        self.opacify("mass", finding.side, 0.93 * ball, 0.3)

    def _add_pneumothorax(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        side = finding.side
        hx, hy = self.hilum[side]
        size = _SIZES.index(finding.severity)
        keep = rng.uniform(*((0.90, 0.93), (0.74, 0.82), (0.42, 0.60))[size])
        # the lung shrinks towards its root; when little, from the apex only, as air rises
        anchor = (hx, (self.dome[side], self.level(0.85), hy + 12)[size])
        x, y = anchor[0] + (film.x - anchor[0]) / keep, anchor[1] + (film.y - anchor[1]) / keep
        row, column = film.index(x, y)
        lateral, below = (self.outer[row] - np.abs(x)) * self.lean[row], self.diaphragm[column] - y
        depth = (lateral + below - np.sqrt(lateral**2 + below**2 + (0, 160, 900)[size])) * keep  # rounds the corner
        collapsed = _edge(depth, max(1.3, self.pixel))
        cavity = self.lung * self.side_map(side) * (1 - self.heart)
        free = cavity * (1 - collapsed)
        self.vessel_gain = self.vessel_gain * (1 - free)
        self.opacity = self.opacity * (1 - free)
        self.extra *= 1 - free
        for mask in self.masks.values():  # what the lung has goes with the lung
            if np.any(mask & (free < 0.5)):
                mask &= free < 0.5
        self.air = self.air * (1 + 0.16 * free)
        density = (0.04, 0.14, 0.38)[size]
        self.opacity = 1 - (1 - self.opacity) * (1 - density * cavity * collapsed)
        line = np.exp(-((depth / max(1.0, 0.55 * self.pixel)) ** 2)) * cavity
        self.extra += 0.17 * line
        self.mark("pneumothorax", side, np.maximum(free, line), 0.4)

    def _add_pleural_effusion(self, finding: Finding) -> None:
        film, rng = self.film, self.lesions
        size = _SIZES.index(finding.severity)
        pneumothorax = self.findings.get("pneumothorax")
        for side in self.sides("pleural effusion"):
            height = rng.uniform(*((-14, -4), (18, 44), (66, 112))[size])  # of the level above the dome
            top = self.dome[side] - height
            rise = rng.uniform(26, 36) if size == 0 else rng.uniform(30, 46)
            if pneumothorax is not None and pneumothorax.side == side:
                surface = np.full_like(film.y, top)  # air above fluid: a straight level
                soft = max(1.5, self.pixel)
            else:
                to_wall = np.maximum(self.outer_map - self.ax, 0)
                surface = top - rise * np.exp(-to_wall * (1 / (13 if size == 0 else 20)))
                soft = 5.0
            fluid = _edge(film.y - surface, soft) * self.side_map(side)
            self.vessel_gain = self.vessel_gain * (1 - 0.9 * fluid)
            self.opacify("pleural effusion", finding.side, 0.95 * fluid, 0.35)

    def _add_pleural_thickening(self, finding: Finding) -> None:
        film, rng = self.film, self.lesions
        grade = _GRADES.index(finding.severity)
        wave = film.cloud(rng, 30, 2)
        for side in self.sides("pleural thickening"):
            thick = (5.0, 7.5, 11.0)[grade] * rng.uniform(0.9, 1.1)
            if finding.zone == "apical":
                extent = _edge(self.level(0.17 + 0.03 * grade) - film.y, 14)
                thick *= 1.5
            else:
                extent = _edge(film.y - self.level(0.32), 24) * _edge(self.level(0.84) - film.y, 24)
            band = _edge(thick * (1 + 0.22 * wave) - self.depth_lateral, max(2.0, self.pixel))
            band = band * extent * self.side_map(side) * self.lung
            self.vessel_gain = self.vessel_gain * (1 - 0.8 * band)
            self.opacify("pleural thickening", finding.side, 0.8 * band, 0.3)

    def _add_hiatal_hernia(self, finding: Finding) -> None:
        film, rng = self.film, self.lesions
        diameter = (36, 50, 66)[_SIZES.index(finding.severity)] * rng.uniform(0.93, 1.08)
        x = self.turn + rng.uniform(2, 16)
        y = self.dome["left"] - 0.36 * diameter + rng.uniform(-4, 4)
        inside = 0.5 * diameter - np.hypot((film.x - x) / 1.12, film.y - y)
        disc = _edge(inside, max(1.5, self.pixel))
        level = y - rng.uniform(-0.08, 0.12) * diameter
        gas = disc * _edge(inside - 2.5, max(1.5, self.pixel)) * _edge(level - film.y, max(1.2, self.pixel))
        self.extra += 0.13 * disc * (1 - gas) - 0.26 * gas
        self.mark("hiatal hernia", "", disc, 0.5)

    def _add_support_device(self, finding: Finding) -> None:
        film, rng = self.film, self.lesions
        sign = 1 if finding.side == "left" else -1
        lines: list[tuple[np.ndarray, float, float]] = []
        turn, level = self.turn, self.level
        block = None
        if finding.zone == "pacemaker":
            cx, cy = sign * rng.uniform(88, 100), level(0.12) + rng.uniform(0, 14)
            block = np.minimum(22 - np.abs(film.x - cx), 19 - np.abs(film.y - cy))
            round_off = 25 - np.hypot(film.x - cx, film.y - cy)
            block = _edge(np.minimum(block, round_off), max(1.3, self.pixel))
            vein = [(cx - sign * 14, cy - 16), (sign * 52, level(0.10)), (sign * 22, level(0.14))]
            vein.append((-16 + turn, level(0.30)))
            heart_left = float(np.interp(level(0.93), _TABLE, self.left_border))
            tips = [(0.72 * heart_left + turn, level(0.97)), (-30 + turn, level(0.66))]
            lower = [(-20 + turn, level(0.55)), (-18 + turn, level(0.80)), (10 + turn, level(0.93)), tips[0]]
            lines.append((_spline([*vein, *lower]), 1.7, 1.0))
            if rng.random() < 0.7:
                upper = [(-22 + turn, level(0.52)), (-16 + turn, level(0.70)), tips[1]]
                lines.append((_spline([*vein, *upper]), 1.7, 1.0))
            lines.append((np.array([tips[0], (tips[0][0] + 7, tips[0][1] + 1)]), 3.0, 1.0))
        elif finding.zone == "endotracheal tube":
            tip = level(0.29) - rng.uniform(12, 34)
            for offset in (-3.6, 3.6):
                lines.append((_spline([(offset + 1, -8), (offset, 30), (offset + 0.5 * turn, tip)]), 1.5, 0.8))
            lines.append((np.array([[-3.6 + 0.5 * turn, tip], [3.6 + 0.5 * turn, tip - 3]]), 1.5, 0.8))
        elif finding.zone == "central line":
            end = (-18 + turn, level(rng.uniform(0.42, 0.58)))
            if rng.random() < 0.5:  # jugular
                start = [(sign * 36, -6), (sign * 30, 26), (sign * 22, level(0.10))]
            else:
                start = [(sign * 128, level(0.20)), (sign * 92, level(0.10)), (sign * 50, level(0.07))]
                start.append((sign * 22, level(0.13)))
            if finding.side == "left":
                start.append((2 + turn, level(0.24)))
            lines.append((_spline([*start, (-17 + turn, level(0.32)), end]), 2.2, 0.9))
        elif finding.zone == "sternal wires":
            for y in np.linspace(level(0.22), level(0.92), 6):
                loop = np.linspace(0, 2 * np.pi, 14)
                wide, tall = rng.uniform(7, 10), rng.uniform(3.5, 5.5)
                ring = np.stack((0.7 * turn + wide * np.cos(loop), y + tall * np.sin(loop) + 2 * np.cos(loop)), 1)
                lines.append((ring, 1.3, 1.0))
                knot = np.array([ring[3], ring[3] + rng.uniform(-4, 4, 2)])
                lines.append((knot, 1.8, 1.0))
        elif finding.zone == "nasogastric tube":
            path = [(1, -8), (2, level(0.2)), (6 + turn, level(0.6)), (14 + turn, level(0.95))]
            path += [(36, self.dome["left"] + 26), (66, self.dome["left"] + 46)]
            lines.append((_spline(path), 2.4, 0.85))
        else:  # chest tube
            edge = float(np.interp(level(0.70), _TABLE, self.outer))
            path = [(sign * (edge + 40), level(0.86)), (sign * (edge - 2), level(0.72))]
            path += [(sign * 0.8 * edge, level(0.45)), (sign * 0.50 * self.half_width, level(0.14))]
            tube = _spline(path)
            lines.append((tube + [2.4, 0], 1.6, 0.9))
            lines.append((tube - [2.4, 0], 1.6, 0.9))
        metal = film.draw(lines)
        if block is not None:
            metal = np.maximum(metal, block)
        self.extra += 0.55 * metal
        self.mark("support device", finding.side, ndimage.maximum_filter(metal, 3), 0.3)

    # ---- film

    def _vessels(self) -> np.ndarray:
        """(S, S) branching vessels of both lungs, thick at the hilum."""
        rng = self.rng
        lines = []
        count, steps = 13, 9
        for side, sign in (("right", -1), ("left", 1)):
            heading = np.linspace(-1.35, 1.40, count) + rng.uniform(-0.12, 0.12, count)  # 0 = lateral, + = down
            bend = np.cumsum(rng.normal(0, 0.15, (count, steps)), axis=1) + heading[:, None]
            stride = rng.uniform(8, 12.5, (count, 1))
            trunk = np.stack((sign * np.cos(bend), np.sin(bend)), -1) * stride[..., None]
            trunk = np.cumsum(trunk, axis=1) + self.hilum[side] + rng.normal(0, 4, (count, 1, 2))
            fork = rng.integers(1, steps - 4, count * 2)
            parent = np.repeat(np.arange(count), 2)
            away = np.where(np.arange(count * 2) % 2, 1, -1) * rng.uniform(0.35, 0.75, count * 2)
            turn = bend[parent, fork] + away
            course = np.cumsum(rng.normal(0, 0.12, (count * 2, 6)), axis=1) + turn[:, None]
            branch = np.stack((sign * np.cos(course), np.sin(course)), -1) * rng.uniform(6, 10, (count * 2, 1, 1))
            branch = np.cumsum(branch, axis=1) + trunk[parent, fork][:, None]
            start = trunk[parent, fork][:, None]
            branch = np.concatenate((start, branch), axis=1)
            width = rng.uniform(2.4, 4.2, count)
            for k in range(count):
                lines.append((branch[2 * k], 0.34 * width[k], 0.5))
                lines.append((branch[2 * k + 1], 0.30 * width[k], 0.5))
                lines.append((trunk[k, 5:], 0.42 * width[k], 0.55))
                lines.append((trunk[k, 2:6], 0.68 * width[k], 0.75))
                lines.append((trunk[k, :3], width[k], 0.95))
        return self.film.draw(lines)

    def _ribs(self) -> np.ndarray:
        film, rng = self.film, self.rng
        pitch = (self.base - self.apex) / rng.uniform(9.2, 10.0)
        across = self.ax / np.maximum(self.outer_map, 40)
        half = rng.uniform(3.6, 4.8)
        offset = np.arange(0, pitch, 0.25)
        distance = np.abs(offset - pitch / 2)
        profile = _edge(half - distance, 2.0) * 0.75 + 0.55 * np.exp(-(((distance - half + 0.8) / 1.1) ** 2))
        lookup = np.tile(profile.astype(np.float32), 16)
        per_row = len(lookup) / 16 / pitch

        def band(curve: np.ndarray, start: float) -> np.ndarray:
            at = (film.y - curve - start + 4 * pitch) * per_row
            return lookup[np.clip(at, 0, len(lookup) - 1).astype(np.int32)]

        inside = _edge(1.01 - across, 0.03)
        square, short = across * across, np.minimum(across, 1)
        back = 20 * across * np.sqrt(across) + 30 * square * square * square * across - 36 * short * (1 - short)
        posterior = band(back, self.apex) * _edge(across - 0.12, 0.1) * inside
        front = 50 + 60 * (1 - short) - 10 * (1 - short) * (1 - short)
        anterior = band(front, self.apex) * np.clip((across - 0.42) * 4, 0, 1) * inside
        below = np.clip(1 + self.depth_below * (1 / 60), 0, 1)  # lost in the abdomen
        upper = _edge(film.y - self.apex - 5, 8)
        return (posterior + 0.5 * anterior * _edge(film.y - self.level(0.16), 20)) * below * upper

    def _bones(self) -> np.ndarray:
        film, rng = self.film, self.rng
        # spine: bodies with denser end plates, seen through the mediastinum
        period = rng.uniform(21, 25)
        phase = np.abs(((_TABLE + rng.uniform(0, period)) % period) / period - 0.5)
        bodies = (0.75 + 0.5 * np.exp(-(((phase - 0.40) / 0.05) ** 2)) - 0.5 * (phase > 0.45)).astype(np.float32)
        spine = _edge(15 - np.abs(film.x - 0.2 * self.turn), 7.0) * bodies[film.row] * 0.09
        bones = 0.13 * self._ribs() + spine
        drop = rng.uniform(-4, 6)
        for sign in (-1, 1):  # clavicles: S-shaped, the medial end beside the manubrium
            start = 14 + sign * self.turn * 0.8
            along = np.clip((sign * _TABLE_X - start) / 128, 0, 1.2)
            course = self.apex + 26 + drop - 34 * along**1.1 + 7 * np.sin(2.2 * np.pi * along)
            half = (5.0 - 1.6 * np.sin(np.pi * np.clip(along, 0, 1))).astype(np.float32)
            gap = np.abs(film.y - course.astype(np.float32)[film.column])
            inside = half[film.column] - gap
            bar = _edge(inside, max(1.2, self.pixel)) * (0.7 + 0.5 * np.maximum(1 - 0.5 * np.abs(inside - 1), 0))
            bones = bones + 0.17 * bar * _edge(sign * film.x - start, 3.0)
        # scapulae: the blade lies beside or over the upper lateral lung
        blade = self.half_width * rng.uniform(0.86, 1.02)
        slope = _curve([30, self.level(0.1), self.level(0.52), self.level(0.66)], [40, 6, 9, 70])
        fade = _curve([self.level(0.30), self.level(0.66)], [1, 0.15])
        inside = self.ax - (blade + slope[film.row])
        border = np.maximum(1 - np.abs(inside - 1) * 0.25, 0)  # its medial edge is the densest
        bones = bones + _edge(inside, 2.5) * (0.05 + 0.08 * border) * fade[film.row]
        return bones

    def _soft_tissue(self) -> tuple[np.ndarray, np.ndarray]:
        """What muscle, fat and breasts take of the beam, and the patient's outline."""
        film, rng = self.film, self.rng
        chest = self.half_width + 7 + self.wall
        shoulder = self.apex - 8
        outline = _curve(
            [-60, shoulder - 22, shoulder, shoulder + 18, self.level(0.32), self.level(0.5), self.level(0.62), 420],
            [50, 56, 96, 190, 196, chest + 14, chest, chest + 8],
            smooth=20,
        )
        depth = outline[film.row] - self.ax
        body = _edge(depth, max(2.0, self.pixel))
        tissue = body * (0.52 + 0.0022 * self.wall + 0.13 * (1 - np.exp(np.minimum(-depth, 0) * (1 / 30))))
        if rng.random() < 0.45:  # breasts: their lower edge crosses the lung bases
            cy, reach = self.level(rng.uniform(0.70, 0.82)), rng.uniform(44, 60)
            for sign in (-1, 1):
                cx = sign * self.half_width * rng.uniform(0.60, 0.70)
                down = np.maximum(film.y - cy, 0.45 * (cy - film.y))  # round below, fading upwards
                r = np.sqrt((film.x - cx) ** 2 * (0.75 / reach**2) + down**2 * (1 / reach**2))
                tissue = tissue + body * 0.15 * _edge(0.93 - r, 0.16) * (0.55 + 0.45 * r)
        return tissue, body

    def _abdomen(self) -> np.ndarray:
        """Liver and stomach: what lies below the diaphragm; the gastric bubble is dark with a level when upright."""
        film, rng = self.film, self.rng
        below = _edge(-self.depth_below, max(1.5, self.pixel))
        mass = 0.13 * below * np.clip(1 - self.ax * (1 / 230), 0, 1)
        x, top = rng.uniform(44, 66), self.dome["left"] + rng.uniform(9, 14)
        wide, tall = rng.uniform(18, 34), rng.uniform(9, 18)
        inside = 1 - np.hypot((film.x - x) / wide, (film.y - top - tall) / tall)
        bubble = np.clip(inside * 6, 0, 1) * _edge(top + tall * rng.uniform(0.9, 1.7) - film.y, 2.0) * below
        return mass - rng.uniform(0.12, 0.34) * bubble

    def _airway(self) -> np.ndarray:
        film, level = self.film, self.level
        carina = level(0.335)
        middle = 0.6 * self.turn
        (right_x, right_y), (left_x, left_y) = self.hilum["right"], self.hilum["left"]
        trachea = _edge(8.0 - np.abs(film.x - middle), 3.0) * _edge(carina - film.y, 6.0)
        bronchi = self.film.draw(
            [
                (np.array([(middle, carina - 4), (middle - 17, carina + 15), (right_x + 4, right_y + 8)]), 8.5, 1.0),
                (np.array([(middle, carina - 4), (middle + 20, carina + 13), (left_x - 2, left_y + 10)]), 7.5, 1.0),
            ]
        )
        return np.maximum(trachea, 0.8 * bronchi)

    def expose(self) -> np.ndarray:
        """(S, S) uint8 film: dense is white."""
        film, film_rng = self.film, self.exposure
        vessels = self._vessels()
        hila = np.zeros_like(self.air)
        for hx, hy in self.hilum.values():
            hila += np.exp((film.x - hx) ** 2 * (-1 / 121) - (film.y - hy) ** 2 * (1 / 361))
        air = self.air * (1 - 0.86 * self.heart)
        marks = (0.16 * vessels + 0.17 * hila * np.minimum(self.vessel_gain, 1)) * self.vessel_gain
        tissue, body = self._soft_tissue()
        beam = tissue + self._abdomen() + self._bones() * body
        beam = beam - 0.50 * air * (1 - self.opacity)
        beam += marks * self.lung * (1 - 0.8 * self.heart) * (1 - 0.6 * self.opacity)
        thick = 0.8 + 0.4 * np.clip(self.heart_depth * (1 / 40), 0, 1)
        beam += 0.13 * self.heart * thick * _edge(self.depth_below + 12, 24)
        beam -= 0.19 * self._airway()
        beam += self.extra
        beam += 0.012 * film.cloud(self.rng, 10, 1) * self.lung
        exposure, contrast = film_rng.uniform(0.40, 0.52), film_rng.uniform(1.8, 2.6)
        clear = float(np.tanh(-contrast * exposure))  # the film beside the patient
        grey = (np.tanh(contrast * (beam - exposure)) - clear) / (1.0 - clear)
        grey += film_rng.uniform(0.006, 0.022) * film_rng.standard_normal(grey.shape, dtype=np.float32)
        image = np.clip(grey * 255, 0, 255).astype(np.uint8)
        return self._side_marker(image) if self.rng.random() < 0.5 else image

    def _side_marker(self, image: np.ndarray) -> np.ndarray:
        """A lead letter at a shoulder; it says which side, so it stands on the true one."""
        left = self.rng.random() < 0.5
        size = self.film.size
        canvas = Image.fromarray(image)
        at = (size * (0.90 if left else 0.06), size * 0.05)
        ImageDraw.Draw(canvas).text(at, "L" if left else "R", fill=245, font=_font(max(6, size * 0.06)))
        return np.array(canvas)


@functools.lru_cache(maxsize=8)
def _font(size: float):
    return ImageFont.load_default(size)


def _spline(points: Sequence[tuple[float, float]], count: int = 24) -> np.ndarray:
    """(count, 2) points of a smooth curve through `points` (Catmull-Rom)."""
    p = np.asarray(points, dtype=np.float64)
    p = np.concatenate((2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]))
    at = np.linspace(0, len(points) - 1 - 1e-6, count)
    k = at.astype(int)
    t = (at - k)[:, None]
    a, b, c, d = p[k], p[k + 1], p[k + 2], p[k + 3]
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


# --- reports ----------------------------------------------------------------------------------------------------------

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
        template = _choose(rng, _DEVICE_SENTENCES[finding.zone])
    else:
        template = _choose(rng, _SENTENCES[finding.name][1 if both else 0])
    places = (_BOTH_PLACES if both else _PLACES).get(finding.zone, ("",))
    place = _choose(rng, places).format(side=finding.side)
    severity = _choose(rng, _SEVERITY_WORDS[finding.severity])
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
    normal = [_choose(rng, texts) for texts in allowed if rng.random() < 0.45]
    if not present and rng.random() < 0.7:
        normal.append(_choose(rng, _ALL_NORMAL))
    denials = []
    rest = list(rng.permutation(absent))[: int(rng.integers(2, 8))]
    while rest:
        count = min(int(rng.integers(1, 4)), len(rest))
        words = [_choose(rng, _ABSENT_WORDS[str(name)]) for name in rest[:count]]
        rest = rest[count:]
        listed = words[0] if count == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"
        denials.append(_choose(rng, _DENIALS).format(listed))
    room = 7 - len(told)
    others = [str(text) for text in rng.permutation(normal + denials)][:room]
    while len(told) + len(others) < 3:
        others.append(_choose(rng, [texts[0] for texts in allowed if not set(texts) & set(others)]))
    sentences = told + others
    if rng.random() < 0.6:  # abnormal first, as most radiologists do; else as the eye wandered
        return " ".join([*(str(t) for t in rng.permutation(told)), *others])
    return " ".join(str(text) for text in rng.permutation(sentences))


# --- phantoms and data sets -------------------------------------------------------------------------------------------


def make_phantom(seed: int, index: int, size: int = 128, findings: Sequence[Finding | str] | None = None) -> Phantom:
    """Draw phantom number `index` of stream `seed`, `size` pixels a side; the same arguments give the same bytes.

    `findings` forces what is drawn (names, or `Finding`s whose open fields are drawn at random); () is a normal chest.
    Another `size` shows the same patient. Raises ValueError for a negative seed or index, a size below 16, a finding
    that cannot be drawn.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, got seed={seed}, index={index}.")
    if size < 16:
        raise ValueError(f"A phantom of {size} px shows nothing; take a size of at least 16.")
    choice, anatomy, lesions, exposure, words = (np.random.default_rng([seed, index, stream]) for stream in range(5))
    drawn = _draw_findings(choice)
    complete = _fill_in(drawn if findings is None else findings, choice)
    chest = _Chest(size, complete, anatomy, lesions, exposure)
    chest.add_findings()
    image = chest.expose()
    present = sorted(item.name for item in complete)
    absent = [name for name in FINDINGS if name not in present]
    return Phantom(image, complete, chest.masks, write_report(complete, words), present, absent)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def phantom_row(index: int, *, size: int = 128, seed: int = 0, split: str = "train", has_report: bool = True) -> dict:
    """Row number `index` of `phantom_dataset` with these arguments, drawn now."""
    stream = zlib.crc32(split.encode()) << 32  # splits draw from far-apart indices of one seed
    phantom = make_phantom(seed, stream + index, size)
    name = phantom_name(index, seed=seed, split=split)
    return {
        "row_id": name,
        "image": {"path": None, "bytes": _png(phantom.image)},
        "report": phantom.report if has_report else None,
        "present": phantom.present,
        "absent": phantom.absent,
        "uncertain": [],
        "patient_id": name,
        "study_id": "",
        "view": "PA",
        "split": split,
        "source": "phantom",
        "masks": [
            {"finding": finding, "side": side, "png": _png(mask)} for (finding, side), mask in phantom.masks.items()
        ],
        "boxes": [],
    }


def phantom_name(index: int, *, seed: int, split: str) -> str:
    """`row_id` and `patient_id` of that row."""
    return f"phantom-{seed}-{split}-{index:06d}"


def _rows(chunks: list[tuple[int, int]], size: int, seed: int, split: str, num_paired: int, code: str):
    for start, stop in chunks:
        for index in range(start, stop):
            yield phantom_row(index, size=size, seed=seed, split=split, has_report=index < num_paired)


def phantom_dataset(
    num_images: int,
    *,
    size: int = 128,
    seed: int = 0,
    split: str = "train",
    num_unpaired: int = 0,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Manifest rows of `num_images` phantoms, each a patient of its own; the last `num_unpaired` have no report.

    All rows have complete labels. Splits of one seed are disjoint; the first rows do not depend on how many follow.
    `datasets` caches the result under these arguments and this file's content. `num_proc` processes draw.
    Raises ValueError when `num_images` is below 1 or `num_unpaired` not in [0, num_images].
    """
    if num_images < 1 or not 0 <= num_unpaired <= num_images:
        raise ValueError(
            f"num_images must be at least 1 and num_unpaired in [0, num_images], "
            f"got num_images={num_images}, num_unpaired={num_unpaired}."
        )
    chunks = [(start, min(start + 100, num_images)) for start in range(0, num_images, 100)]
    return datasets.Dataset.from_generator(
        _rows,
        features=FEATURES,
        gen_kwargs={
            "chunks": chunks,
            "size": size,
            "seed": seed,
            "split": split,
            "num_paired": num_images - num_unpaired,
            "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        },
        num_proc=min(num_proc, len(chunks)) if num_proc else None,
    )


def contact_sheet(phantoms: Sequence[Phantom], path: str | Path, columns: int = 6, outline_masks: bool = False) -> None:
    """Save the phantoms side by side as a picture, each with its findings below; masks as outlines when asked for."""
    if not phantoms:
        raise ValueError("contact_sheet needs at least one phantom.")
    size = max(phantom.image.shape[0] for phantom in phantoms)
    font_size = max(9, size // 18)
    line = font_size + 2
    height = size + 4 * line + 4
    sheet = Image.new("RGB", (columns * (size + 4), -(-len(phantoms) // columns) * height), "white")
    for number, phantom in enumerate(phantoms):
        x, y = number % columns * (size + 4), number // columns * height
        picture = np.repeat(phantom.image[..., None], 3, axis=2)
        if outline_masks:
            for mask in phantom.masks.values():
                picture[mask & ~ndimage.binary_erosion(mask)] = (255, 80, 0)
        sheet.paste(Image.fromarray(picture), (x, y))
        for place, item in enumerate(phantom.findings or (Finding("normal", ""),)):
            words = " ".join(word for word in (item.severity, item.side, item.zone, item.name) if word)
            caption = Image.new("RGB", (size, line), "white")  # cuts off what is wider than the film
            ImageDraw.Draw(caption).text((2, 0), words, fill="black", font=_font(font_size))
            sheet.paste(caption, (x, y + size + 2 + place * line))
    sheet.save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m MMCLIP.data.phantom", description="Draw a contact sheet of phantoms.")
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--findings", help="comma-separated findings that each phantom shall have; default: at random")
    parser.add_argument("--masks", action="store_true", help="outline the lesion masks")
    parser.add_argument("--output", default="sheet.png")
    args = parser.parse_args(arguments)
    forced = None if args.findings is None else [name.strip() for name in args.findings.split(",") if name.strip()]
    phantoms = [make_phantom(args.seed, index, args.size, forced) for index in range(args.num)]
    contact_sheet(phantoms, args.output, args.columns, args.masks)
    print(f"{args.output}: {args.num} phantoms, {args.size} px")


if __name__ == "__main__":
    main()
