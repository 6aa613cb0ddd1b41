"""What the entity recogniser finds in real reports, and how fast: python benchmarks/entities.py --json FILE

On the Open-i reports, which a radiologist or a trained coder gave MeSH codes (`openi_mesh.yaml` says what these mean).
The file of numbers lists every miss by report and cause; no text of a report is printed or written. One core.
`--quick` takes a few made-up reports to see that it runs; its numbers mean nothing.
"""

import os


os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before torch and tokenizers are loaded

import collections
import gzip
import importlib.util
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import spacy
import transformers
import yaml
from benchmark_tools import argument_parser, in_turns, machine, write_results

from MMCLIP import MMCLIPProcessor
from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.data.phantom import phantom_row
from MMCLIP.text.assertion import ASSERTIONS
from MMCLIP.text.entities import Entity, LexiconRecognizer
from MMCLIP.text.lexicon import find_words
from MMCLIP.text.masking import MASKING_COUNTS
from MMCLIP.text.sentences import split_sentences
from MMCLIP.text.vocabulary import KINDS, LABEL_KINDS, broader_labels, vocabulary


ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT.parent / "shared" / "data" / "openi-reports" / "reports.jsonl.gz"
SAMPLE = ROOT / "tests" / "assertion_sample.yaml"
MESH = Path(__file__).with_name("openi_mesh.yaml")
MIN_REPORTS = 10  # of a concept among the codes, for it to count
ABNORMAL_KINDS = ("finding", "disease")
# what is measured, and the target of it where there is one
MEASURES = {
    "recall": ("coded findings that an entity of the report names, share", ">=", 0.95),
    "recall_not_absent": ("the same without entities that the report denies",),
    "recall_pairs": ("coded findings that count, number",),
    "normal_disease_share": ("reports coded normal that name a disease as present, share", "<=", 0.03),
    "normal_abnormal_share": ("reports coded normal that name a finding or disease as present, share", "<=", 0.03),
    "entity_share": ("reports with an entity, share of those with a text",),
    "label_share": ("reports with a finding, disease or device, share of them",),
    "entities_per_report": ("entities a report",),
    "masked_share": ("tokens that EntMLM hides, share",),
    "assertion_tune": ("mentions read as labelled, those seen while the rules were written, share", ">=", 0.97),
    "assertion_test": ("the same, those never looked at, share", ">=", 0.97),
    "assertion_test_random": ("of these, drawn from all mentions",),
    "assertion_test_hard": ("of these, drawn from sentences with a hedge, denial or \"but\"",),
    "denial_test": ("denied or not, those never looked at, share",),
    "denial_test_negspacy": ("the same with negspacy",),
    "rate": ("reports a second of processor time", ">=", 1000),
    "rate_wall": ("reports a second by the clock",),
    "seconds": ("all reports, s of processor time", "<", 5),
    "seconds_tokenizer": ("the same reports through spaCy's blank tokenizer alone, s",),
    "tokenizer_ratio": ("recogniser, times as long as that tokenizer",),
    "load_seconds": ("loading vocabulary and recogniser, s of processor time",),
}  # fmt: skip


def read_reports(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def made_up_reports(number: int) -> list[dict]:
    """Reports of phantoms in the same fields, without codes."""
    return [
        {
            "uid": f"phantom-{index}",
            "findings": phantom_row(index, size=32)["report"],
            "impression": "",
            "mesh_major": [],
        }
        for index in range(number)
    ]


def text_of(report: dict) -> str:
    return f"{report['findings']}\n\n{report['impression']}"


# ----------------------------------------------------------------------------------------------- what the coders coded


class Rule(NamedTuple):
    """A line of `openi_mesh.yaml`: heading, the qualifiers that decide, and the concepts it means."""

    heading: str
    qualifiers: str
    concepts: tuple[str, ...]


def deciding_rule(code: str, mesh: dict[str, Any]) -> Rule | None:
    """The line that says what a code such as "Opacity/lung/base/left" means; None where it means no concept."""
    heading, *qualifiers = code.split("/")
    lines = mesh.get(heading, {})
    for deciding, concepts in lines.items() if isinstance(lines, dict) else ():
        if deciding == "any" or set(deciding.split("+")) <= set(qualifiers):
            return None if isinstance(concepts, str) else Rule(heading, deciding, tuple(concepts))
    return None


def measure_recall(reports: Sequence[dict], found: dict[str, list[Entity]], recognizer) -> tuple[dict, dict]:
    """Of the pairs of a report and a rule, the share with an entity of that concept or a narrower one."""
    mesh = yaml.safe_load(MESH.read_text(encoding="utf-8"))
    by_uid = {report["uid"]: report for report in reports}
    pairs, meaningless = {}, collections.Counter()
    for report in reports:
        for code in report["mesh_major"]:
            rule = deciding_rule(code, mesh)
            if rule is not None:
                pairs[report["uid"], rule] = code
            elif code != "normal":
                meaningless[code.partition("/")[0]] += 1
    coded = collections.Counter(concept for _, concept in {(uid, rule.concepts[0]) for uid, rule in pairs})
    counted = {pair: code for pair, code in pairs.items() if coded[pair[1].concepts[0]] >= MIN_REPORTS}
    misses, missed, not_absent = [], collections.Counter(), 0
    for (uid, rule), code in counted.items():
        met = [entity for entity in found[uid] if _is_a(entity.concept, rule.concepts)]
        if met:
            not_absent += any(entity.assertion != "absent" for entity in met)
        else:
            cause = _cause(by_uid[uid], found[uid], rule.concepts, recognizer)
            misses.append({"uid": uid, "code": code, "concepts": rule.concepts, "cause": cause})
            missed[f"{rule.heading} ({rule.qualifiers})"] += 1
    results = {
        "recall": 1 - len(misses) / len(counted) if counted else None,
        "recall_not_absent": not_absent / len(counted) if counted else None,
        "recall_pairs": len(counted) or None,
    }
    rules = collections.Counter(f"{rule.heading} ({rule.qualifiers})" for _, rule in counted)
    details = {
        "causes": dict(collections.Counter(miss["cause"] for miss in misses).most_common()),
        "headings": {name: {"pairs": number, "missed": missed[name]} for name, number in rules.most_common()},
        "codes_without_a_concept": dict(meaningless.most_common()),
        "misses": misses,
    }
    return results, details


def _is_a(concept: str, others: Iterable[str]) -> bool:
    return concept in vocabulary() and bool(set(broader_labels(concept)) & set(others))


def _cause(report: dict, entities: Sequence[Entity], concepts: Sequence[str], recognizer) -> str:
    """Why nothing of `concepts` was found in a report."""
    text = text_of(report)
    stems = [word.stem for word in find_words(text)]
    whole = f" {' '.join(stems)} "
    sentences = [{word.stem for word in find_words(text[start:end])} for start, end in split_sentences(text)]
    wordings = {
        tuple(word.stem for word in find_words(wording))
        for concept in vocabulary().values()
        if _is_a(concept.name, concepts)
        for wording in concept.wordings
    }
    apart = False
    for words in wordings:
        for at in range(len(words) if len(words) > 2 else 0):
            if f" {' '.join((*words[:at], 'xxxx', *words[at + 1 :]))} " in whole:
                return "a word of it may be removed (XXXX)"
        apart = apart or (len(words) > 1 and any(sentence.issuperset(words) for sentence in sentences))
    if apart:
        return "its words stand apart"
    broader = {name for concept in concepts for name in broader_labels(concept)}
    if any(entity.concept in broader for entity in entities):
        return "only something broader is named"
    elsewhere = recognizer(f"{report.get('indication', '')}\n\n{report.get('comparison', '')}")
    if any(_is_a(entity.concept, concepts) for entity in elsewhere):
        return "in the indication alone"
    return "wording unknown or not said"


def measure_normal(reports: Sequence[dict], found: dict[str, list[Entity]]) -> tuple[dict, dict]:
    """Findings and diseases that reports coded "normal" and nothing else name as present."""
    normal = [report["uid"] for report in reports if report["mesh_major"] == ["normal"]]
    named: dict[str, dict[str, list[str]]] = {kind: {} for kind in ABNORMAL_KINDS}
    for uid in normal:
        for entity in found[uid]:
            if entity.kind in ABNORMAL_KINDS and entity.assertion == "present":
                concepts = named[entity.kind].setdefault(uid, [])
                if entity.concept not in concepts:
                    concepts.append(entity.concept)
    if not normal:
        return {}, {}
    abnormal = {uid for uids in named.values() for uid in uids}
    results = {
        "normal_disease_share": len(named["disease"]) / len(normal),
        "normal_abnormal_share": len(abnormal) / len(normal),
    }
    return results, {"reports": len(normal), **named}


# ----------------------------------------------------------------------------------------------------- what is covered


def measure_coverage(reports: Sequence[dict], found: dict[str, list[Entity]]) -> tuple[dict, dict]:
    texts = {report["uid"]: text_of(report) for report in reports}
    texts = {uid: text for uid, text in texts.items() if text.strip()}
    entities = [entity for uid in texts for entity in found[uid]]
    with_label = [uid for uid in texts if any(entity.kind in LABEL_KINDS for entity in found[uid])]
    hidden, tokens = count_masked(texts, found)
    results = {
        "entity_share": sum(bool(found[uid]) for uid in texts) / len(texts),
        "label_share": len(with_label) / len(texts),
        "entities_per_report": len(entities) / len(texts),
        "masked_share": hidden / tokens,
    }
    counts = collections.Counter((entity.kind, entity.assertion) for entity in entities)
    concepts = collections.Counter(entity.concept for entity in entities)
    details = {
        "reports_with_a_text": len(texts),
        "entities": {kind: {said: counts[kind, said] for said in ASSERTIONS} for kind in KINDS},
        "concepts_met": len(concepts),
        "commonest_concepts": dict(concepts.most_common(50)),
        "without_an_entity": [uid for uid in texts if not found[uid]],
        "tokens": tokens,
    }
    return results, details


def count_masked(texts: dict[str, str], found: dict[str, list[Entity]], batch_size: int = 64) -> tuple[int, int]:
    """(hidden, all) tokens, special ones left out, of one epoch with the defaults of `MMCLIPCollator`."""
    transformers.logging.set_verbosity_error()  # the longest reports are cut
    collator = MMCLIPCollator(MMCLIPProcessor(), num_patches=1, for_trainer=True)
    samples = [
        {"row_id": uid, "image": None, "text": text, "entities": found[uid], "present": [], "absent": [],
         "sample_seed": (0, 0, index)}
        for index, (uid, text) in enumerate(texts.items())
    ]  # fmt: skip
    batches = (collator(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size))
    counted = sum(batch["masking_counts"].sum(dim=0) for batch in batches).tolist()
    counts = dict(zip(MASKING_COUNTS, counted, strict=True))
    return counts["hidden_tokens"], counts["tokens"]


# ---------------------------------------------------------------------------------------------- present, absent or what


def assertion_accuracy(recognizer, sample: Sequence[dict], reports: Sequence[dict]) -> dict[str, dict]:
    """Share of the labelled mentions of `sample` that are read as they were labelled, by part and stratum.

    A mention is `uid`, `start` and `end` in findings, blank line, impression; `assertion`, `part` and `stratum`. It
    takes the assertion of the entity that overlaps it most, findings, diseases and devices first; one that is not found
    counts as wrong. Beside it stands "denial", whether what is denied was told from what is not, which is all that
    negspacy can say of the same spans ("negspacy", where it is installed). Returns {"test": {"number", "accuracy",
    "denial", "negspacy"}, "test random": ..., "wrong": [...]}.
    """
    texts = {report["uid"]: text_of(report) for report in reports}
    entities = {uid: recognizer(texts[uid]) for uid in {mention["uid"] for mention in sample}}
    peer = _negspacy_denials(sample, texts)
    outcomes, wrong = collections.defaultdict(list), []
    for index, mention in enumerate(sample):
        said = _said(entities[mention["uid"]], mention["start"], mention["end"])
        is_denied = mention["assertion"] == "absent"
        outcome = {
            "accuracy": said == mention["assertion"],
            "denial": said is not None and (said == "absent") == is_denied,
        }
        if peer is not None:
            outcome["negspacy"] = peer[index] == is_denied
        for group in (mention["part"], f"{mention['part']} {mention['stratum']}"):
            outcomes[group].append(outcome)
        if not outcome["accuracy"]:
            kept = {name: mention[name] for name in ("uid", "start", "end", "assertion", "part", "stratum")}
            wrong.append({**kept, "said": said or "not found"})
    groups = {
        group: {"number": len(all_), **{name: sum(one[name] for one in all_) / len(all_) for name in all_[0]}}
        for group, all_ in sorted(outcomes.items())
    }
    return {**groups, "wrong": wrong}


def _said(entities: Sequence[Entity], start: int, end: int) -> str | None:
    met = [entity for entity in entities if entity.start < end and entity.end > start]
    if not met:
        return None
    best = max(met, key=lambda one: (one.kind in LABEL_KINDS, min(one.end, end) - max(one.start, start)))
    return best.assertion


def _negspacy_denials(sample: Sequence[dict], texts: dict[str, str]) -> list[bool] | None:
    """Whether negspacy, with its clinical terms, takes each mention for denied; None where it is not installed."""
    if importlib.util.find_spec("negspacy") is None:
        return None
    from negspacy.negation import Negex  # noqa: F401  (registers "negex")
    from negspacy.termsets import termset

    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    pipeline.add_pipe("negex", config={"neg_termset": termset("en_clinical").get_patterns()})
    denied = []
    for mention in sample:  # one by one: entities of one text must not overlap, mentions may
        document = pipeline.get_pipe("sentencizer")(pipeline.make_doc(texts[mention["uid"]]))
        span = document.char_span(mention["start"], mention["end"], label="MENTION", alignment_mode="expand")
        document.ents = [span]
        denied.append(bool(pipeline.get_pipe("negex")(document).ents[0]._.negex))
    return denied


def measure_assertion(recognizer, reports: Sequence[dict]) -> tuple[dict, dict]:
    uids = {report["uid"] for report in reports}
    sample = yaml.safe_load(SAMPLE.read_text(encoding="utf-8")) if SAMPLE.is_file() else []
    sample = [mention for mention in sample if mention["uid"] in uids]
    if not sample:
        return {}, {}
    groups = assertion_accuracy(recognizer, sample, reports)
    results = {
        f"assertion_{group.replace(' ', '_')}": row["accuracy"] for group, row in groups.items() if group != "wrong"
    }
    test = groups.get("test", {})
    return {**results, "denial_test": test.get("denial"), "denial_test_negspacy": test.get("negspacy")}, groups


# --------------------------------------------------------------------------------------------------------------- speed


def measure_speed(texts: Sequence[str], recognizer, num_rounds: int) -> dict[str, float]:
    tokenizer = spacy.blank("en").tokenizer
    functions = {
        "ours": lambda: [recognizer(text) for text in texts],
        "tokenizer": lambda: [tokenizer(text) for text in texts],
    }
    seconds = in_turns(num_rounds, time.process_time, **functions)
    wall = in_turns(num_rounds, time.perf_counter, **functions)
    return {
        "rate": len(texts) / seconds["ours"],
        "rate_wall": len(texts) / wall["ours"],
        "seconds": seconds["ours"],
        "seconds_tokenizer": seconds["tokenizer"],
        "tokenizer_ratio": seconds["ours"] / seconds["tokenizer"],
    }


# -------------------------------------------------------------------------------------------------------------- the run


def run(reports: list[dict], quick: bool) -> tuple[dict[str, float | None], dict]:
    begin = time.process_time()
    recognizer = LexiconRecognizer()
    recognizer("no effusion")
    load_seconds = time.process_time() - begin
    found = {report["uid"]: recognizer(text_of(report)) for report in reports}
    recall, recall_details = measure_recall(reports, found, recognizer)
    normal, normal_details = measure_normal(reports, found)
    coverage, coverage_details = measure_coverage(reports, found)
    assertion, assertion_details = measure_assertion(recognizer, reports)
    speed = measure_speed([text_of(report) for report in reports], recognizer, 1 if quick else 5)
    details = {
        "recall": recall_details,
        "normal": normal_details,
        "coverage": coverage_details,
        "assertion": assertion_details,
    }
    return {**recall, **normal, **coverage, **assertion, **speed, "load_seconds": load_seconds}, details


def main():
    parser = argument_parser(__doc__.partition(":")[0])
    parser.add_argument("--reports", type=Path, default=REPORTS, help="default: ../shared/data beside the checkout")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.reports.is_file():
        parser.error(
            f"{arguments.reports}: no such file. Give --reports, a gzip file of JSON lines with uid, findings, "
            "impression and mesh_major, or --quick."
        )
    reports = made_up_reports(40) if arguments.quick else read_reports(arguments.reports)
    results, details = run(reports, arguments.quick)
    packages = ["torch", "transformers", "tokenizers", "spacy"]
    if importlib.util.find_spec("negspacy"):
        packages.append("negspacy")
    about = {**machine("1", packages), "reports": len(reports), "quick": arguments.quick}
    write_results(MEASURES, results, about, arguments.json, details)


if __name__ == "__main__":
    main()
