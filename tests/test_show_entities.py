import csv
import functools
import gzip
import importlib.util
import itertools
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from MMCLIP.text.display import COLORS, ReadReport, draw_picture, html_page, legend, pieces_of, wrap
from MMCLIP.text.entities import ASSERTIONS, Entity, LexiconRecognizer
from MMCLIP.text.vocabulary import KINDS


SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "show_entities.py"
TEXT = "No effusion or mass. Possible nodule."
ENTITIES = [
    Entity(3, 11, "pleural effusion", "finding", "absent", 0, 2),
    Entity(15, 19, "mass", "finding", "absent", 0, 2),
    Entity(30, 36, "nodule", "finding", "uncertain", 21, 29),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("show_entities", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recognizer = functools.cache(LexiconRecognizer)


def read(text):
    return ReadReport("One", text, recognizer()(text))


# ------------------------------------------------------------------------------------------------------ what is marked


def test_pieces_are_cut_at_every_border_of_an_entity_and_a_cue_and_join_to_the_text():
    pieces = pieces_of(TEXT, ENTITIES)
    assert [(TEXT[p.start : p.end], p.entity and p.entity.concept, p.cue) for p in pieces] == [
        ("No", None, "absent"),
        (" ", None, None),
        ("effusion", "pleural effusion", None),
        (" or ", None, None),
        ("mass", "mass", None),
        (". ", None, None),
        ("Possible", None, "uncertain"),
        (" ", None, None),
        ("nodule", "nodule", None),
        (".", None, None),
    ]


def test_a_cue_inside_an_entity_does_not_cut_the_entity_in_two_marks():
    entity = Entity(0, 11, "no finding", "finding", "absent", 0, 2)
    assert [(p.start, p.end, p.entity, p.cue) for p in pieces_of("No findings", [entity])] == [
        (0, 2, entity, "absent"),
        (2, 11, entity, None),
    ]


def test_the_legend_shows_every_kind_and_every_assertion_by_its_own_word():
    shown = legend()
    words = [shown.text[e.start : e.end] for e in shown.entities]
    assert words == [*KINDS, *ASSERTIONS]
    assert [e.kind for e in shown.entities[: len(KINDS)]] == list(KINDS) == list(COLORS)
    assert [e.assertion for e in shown.entities[len(KINDS) :]] == list(ASSERTIONS)
    cues = [(shown.text[p.start : p.end], p.cue) for p in pieces_of(shown.text, shown.entities) if p.cue]
    assert cues == [("cue of absence", "absent"), ("cue of doubt", "uncertain")]


# How the three kinds of colour-blind readers see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear_rgb(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(linear):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(linear, 0, 1) / to_xyz.sum(axis=1))  # none of the colours is near black
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_any_two_kinds_can_be_told_apart(vision):
    seen = {kind: lab(np.array(VISION[vision]) @ linear_rgb(color)) for kind, color in COLORS.items()}
    for one, other in itertools.combinations(COLORS, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 20, (one, other)


@pytest.mark.parametrize("kind", COLORS)
def test_black_letters_can_be_read_on_every_colour(kind):
    luminance = linear_rgb(COLORS[kind]) @ [0.2126, 0.7152, 0.0722]
    assert (luminance + 0.05) / 0.05 >= 7  # WCAG 2, level AAA


# ------------------------------------------------------------------------------------------------------------- picture


def lines_of(text, width, *entities):
    return [
        text[start:end] for start, end in wrap(text, [Entity(*e, "x", "finding", "present") for e in entities], width)
    ]


def test_lines_break_at_blanks_and_at_the_breaks_of_the_text():
    assert lines_of("A small left effusion.\nNo mass", 12) == ["A small left", "effusion.", "No mass"]
    assert lines_of("A small left effusion.\nNo mass", 11) == ["A small", "left", "effusion.", "No mass"]
    assert lines_of("pneumonoultramicroscopic dust", 10) == ["pneumonoul", "tramicrosc", "opic dust"]


def test_an_entity_of_several_words_stays_on_one_line_unless_it_is_longer():
    text = "Left pleural effusion."
    assert lines_of(text, 12) == ["Left pleural", "effusion."]
    assert lines_of(text, 18, (5, 21)) == ["Left", "pleural effusion."]
    assert lines_of(text, 12, (5, 21)) == ["Left pleural", "effusion."]
    assert lines_of("Left pleural\neffusion.", 18, (5, 21)) == ["Left", "pleural\neffusion."]


@given(st.text("ab. \n\t\u00a0é", max_size=200), st.integers(2, 30), st.data())
def test_wrapped_lines_hold_every_sign_and_no_broken_entity(text, width, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    entities = [Entity(a, b, "x", "finding", "present") for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    lines = wrap(text, entities, width)
    assert all(0 < end - start <= width for start, end in lines)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(lines))
    kept = {i for start, end in lines for i in range(start, end)}
    assert all(i in kept or sign.isspace() for i, sign in enumerate(text))
    glued = list(text)
    for entity in entities:
        glued[entity.start : entity.end] = "x" * (entity.end - entity.start)
    if all(len(word) <= width for word in "".join(glued).split()):
        assert all(any(start <= e.start and e.end <= end for start, end in lines) for e in entities)


def test_each_assertion_has_its_marks_in_the_picture(tmp_path):
    marks = {
        "filled": f"fill: {COLORS['finding'].lower()}",
        "struck through": f"stroke: {to_hex(0.8 * np.array(to_rgb(COLORS['finding'])))}",
        "dashed": "stroke-dasharray",
        "asked": "<!-- ? -->",
    }
    counts = {}
    for name, text in {"present": "Nodule.", "absent": "No nodule.", "uncertain": "Possible nodule."}.items():
        draw_picture([read(text)], tmp_path / f"{name}.svg")
        picture = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        counts[name] = {mark: picture.count(sign) for mark, sign in marks.items()}
    # the legend alone has two filled boxes (kind, "present"), one struck through, a dashed box and a dashed cue, a "?"
    assert counts == {
        "present": {"filled": 3, "struck through": 1, "dashed": 2, "asked": 1},
        "absent": {"filled": 2, "struck through": 2, "dashed": 2, "asked": 1},
        "uncertain": {"filled": 2, "struck through": 1, "dashed": 4, "asked": 2},
    }


def test_the_same_reports_give_the_same_picture_and_other_ones_another(tmp_path):
    for name, text in {"one.svg": "No mass.", "two.svg": "No mass.", "three.svg": "Mass."}.items():
        draw_picture([read(text)], tmp_path / name)
    one, two, three = ((tmp_path / f"{name}.svg").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_a_picture_grows_with_the_text_and_keeps_the_colours(tmp_path):
    draw_picture([read("Nodule.")], tmp_path / "short.png")
    draw_picture([read("Nodule. " * 100)], tmp_path / "long.png")
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert short.width == long.width and short.height < long.height
        rgb = np.asarray(short.convert("RGB")).astype(int)
    for color in COLORS.values():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(rgb - wanted).max(axis=-1) <= 8).sum() > 200, color


@pytest.mark.filterwarnings("ignore:Glyph")  # the font of the picture has no such sign
@pytest.mark.parametrize(
    "text", ["$\\frac$ mass", "a\x00b\x1bc\tmass\r\nd", "\u80ba\u708e \U0001fac1 mass", "x" * 1000]
)
def test_any_text_can_be_drawn(text, tmp_path):
    draw_picture([read(text)], tmp_path / "any.svg")
    assert ElementTree.parse(tmp_path / "any.svg").getroot().tag.endswith("svg")


def test_a_picture_that_would_be_too_high_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"1 reports with 1\d\d\d lines.*Show fewer, or make a page \(.html\)"):
        draw_picture([read("No mass.\n" * 1000)], tmp_path / "high.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """The paragraphs of a page as a browser reads them, and its marks as (classes, words)."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.paragraphs, self.marks = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":  # has no end
            self.open.append(tag)
        if tag == "p":
            self.paragraphs.append("")
        elif tag == "mark":
            self.marks.append((dict(attributes)["class"], ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "p" in self.open:
            self.paragraphs[-1] += data
        if "mark" in self.open:
            self.marks[-1] = (self.marks[-1][0], self.marks[-1][1] + data)


def parsed(page):
    reader = Page()
    reader.feed(page)
    reader.close()
    return reader


def own_marks(page):
    return parsed(page).marks[len(legend().entities) :]


def test_the_page_marks_each_entity_by_kind_and_assertion_and_each_cue():
    page = html_page([ReadReport("One", TEXT, ENTITIES)])
    assert own_marks(page) == [
        ("finding absent", "effusion"),
        ("finding absent", "mass"),
        ("finding uncertain", "nodule"),
    ]
    assert '<b class="absent">No</b>' in page and '<b class="uncertain">Possible</b>' in page
    assert 'title="pleural effusion: finding, absent"' in page
    assert all(f".{kind} {{ --kind: {color}; }}" in page for kind, color in COLORS.items())


def test_a_cue_inside_an_entity_leaves_it_one_mark():
    entity = Entity(0, 11, "no finding", "finding", "absent", 0, 2)
    assert own_marks(html_page([ReadReport("", "No findings", [entity])])) == [("finding absent", "No findings")]


def test_nothing_of_a_report_becomes_code_of_the_page():
    text = '<script>alert(1)</script> <b>No</b> effusion & "mass" </p><img src=x onerror=y> &lt;\nEnd'
    page = parsed(html_page([ReadReport("<i>title</i>", text, recognizer()(text))]))
    assert page.paragraphs == [legend().text, text]
    assert not set(page.tags) & {"script", "img", "i", "link"}
    harmful = ReadReport("", "mass", [Entity(0, 4, '"><script>', "finding", "present")])
    assert "script" not in parsed(html_page([harmful])).tags


# ------------------------------------------------------------------------------------------------------------- command


def test_the_examples_show_every_kind_every_assertion_and_cues_before_and_after(script):
    found = [entity for text in script.EXAMPLES.values() for entity in recognizer()(text)]
    assert len(script.EXAMPLES) == 5
    assert {entity.kind for entity in found} == set(KINDS)
    assert {entity.assertion for entity in found} == set(ASSERTIONS)
    for assertion in ("absent", "uncertain"):
        cued = [e for e in found if e.assertion == assertion and e.cue_start is not None]
        assert any(e.cue_start > e.end for e in cued) and any(e.cue_end < e.start for e in cued)
    assert any("XXXX" in text for text in script.EXAMPLES.values())
    assert any(text.isupper() for text in script.EXAMPLES.values())


@pytest.mark.parametrize(
    ("title", "concept", "assertion", "cue"),
    [
        ("Normal", "pneumothorax", "absent", "no"),
        ("Effusion, and what is denied", "pleural effusion", "present", ""),
        ("Effusion, and what is denied", "edema", "absent", "no"),
        ("Pneumonia, in doubt", "aspiration", "uncertain", "may"),
        ("Devices after surgery", "nasogastric tube", "absent", "removed"),
        ("Devices after surgery", "endotracheal tube", "present", ""),
        ("Chronic and degenerative", "infiltration", "absent", "resolved"),
        ("Chronic and degenerative", "hiatal hernia", "uncertain", "cannot"),
        ("Chronic and degenerative", "emphysema", "present", ""),
    ],
)
def test_the_examples_are_read_as_a_radiologist_would(script, title, concept, assertion, cue):
    text = script.EXAMPLES[title]
    said = {
        (e.assertion, text[e.cue_start or 0 : e.cue_end or 0].lower())
        for e in read(text).entities
        if e.concept == concept
    }
    assert any(verdict == assertion and cue in words for verdict, words in said), said


def test_the_table_has_entity_concept_kind_assertion_and_cue(script, capsys):
    script.main(["--text", "No large effusion.", "--text", "Hello."])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Text 1" and lines[2].split() == ["entity", "concept", "kind", "assertion", "cue"]
    (row,) = [line.split() for line in lines if "effusion" in line]
    assert row[:6] == ["effusion", "pleural", "effusion", "finding", "absent", "No"]
    assert lines[lines.index("Text 2") + 2] == "  none found"


def test_spans_are_characters_of_the_text_that_is_written_with_them(script, tmp_path):
    script.main(
        [
            "--text",
            "No   effusion\u00e9; possible\nmass.",
            "--text",
            "x",
            "--output_file",
            str(tmp_path / "new" / "s.jsonl"),
        ]
    )
    first, second = map(json.loads, (tmp_path / "new" / "s.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["text"] == "No   effusion\u00e9; possible\nmass." and second["entities"] == []
    for entity in first["entities"]:
        assert first["text"][entity["start"] : entity["end"]] == entity["words"]
    (mass,) = [entity for entity in first["entities"] if entity["concept"] == "mass"]
    assert (mass["kind"], mass["assertion"]) == ("finding", "uncertain")
    assert first["text"][mass["cue_start"] : mass["cue_end"]] == "possible"


def test_cleaned_shows_the_text_that_training_reads(script, tmp_path):
    for options in ([], ["--cleaned"]):
        script.main(
            ["--text", "XXXX  effusion.\nMass", *options, "--output_file", str(tmp_path / f"{len(options)}.jsonl")]
        )
    raw, cleaned = (json.loads((tmp_path / f"{n}.jsonl").read_text())["text"] for n in (0, 1))
    assert raw == "XXXX  effusion.\nMass" and cleaned == "effusion. Mass"


def test_tables_and_text_files_are_read_by_the_names_of_their_columns(script, tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], ["1", "A mass,\nseen."], ["2", ""], ["3", "Edema."]])
    (tmp_path / "b.tsv").write_text("report\tid\nNodule.\t1\n", encoding="utf-8")
    rows = [
        {"findings": "Mass.", "impression": "Tumor."},
        {"findings": "", "impression": None},
        {"impression": "Edema."},
    ]
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "d.txt").write_bytes("Caf\u00e9\nNo mass.\n".encode("cp1252"))
    read = [list(script.read_reports(str(path))) for path in sorted(tmp_path.iterdir())]
    assert read == [
        [("a.csv, row 1", "A mass,\nseen."), ("a.csv, row 3", "Edema.")],
        [("b.tsv, row 1", "Nodule.")],
        [("c.jsonl.gz, row 1", "Mass.\nTumor."), ("c.jsonl.gz, row 3", "Edema.")],
        [("d.txt", "Caf\u00e9\nNo mass.")],
    ]


def test_no_more_reports_than_the_limit_are_shown_and_it_says_so(script, tmp_path, capsys):
    (tmp_path / "r.csv").write_text("text\n" + "Mass.\n" * 3)
    shown = {}
    for limit in ("2", "3"):
        script.main(["--reports", str(tmp_path / "r.csv"), "--limit", limit])
        shown[limit] = capsys.readouterr().out
    assert shown["2"].count("r.csv, row") == 2 and "only the first 2 reports" in shown["2"]
    assert shown["3"].count("r.csv, row") == 3 and "only the first" not in shown["3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "id,note\n1,x\n",
            "near row 1: expected `text`, `report`, `findings` or `impression`, found id, note",
        ),
        ("a.csv", "text\n\n", "no text in 0 rows"),
        ("a.csv", 'text\n"' + "x" * 200_000 + '"\n', "near row 0: field larger"),
        ("a.jsonl", '{"text": "Mass."}\n{"text"\n', "near row 1: Expecting"),
        ("a.jsonl", "[1]\n", "expected an object with the report as `text`, found a list"),
        ("a.xlsx", "x", "expected a .csv, .tsv, .jsonl or .txt file"),
        ("a.csv.gz", "no gzip", "Not a gzipped file"),
        ("a.txt", " \n", "no text in 1 rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_says_where(script, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(script.read_reports(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_file", "a.jpg"], "--output_file a.jpg: expected a name that ends in .png, .svg, .html, .jsonl"),
        (["--text", " "], "--text: the report is empty"),
        (["--limit", "0"], "--limit 0: expected 1 or more"),
    ],
)
def test_an_argument_that_makes_no_sense_ends_with_usage(script, words, message, capsys):
    with pytest.raises(SystemExit):
        script.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--reports", "missing.csv"], ["--recognizer", "nothing"]])
def test_a_mistake_of_the_user_is_one_line_without_a_traceback(script, words):
    with pytest.raises(SystemExit, match=f"ValueError: .*{words[1]}"):
        script.main(words)


def test_another_recognizer_is_loaded_by_name(script, tmp_path, capsys):
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "THING", "pattern": "gizmo"}])
    pipeline.to_disk(tmp_path / "pipeline")
    words = ["--text", "No gizmo.", "--recognizer", f"spacy:{tmp_path / 'pipeline'}"]
    with pytest.raises(SystemExit, match="ValueError: .*THING"):
        script.main(words)
    script.main([*words, "--recognizer_labels", '{"THING": "device"}'])
    assert ["gizmo", "gizmo", "device", "absent", "No"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
