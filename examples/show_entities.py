"""Show the entities of reports: of what kind each is, and whether it is present, absent or uncertain.

python examples/show_entities.py --output_file entities.png
python examples/show_entities.py --text "No effusion. Possible nodule." --output_file mine.html
python examples/show_entities.py --reports reports.csv --limit 50 --output_file spans.jsonl

The ending of --output_file decides: .png and .svg are pictures, .html is a page without outside parts, .jsonl has the
spans as characters of the text. Without it only the table is printed. With neither --text nor --reports five made-up
reports are shown. What is written holds the whole text of the reports: keep it where they may lie.
"""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from MMCLIP.data.readers.tables import text_lines
from MMCLIP.text.display import ReadReport, draw_picture, html_page
from MMCLIP.text.entities import Entity, load_recognizer, parse_labels
from MMCLIP.text.reports import clean_report


OUTPUTS = (".png", ".svg", ".html", ".jsonl")
EXAMPLES = {
    "Normal": "The heart is normal in size and contour. The lungs are clear. There is no focal consolidation, pleural "
    "effusion or pneumothorax. The bony thorax is intact.\nIMPRESSION: No acute cardiopulmonary abnormality.",
    "Effusion, and what is denied": "Moderate left pleural effusion with adjacent compressive atelectasis. No right "
    "effusion, pneumothorax, or pulmonary edema. The lungs are otherwise free of consolidation. Stable mild "
    "cardiomegaly without pulmonary vascular congestion.",
    "Pneumonia, in doubt": "Patchy opacity in the right lower lobe may represent pneumonia or aspiration. Probable "
    "small left pleural effusion. A nodular density over the left apex is suspicious for a lung nodule; malignancy "
    "cannot be excluded. No cavitation.",
    "Devices after surgery": "1. ENDOTRACHEAL TUBE ENDS 4 CM ABOVE THE CARINA.\n2. RIGHT INTERNAL JUGULAR CENTRAL "
    "VENOUS CATHETER WITH TIP IN THE SVC, NO PNEUMOTHORAX.\n3. THE NASOGASTRIC TUBE HAS BEEN REMOVED.\n4. INTACT "
    "STERNAL WIRES AND MEDIASTINAL CLIPS. POSSIBLE SMALL PNEUMOMEDIASTINUM.",
    "Chronic and degenerative": "Comparison with XXXX. Hyperexpanded lungs and flattened diaphragms, consistent with "
    "emphysema. Calcified granuloma in the right upper lobe. The right middle lobe infiltrate has resolved. Cannot "
    "exclude a small hiatal hernia. Tortuous aorta, degenerative changes of the thoracic spine, and an old left rib "
    "fracture, all unchanged from XXXX.",
}


def cue_of(report: ReadReport, entity: Entity) -> str:
    return "" if entity.cue_start is None else " ".join(report.text[entity.cue_start : entity.cue_end].split())


def span_lines(reports: Iterable[ReadReport]) -> Iterator[str]:
    """A JSON object for each report: its title, its text and the fields of each entity, with its words."""
    for report in reports:
        entities = [{"words": report.text[e.start : e.end], **e._asdict()} for e in report.entities]
        yield json.dumps({"title": report.title, "text": report.text, "entities": entities}, ensure_ascii=False) + "\n"


def print_table(reports: Iterable[ReadReport]) -> None:
    for report in reports:
        print(f"\n{report.title}")
        rows = [("entity", "concept", "kind", "assertion", "cue")]
        for e in report.entities:
            words = " ".join(report.text[e.start : e.end].split())
            rows.append((words, e.concept, e.kind, e.assertion, cue_of(report, e)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  " + "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip())
        if not report.entities:
            print("  none found")


def read_reports(path: str) -> Iterator[tuple[str, str]]:
    """(title, text) of each report of a table (.csv, .tsv, .jsonl, also with .gz) or of a .txt file, which is one.

    The text of a row is its column `text` or `report`, or else `findings` and `impression`; a row without text is left
    out. Raises ValueError for a file that is not there, is not such a file, or has no text.
    """
    file = Path(path)
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if not file.is_file():
        raise ValueError(f"--reports {path}: there is no such file.")
    if kind == ".txt":
        rows = ({"text": text} for text in ["".join(text_lines(file))])
    elif kind == ".jsonl":
        rows = (json.loads(line) for line in text_lines(file) if line.strip())
    elif kind in (".csv", ".tsv"):
        rows = csv.DictReader(text_lines(file), delimiter="\t" if kind == ".tsv" else ",")
    else:
        raise ValueError(f"--reports {path}: expected a .csv, .tsv, .jsonl or .txt file.")
    number, found = 0, False
    try:
        for number, row in enumerate(rows, start=1):
            if text := _text_of(row):
                found = True
                yield file.name if kind == ".txt" else f"{file.name}, row {number}", text
    except (ValueError, csv.Error, EOFError, OSError) as error:
        raise ValueError(f"{path}, near row {number}: {error}") from error
    if not found:
        raise ValueError(f"{path}: no text in {number} rows.")


def _text_of(row) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the report as `text`, found a {type(row).__name__}.")
    names = [name for name in ("text", "report") if name in row][:1]
    names = names or [name for name in ("findings", "impression") if name in row]
    if not names:
        raise ValueError(f"expected `text`, `report`, `findings` or `impression`, found {', '.join(map(str, row))}.")
    return "\n".join(text for name in names if (text := str(row[name] or "").strip()))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], help="a report; may be given many times")
    parser.add_argument(
        "--reports", nargs="+", default=[], metavar="FILE", help="tables (.csv, .tsv, .jsonl) or .txt, a report each"
    )
    parser.add_argument("--limit", type=int, default=20, help="show at most so many reports, default 20")
    parser.add_argument(
        "--cleaned",
        action="store_true",
        help="show texts as the readers of data sets hand them to training: in one line, without marks such as XXXX",
    )
    parser.add_argument(
        "--recognizer", default="lexicon", help="lexicon, spacy:PIPELINE or hf:MODEL, each a name or a folder"
    )
    parser.add_argument("--recognizer_labels", help="what the labels of that pipeline or model mean, as JSON")
    parser.add_argument("--output_file", type=Path, help=f"ends in {', '.join(OUTPUTS)}")
    args = parser.parse_args(arguments)
    if args.output_file and args.output_file.suffix.lower() not in OUTPUTS:
        parser.error(f"--output_file {args.output_file}: expected a name that ends in {', '.join(OUTPUTS)}")
    if args.limit < 1:
        parser.error(f"--limit {args.limit}: expected 1 or more")
    if not all(text.strip() for text in args.text):
        parser.error("--text: the report is empty")
    return args


def show(args: argparse.Namespace) -> None:
    texts = itertools.chain(
        ((f"Text {number}", text) for number, text in enumerate(args.text, start=1)),
        *map(read_reports, args.reports),
        () if args.text or args.reports else EXAMPLES.items(),
    )
    chosen = list(itertools.islice(texts, args.limit))
    if args.cleaned:
        chosen = [(title, clean_report(text)) for title, text in chosen]
    recognizer = load_recognizer(args.recognizer, parse_labels(args.recognizer_labels))
    found = recognizer.find([text for _, text in chosen])
    reports = [ReadReport(title, text, entities) for (title, text), entities in zip(chosen, found, strict=True)]
    print_table(reports)
    if next(texts, None):
        print(f"\nonly the first {args.limit} reports; --limit shows more")
    if args.output_file:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        kind = args.output_file.suffix.lower()
        if kind == ".html":
            args.output_file.write_text(html_page(reports), encoding="utf-8")
        elif kind == ".jsonl":
            args.output_file.write_text("".join(span_lines(reports)), encoding="utf-8")
        else:
            draw_picture(reports, args.output_file)
        print(f"\n{args.output_file}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        show(args)
    except (ValueError, ImportError, OSError) as error:  # a mistake of the user's, without the way it took
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
