"""The film of a phantom: thorax, lungs, heart, bones, lesions and their masks, drawn in millimetres of the patient."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .phantom_findings import GRADES, SIZES, Finding, choose


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


class Chest:
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
            grade = GRADES.index(found["emphysema"].severity)
            inspiration = unwell(218, 226) + 7 * grade
            self.recess = unwell(12, 15) - 2 * grade
            ratio = unwell(0.35, 0.41)
            self.half_width = min(self.half_width + 4 + 2 * grade, 142)
        if "cardiomegaly" in found:
            low = (0.54, 0.59, 0.65)[GRADES.index(found["cardiomegaly"].severity)]
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
        grade = GRADES.index(finding.severity)
        patch = np.clip(0.5 + 0.35 * self.film.cloud(self.lesions, 60, 2), 0, 1)
        self.air = self.air * (1.10 + 0.06 * grade + 0.10 * patch)
        self.vessel_gain = self.vessel_gain * (1 - (0.25 + 0.15 * grade) * (0.5 + patch))
        self.mark("emphysema", "bilateral", self.field, 0.5)
        for _ in range((0, 1, 3)[grade]):  # bullae: thin-walled air in the upper zones
            side = choose(self.lesions, ("left", "right"))
            radius = self.lesions.uniform(13, 24)
            x, y = self.place(side, radius, 0.05, 0.35)
            inside = radius - np.hypot(self.film.x - x, self.film.y - y)
            disc = _edge(inside, 2) * self.lung
            self.air = self.air * (1 + 0.12 * disc)
            self.vessel_gain = self.vessel_gain * (1 - disc)
            self.extra += 0.06 * np.exp(-((inside / max(1.0, 0.5 * self.pixel)) ** 2)) * self.lung

    def _add_edema(self, finding: Finding) -> None:
        rng, film = self.lesions, self.film
        grade = GRADES.index(finding.severity)
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
        grade = GRADES.index(finding.severity)
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
        grade = GRADES.index(finding.severity)
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
        low = (30, 39, 49)[SIZES.index(finding.severity)]
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
        size = SIZES.index(finding.severity)
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
        size = SIZES.index(finding.severity)
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
        grade = GRADES.index(finding.severity)
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
        diameter = (36, 50, 66)[SIZES.index(finding.severity)] * rng.uniform(0.93, 1.08)
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
        ImageDraw.Draw(canvas).text(at, "L" if left else "R", fill=245, font=load_font(max(6, size * 0.06)))
        return np.array(canvas)


@functools.lru_cache(maxsize=8)
def load_font(size: float):
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
