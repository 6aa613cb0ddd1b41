"""The model card: made of what a run left, of measured results, and of the little that only a person knows.

`build_card` writes it, `card_gaps` says what a card lacks, be it ours or somebody's own.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.indexing import PHANTOM, SPLIT_NAMES
from ..data.readers import SOURCES
from .paths import is_hub_id, local_paths, without_folders
from .results import VALIDATION, Evaluation, dataset_id
from .training_record import Run


TERMS_FILE = Path(__file__).with_name("data_terms.yaml")
PAPER = "https://arxiv.org/abs/2407.19546"
NOT_STATED = "**not stated**"
TAGS = ["medical", "radiology", "chest-x-ray", "clip", "vision-language"]
CITATION = """\
@article{mmclip2024,
  title   = {{MMCLIP}: Cross-modal Attention Masked Modelling for Medical Language-Image Pre-Training},
  author  = {Wu and Xie and Zhang and others},
  journal = {arXiv preprint arXiv:2407.19546},
  year    = {2024}
}"""
INTENDED_USE = (
    "For research on chest X-rays and language, for teaching, and as a start for training on data of your own. Not a "
    "medical device: do not use it to diagnose, to triage, or to decide on care."
)
LIMITS = (
    "**Shortcuts.** It may know a finding by the hospital, the view, tubes or burnt-in letters. Read scores within "
    "each source too.",
    "**Labels** of public sets are mostly mined from reports by rules, and they err.",
    "**Texts** are English, and cut at the length of the text tower. **Images** are frontal films; small findings may "
    "vanish at the input size.",
    "**Scores** rank images. They are not calibrated probabilities, unless `calibration.json` lies beside the weights, "
    "and then only for images like those it was fitted on.",
    "**Heat maps** show resemblance between patch and sentence. They are coarse, and they are no explanation.",
    "**Groups.** How scores differ by age, sex, ethnicity or scanner was not measured.",
)
ON_PHANTOMS = "**Phantoms.** It has seen made-up radiographs only, which are caricatures: of no use on real films."
_EMPTY = re.compile(r"\[?more information needed\]?|\[?to do\]?|tbd|todo", flags=re.IGNORECASE)


@dataclass
class About:
    """What no run knows, from the file for --about. Texts, but for `data` and the lists.

    license: id of the licence of the weights, as on https://huggingface.co/docs/hub/repositories-licenses; `other` with
    `license_name` and `license_link`. data: for each source of training rows `{"title", "terms", "url", "hub_id",
    "restricted"}`, over what data_terms.yaml says. base_model: Hub ids, where the run cannot name them.
    may_share_weights: true where the terms of restricted data allow public weights. The others are added to the card.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    summary: str | None = None
    intended_use: str | None = None
    limits: list[str] = field(default_factory=list)
    authors: str | None = None
    citation: str | None = None
    base_model: list[str] = field(default_factory=list)
    data: dict[str, dict] = field(default_factory=dict)
    may_share_weights: bool = False


_DATA_KEYS = ("title", "terms", "url", "hub_id", "restricted")


def read_about(path: str | os.PathLike | None, **given) -> About:
    """The file at `path`, if any, with `given` on top. Raises `ValueError` for a key or a value that cannot be used."""
    content = {}
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--about {path} cannot be read: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"--about {path} must hold `key: value` lines, but holds a {type(content).__name__}.")
    content |= {key: value for key, value in given.items() if value is not None}
    where = path or "the card"
    _check_keys(content, [item.name for item in fields(About)], str(where))
    for source, values in (content.get("data") or {}).items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}: `data.{source}` must be a map with {', '.join(_DATA_KEYS)}, but is {values!r}.")
        _check_keys(values, _DATA_KEYS, f"{where}: data.{source}")
    for name in ("limits", "base_model"):
        if isinstance(content.get(name), str):
            content[name] = [content[name]]
    return About(**{key: value for key, value in content.items() if value is not None})


def _check_keys(content: Mapping, known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}.{hint} Known are {', '.join(known)}.")


def data_terms(source: str, about: About) -> dict:
    """What is known of a `source` of rows: of its own name, or of the public set that it is a part of."""
    known = yaml.safe_load(TERMS_FILE.read_text(encoding="utf-8"))
    family = next((name for name in SOURCES if source.startswith(f"{name}-")), source)
    return {**known.get(family, {}), **about.data.get(family, {}), **about.data.get(source, {})}


def restricted_sources(sources: Iterable[str], about: About) -> list[str]:
    """Those whose terms may forbid that weights trained on them are made public."""
    return [source for source in sources if data_terms(source, about).get("restricted")]


def training_sources(run: Run, config, about: About) -> list[str]:
    """Every source that the weights have seen, in this run or one before; where neither says so, those of `about`."""
    told = {entry["source"] for entry in run.record.get("data", {}).get("train", ())}
    return sorted(told | set(config.training_sources or ())) or sorted(about.data)


# ------------------------------------------------------------------------------------------------------------ the card


def build_card(repo_id: str, config, run: Run, evaluations: Sequence[Evaluation], about: About) -> ModelCard:
    """The card of the model with `config` in the repository `repo_id`.

    What is not known is said so in it, and found by [`card_gaps`]. No folder of this machine is named.
    """
    name = repo_id.split("/")[-1]
    sources = training_sources(run, config, about)
    datasets = [data_terms(source, about).get("hub_id") for source in sources]
    bases = [base for base in run.record.get("base_models", {}).values() if is_hub_id(base)]
    bases = list(dict.fromkeys([*about.base_model, *bases]))
    metadata = ModelCardData(
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        language="en",
        tags=list(TAGS),
        base_model=bases or None,
        datasets=[dataset for dataset in datasets if dataset] or None,
        model_name=name,
        eval_results=[number for evaluation in evaluations for number in evaluation.measured] or None,
    )
    if metadata.eval_results is None:
        metadata.model_name = None
    limits = [*([ON_PHANTOMS] if sources == [PHANTOM] else []), *LIMITS, *about.limits]
    lines = [
        f"# {name}",
        "",
        about.summary
        or "Puts chest X-rays and sentences in one space, to compare, search and classify them by text alone. Trained "
        f"with [MMCLIP]({PAPER}), an open implementation of the method of Wu, Xie, Zhang et al.",
        "",
        "**For research. Not for diagnosis.**",
        *_use(repo_id, config),
        *_section("Intended use", [INTENDED_USE, *(["", about.intended_use] if about.intended_use else [])]),
        *_section("Limits", [f"- {limit}" for limit in limits]),
        *_section("Training data", _data(run, sources, about)),
        *_section("Training", _training(run, config)),
        *_section("Results", _results(evaluations)),
        *_section("Licence", _licence(about)),
        *_section("Citation", ["```bibtex", CITATION, *([about.citation.strip()] if about.citation else []), "```"]),
    ]
    body = without_folders("\n".join(lines))
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _use(repo_id: str, config) -> list[str]:
    return [
        "",
        "## Use",
        "",
        f"Images of any size and depth become one grey channel of {config.vision_config.image_size} px. The code lies "
        "beside the weights, hence `trust_remote_code=True`; name a `revision` to run only code that you have read.",
        "",
        "```python",
        "from transformers import AutoModel, AutoProcessor",
        "",
        f'model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)',
        f'processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)',
        "",
        'sentences = ["There is a pleural effusion.", "There is no pleural effusion."]',
        'inputs = processor(images="xray.png", text=sentences)',
        "print(model(**inputs).logits_per_image.softmax(dim=-1))",
        "```",
    ]


def _data(run: Run, sources: Sequence[str], about: About) -> list[str]:
    counted = {entry["source"]: entry for entry in run.record.get("data", {}).get("train", ())}
    if not sources:
        return []
    lines = [
        "| source | rows | images | reports | patients | terms |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for source in sources:
        known, counts = data_terms(source, about), counted.get(source, {})
        title = known.get("title") or source or "rows without a source"
        title = f"[{title}]({known['url']})" if known.get("url") else title
        cells = ["" if counts.get(k) is None else f"{counts[k]:,}" for k in ("rows", "images", "reports", "patients")]
        terms = " ".join((known.get("terms") or NOT_STATED).split())
        lines.append(f"| {title} | {' | '.join(cells)} | {terms} |")
    if set(sources) - counted.keys():
        lines += ["", "A source without numbers was trained on in an earlier run, or its rows were not counted."]
    lines += [
        "",
        "Rows with an image and a report teach all losses; those with an image alone get prompts of their labels.",
    ]
    if restricted := restricted_sources(sources, about):
        lines += ["", f"The weights may fall under the terms of {', '.join(restricted)}: read them before you share."]
    validation = run.record.get("data", {}).get("validation", ())
    if validation:
        told = ", ".join(f"{entry['rows']:,} of {entry['source'] or 'no source'}" for entry in validation)
        lines += ["", f"Rows to validate on: {told}."]
    return lines


def _training(run: Run, config) -> list[str]:
    record = run.record
    towers = [f"{config.vision_config.model_type} vision tower", f"{config.text_config.model_type} text tower"]
    parameters = f", {record['num_parameters'] / 1e6:.1f} M weights" if record.get("num_parameters") else ""
    lines = [f"A {' and a '.join(towers)}{parameters}."]
    for part, base in record.get("base_models", {}).items():
        lines.append(f"The {part} started from `{base}`." if part == "checkpoint" else f"Pretrained {part}: `{base}`.")
    weights = {name: getattr(config, f"{name}_weight") for name in ("contrastive", "mim", "mlm", "prompt", "local")}
    recipe = {f"{name}_weight": weight for name, weight in weights.items()} | record.get("recipe", {})
    lines += ["", "| setting | value |", "| --- | --- |"]
    for name, value in recipe.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"| `{name}` | {shown} |")
    told = []
    if run.steps:
        told.append(f"{run.steps:,} steps")
    if run.seconds:
        told.append(f"{run.seconds:,.0f} s")
    if record.get("machine"):
        told.append(f"{record['processes']} process{'es' * (record['processes'] > 1)} on {record['machine']}")
    told += [f"{name} {version}" for name, version in record.get("versions", {}).items()]
    return [*lines, "", f"{', '.join(told)}."] if told else lines


def _results(evaluations: Sequence[Evaluation]) -> list[str]:
    lines = []
    for evaluation in evaluations:
        lines += ["", f"### {evaluation.title[0].upper()}{evaluation.title[1:]}", ""]
        if evaluation.split not in (VALIDATION, "all rows"):
            lines += [f"Split: {evaluation.split}.", ""]
        lines += evaluation.lines if evaluation.lines[:1] != [""] else evaluation.lines[1:]
        if evaluation.command:
            lines += ["", "```bash", evaluation.command, "```"]
    if lines:
        lines = ["Measured, none quoted; in brackets 95 % intervals by bootstrap over patients.", *lines]
    return lines


def _licence(about: About) -> list[str]:
    if about.license is None:
        return []
    name = about.license_name or about.license
    weights = f"[{name}]({about.license_link})" if about.license_link else f"`{name}`"
    by = f" By {about.authors}." if about.authors else ""
    return [f"Weights: {weights}. Code and default tokenizer: MIT, by the contributors of MMCLIP.{by}"]


# --------------------------------------------------------------------------------------------------- what a card lacks


def _is_on_new_images(result: EvalResult, trained_on: Collection[str]) -> bool:
    if result.dataset_split == VALIDATION:  # of the run itself
        return False
    splits = (result.dataset_split or "").lower().split("+")
    if not {SPLIT_NAMES.get(split, split) for split in splits} & {"train", "val"}:
        return True
    return not any(dataset_id(source) in result.dataset_type for source in trained_on)


def sections(text: str) -> dict[str, str]:
    """Title in lower case -> text of each section of a Markdown page, sub-sections included."""
    found, stack = {}, []
    for line in re.sub(r"^```.*?^```", _without_hashes, text, flags=re.DOTALL | re.MULTILINE).splitlines():
        heading = re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)
        if heading:
            depth = len(heading.group(1))
            stack = [entry for entry in stack if entry[0] < depth]
            for _, title in stack:
                found[title] += f"{heading.group(2)}\n"
            stack.append((depth, heading.group(2).lower()))
            found.setdefault(stack[-1][1], "")
        else:
            for _, title in stack:
                found[title] += f"{line}\n"
    return found


def _without_hashes(block: re.Match) -> str:
    return re.sub(r"^#", " #", block.group(0), flags=re.MULTILINE)


def card_gaps(card: ModelCard, results: str = "test", trained_on: Collection[str] = ()) -> list[str]:
    """What a card must have before a model is published, and this one has not; [] where it may go.

    Licence, training data with the terms of each source, intended use, no folder of this machine, and results: with
    "test" measured on other rows than those that trained the model or chose the checkpoint, with "validation" on any,
    with "none" not yet. The train and val rows of a data set are others if it is none of those `trained_on`.
    """
    data, parts = card.data, sections(card.text)
    gaps = []
    if not data.get("license"):
        gaps.append("licence: the front matter names none (--license, or `license` in the file for --about)")
    elif data.license == "other" and not (data.get("license_name") and data.get("license_link")):
        gaps.append("licence: `other` needs `license_name` and `license_link`")
    about = next((text for title, text in parts.items() if "training data" in title), "")
    if not _EMPTY.sub("", about).strip():
        gaps.append(
            "training data: there is no section of that name with a text in it (the run left no training_record.json, "
            "and its config has no `training_sources`: describe each source under `data` in the file for --about)"
        )
    for line in about.splitlines():
        if NOT_STATED in line:
            source = line.split("|")[1].strip() if line.startswith("|") else line
            gaps.append(
                f"training data: nobody says under which terms {source} stands (`data` in the file for --about)"
            )
    use = next((text for title, text in parts.items() if "intended use" in title or title == "uses"), "")
    if not _EMPTY.sub("", use).strip():
        gaps.append("intended use: there is no section of that name with a text in it")
    measured = data.get("eval_results") or []
    if results == "test":
        measured = [result for result in measured if _is_on_new_images(result, trained_on)]
    if results != "none" and not measured:
        gaps.append("results: `model-index` has none that were measured on new images (--results metrics.json)")
    gaps += [f"privacy: it names {path}, a folder of this machine" for path in local_paths(str(card))]
    return gaps
