"""Damaged files, thousands of them: each is read, or refused with a `ValueError`, soon and without a crash.

`MMCLIP_FUZZ_FILES` and `MMCLIP_FUZZ_SEED` change the slow run. Files are read in a process of their own, so that one
that brings it down is noticed; it is then written to the folder of the test, and the message names it.
"""

import io
import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_files import LOSSLESS_SYNTAXES, LOSSY_SYNTAXES, bare_bytes, file_bytes, make_dicom, table
from MMCLIP.image_processing_mmclip import MAX_PIXELS, load_grayscale, load_shrunk
from PIL import Image


CPU_LIMIT = 2.0  # seconds for one file
WALL_LIMIT = 60.0  # the machine may be busy with other things
MEMORY_LIMIT = 3 * 2**30  # of the process that reads
LENGTH = struct.Struct("<Q")

# ------------------------------------------------------------------------------------------------------------ the seeds


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def interlaced_png(pixels: np.ndarray) -> bytes:
    """An 8-bit grey PNG in the seven passes of Adam7, which Pillow reads and does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes:
        for line in pixels[top::down, left::right]:
            rows += b"\0" + line.tobytes() if line.size else b""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def make_seeds() -> dict[str, bytes]:
    """One small whole file of each kind, by name."""
    down, across = np.mgrid[0:40, 0:36]
    pixels = (120 + 60 * np.sin(down / 5) + 60 * np.cos(across / 7) + (down * across) % 11).astype(np.uint8)
    gray = Image.fromarray(pixels)
    rgb = Image.merge("RGB", [gray, gray.rotate(90, expand=False), gray.rotate(180)])
    alpha = gray.copy()
    alpha.putalpha(gray.rotate(180))
    deep = Image.fromarray(pixels.astype(np.uint16) * 200 + 5)
    frames = [gray.rotate(turn) for turn in (0, 90, 180)]
    exif = Image.Exif()
    exif[274] = 6
    seeds = {
        "baseline.jpg": encoded(gray, "JPEG", quality=85),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif, subsampling=2, icc_profile=bytes(200)),
        "two.mpo": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "gray.png": encoded(gray, "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "interlaced.png": interlaced_png(pixels),
        "alpha.png": encoded(alpha, "PNG", exif=exif),
        "one bit.png": encoded(gray.convert("1"), "PNG"),
        "animated.png": encoded(gray, "PNG", save_all=True, append_images=frames),
        "plain.tif": encoded(gray, "TIFF"),
        "deep.tif": encoded(deep, "TIFF"),
        "float.tif": encoded(gray.convert("F"), "TIFF"),
        "pages.tif": encoded(gray, "TIFF", save_all=True, append_images=frames, compression="tiff_lzw"),
        "deflated.tif": encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"),
        "fax.tif": encoded(gray.convert("1"), "TIFF", compression="group4"),
        "packed.tif": encoded(rgb.convert("CMYK"), "TIFF", compression="packbits"),
        "gray.bmp": encoded(gray, "BMP"),
        "colour.bmp": encoded(rgb, "BMP"),
        "animated.gif": encoded(gray, "GIF", save_all=True, append_images=frames),
        "transparent.gif": encoded(rgb.quantize(8), "GIF", transparency=1, interlace=1),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "lossy.webp": encoded(alpha, "WEBP", quality=60),
        "animated.webp": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        "wrapped.jp2": encoded(rgb, "JPEG2000"),
        "stream.j2k": encoded(deep, "JPEG2000", no_jp2=True),
        "binary.pgm": encoded(gray, "PPM"),
        "plain.pgm": b"P2 6 4 255\n" + b" ".join(b"%d" % value for value in range(24)),
    }
    values = pixels.astype(np.uint16) * 15
    options = {"WindowCenter": 1800, "WindowWidth": 3000, "PixelSpacing": [0.2, 0.15]}
    for name, syntax in LOSSLESS_SYNTAXES.items():
        seeds[f"{name}.dcm"] = file_bytes(make_dicom(values, syntax, 12, **options))
    for name, syntax in LOSSY_SYNTAXES.items():
        eight_bit = name == "JPEG baseline"
        seeds[f"{name}.dcm"] = file_bytes(make_dicom(pixels if eight_bit else values, syntax, 8 if eight_bit else 12))
    colours = np.asarray(rgb)
    for name in ("RLE", "JPEG-LS", "JPEG 2000 lossless", "JPEG lossless SV1", "explicit"):
        seeds[f"colour {name}.dcm"] = file_bytes(make_dicom(colours, LOSSLESS_SYNTAXES[name]))
    seeds["signed JPEG-LS.dcm"] = file_bytes(
        make_dicom(values.astype(np.int16) - 900, LOSSLESS_SYNTAXES["JPEG-LS"], 13)
    )
    entries = np.sqrt(np.arange(4096)) * 60
    tables = {"ModalityLUTSequence": table(0, np.arange(4096)[::-1], 16), "VOILUTSequence": table(0, entries, 12)}
    seeds["tables.dcm"] = file_bytes(make_dicom(values, bits=12, PhotometricInterpretation="MONOCHROME1", **tables))
    seeds["padded.dcm"] = file_bytes(make_dicom(values, bits=12, PixelPaddingValue=int(values.min())))
    seeds["bare.dcm"] = bare_bytes(make_dicom(values, bits=12, SpecificCharacterSet="ISO_IR 100"))
    return seeds


# -------------------------------------------------------------------------------------------------------- the mutations

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 254, 255, 256, 1023, 4096, 8191, 16384, 32767, 32768)
NUMBERS += (65535, 65536, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def flip_bits(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    for _ in range(int(random.choice([1, 2, 4, 16, 64]))):
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    return data


def flip_header_bits(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    for _ in range(int(random.choice([1, 2, 4]))):
        data[random.integers(min(len(data), 700))] ^= 1 << int(random.integers(8))
    return data


def truncate(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    return data[: random.integers(len(data))]


def swap_parts(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    a, b, c, d = sorted(int(place) for place in random.integers(0, len(data) + 1, 4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def double_part(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    a, b = sorted(int(place) for place in random.integers(0, len(data) + 1, 2))
    return data[:b] + data[a:b] * int(random.choice([1, 2, 30])) + data[b:]


def drop_part(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    start = int(random.integers(len(data)))
    return data[:start] + data[start + int(random.choice([1, 2, 4, 8, 50, 500])) :]


def edit_number(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    """A field of 1, 2 or 4 bytes gets another value, most often in the header."""
    for _ in range(int(random.integers(1, 4))):
        width = int(random.choice([1, 2, 2, 4]))
        reach = len(data) if random.random() < 0.3 else min(len(data), 900)
        start = int(random.integers(max(reach - width, 1)))
        value = int(random.choice(NUMBERS)) if random.random() < 0.7 else int(random.integers(2**32))
        order = "little" if random.random() < 0.5 else "big"
        data[start : start + width] = (value % 256**width).to_bytes(width, order)
    return data


def blank_part(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    start, length = int(random.integers(len(data))), int(random.choice([4, 16, 100, 1000]))
    filling = random.choice([b"\0", b"\xff", b" ", b"9"])
    return data[:start] + bytes(filling) * len(data[start : start + length]) + data[start + length :]


def append(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    other = others[random.integers(len(others))]
    return data + other if random.random() < 0.5 else data + bytes(random.integers(0, 256, 300, dtype=np.uint8))


def splice(data: bytearray, random: np.random.Generator, others: list[bytes]) -> bytearray:
    other = others[random.integers(len(others))]
    return data[: random.integers(len(data))] + other[random.integers(len(other)) :]


MUTATIONS = [
    flip_bits,
    flip_header_bits,
    flip_header_bits,
    truncate,
    swap_parts,
    double_part,
    drop_part,
    edit_number,
    edit_number,
    edit_number,
    blank_part,
    append,
    splice,
]


def with_true_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold now: otherwise Pillow looks no further."""
    fixed, place = data[:8], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if place + 12 + length > len(data):
            break
        fixed += (
            data[place : place + 4] + png_chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length])[4:]
        )
        place += 12 + length
    return bytes(fixed + data[place:])


def damaged_files(number: int, seed: int):
    """(name, bytes) of `number` files; the name tells how the file was made."""
    seeds = make_seeds()
    names, others = list(seeds), list(seeds.values())
    for index in range(number):
        random = np.random.default_rng([seed, index])
        name = names[index % len(names)]
        data, steps = bytearray(seeds[name]), []
        for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
            mutation = MUTATIONS[random.integers(len(MUTATIONS))]
            data = mutation(data, random, others) if data else data
            steps.append(mutation.__name__)
        data = bytes(data)
        if data[:4] == b"\x89PNG" and random.random() < 0.7:
            data = with_true_checksums(data)
        yield f"{seed}-{index} {name}: {', '.join(steps)}", data


# ----------------------------------------------------------------------------------------------------- reading them


def verdict(data: bytes) -> str:
    """ "read", "refused", or what should not have happened."""
    outcomes = set()
    for read in (load_grayscale, lambda data: load_shrunk(data, 16)[0]):  # whole, and the way of preparation
        try:
            picture = read(data)
            levels = np.asarray(picture)
            if picture.mode != "L" or levels.dtype != np.uint8 or not 0 < levels.size <= MAX_PIXELS:
                return f"gave mode {picture.mode} of {picture.size}"
            outcomes.add("read")
        except ValueError as error:
            if not str(error).startswith("expected ") or len(str(error)) > 500 or not str(error).isprintable():
                return f"refused without a reason: {error}"
            outcomes.add("refused")
        except BaseException as error:
            return f"raised {error!r}"
    return outcomes.pop() if len(outcomes) == 1 else "read only whole or only shrunk"


def serve() -> None:
    """In the process of its own: a length and a file come in, a line of JSON goes out."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    while header := sys.stdin.buffer.read(LENGTH.size):
        data = sys.stdin.buffer.read(LENGTH.unpack(header)[0])
        start = time.process_time()
        found = verdict(data)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"found": found, "seconds": time.process_time() - start, "memory": memory}
        print(json.dumps(answer), file=answers, flush=True)


class Reader:
    """Reads files in another process, and starts it anew when a file has brought it down."""

    def __init__(self):
        self.process = None

    def start(self):
        command = [sys.executable, "-X", "faulthandler", "-c", "import test_image_fuzz; test_image_fuzz.serve()"]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
        assert self.ask(make_seeds()["gray.png"])["found"] == "read"

    def ask(self, data: bytes) -> dict:
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(LENGTH.pack(len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        ready, _, _ = select.select([self.process.stdout], [], [], WALL_LIMIT)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.stop()
        return {"found": "crashed the process" if ready else "hung", "seconds": 0.0, "memory": 0}

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def run(number: int, seed: int, folder: Path) -> dict[str, int]:
    """Reads `number` damaged files; returns how many were read and refused. Fails with the list of what went wrong."""
    reader, counts, wrong = Reader(), {"read": 0, "refused": 0}, []
    slowest, memory = (0.0, ""), 0
    try:
        for name, data in damaged_files(number, seed):
            answer = reader.ask(data)
            found, seconds = answer["found"], answer["seconds"]
            slowest = max(slowest, (seconds, name))
            if found in counts:
                counts[found] += 1
            if seconds > CPU_LIMIT:
                found = f"took {seconds:.1f} s"
            elif answer["memory"] > MEMORY_LIMIT:
                found = f"took {answer['memory'] / 2**30:.1f} GiB"
                reader.stop()
            memory = max(memory, answer["memory"])
            if found not in counts:
                file = folder / f"{name.split(' ')[0]}.bin"
                file.write_bytes(data)
                wrong.append(f"{name} {found} ({file})")
    finally:
        reader.stop()
    print(f"seed {seed}: {counts}, at most {slowest[0]:.2f} s of CPU ({slowest[1]}) and {memory / 2**30:.2f} GiB")
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == number
    return counts


# ------------------------------------------------------------------------------------------------------------ the tests


def test_every_seed_is_read_before_it_is_damaged():
    seeds = make_seeds()
    assert len(seeds) >= 50
    assert {name: verdict(data) for name, data in seeds.items()} == dict.fromkeys(seeds, "read")


def test_mutations_repeat_with_the_seed_and_change_the_files():
    first, again = (dict(damaged_files(120, seed=1)) for _ in range(2))
    assert first == again and first != dict(damaged_files(120, seed=2))
    assert len(set(first.values())) > 110 and not set(first.values()) & set(make_seeds().values()) - {b""}


def test_a_crash_and_a_hang_are_noticed_and_the_next_file_is_read(monkeypatch):
    reader = Reader()
    reader.start()
    try:
        reader.process.kill()
        assert reader.ask(b"a file")["found"] == "crashed the process"
        assert reader.ask(b"a file")["found"] == "refused"
        os.kill(reader.process.pid, 19)  # stopped: it answers no more
        monkeypatch.setitem(globals(), "WALL_LIMIT", 0.5)
        assert reader.ask(b"a file")["found"] == "hung"
    finally:
        reader.stop()


def test_a_few_damaged_files_are_each_read_or_refused(tmp_path):
    counts = run(165, 0, tmp_path)
    assert min(counts.values()) > 20


@pytest.mark.slow
def test_thousands_of_damaged_files_are_each_read_or_refused(tmp_path):
    number, seed = int(os.environ.get("MMCLIP_FUZZ_FILES", 3000)), int(os.environ.get("MMCLIP_FUZZ_SEED", 1))
    counts = run(number, seed, tmp_path)
    assert min(counts.values()) > number // 10
