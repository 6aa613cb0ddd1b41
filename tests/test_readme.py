"""README.md and CONTRIBUTING.md say what is so: their Python runs, their commands parse, their files exist."""

import dataclasses
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import tiny_config, tiny_processor
from MMCLIP.processing_mmclip import default_tokenizer
from PIL import Image

from MMCLIP import MMCLIPConfig, MMCLIPForPreTraining, MMCLIPModel
from MMCLIP.cli import build_parser
from MMCLIP.data.phantom import FINDINGS
from MMCLIP.data.readers import COLUMN_NAMES, SOURCES, source_reader
from MMCLIP.training.arguments import DataArguments, MMCLIPTrainingArguments, ModelArguments, parse_run_config
from MMCLIP.training.classification_arguments import parse_classification_config


ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
SUFFIXES = (".py", ".md", ".yaml", ".json", ".txt", ".toml", ".csv", ".png")
# what the reader makes, and what may lie beside a checkout
NOT_OURS = ("outputs/", "my_xrays/", "../", "http", "OWNER/", "xray.png", "heatmap.png", "/data/", "film.", "hf:")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """(line of the page on which it begins, code) of every fenced block in `language`."""
    found = [match for match in FENCE.finditer(TEXT[page]) if match.group(1) == language]
    return [(TEXT[page].count("\n", 0, match.start(2)) + 1, match.group(2)) for match in found]


def commands(page: str) -> list[list[str]]:
    """Every command of the page's bash blocks, split into words."""
    code = "\n".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in code.splitlines() if line.strip()]


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXT[page]))


def table(heading: str) -> list[list[str]]:
    """Rows of the table whose first heading is `heading`, as lists of cells."""
    (start,) = (match.end() for match in re.finditer(rf"^\| {heading} \|.*\n\| ---.*\n", README, flags=re.MULTILINE))
    lines = re.match(r"(\|.*\n)*", README[start:]).group(0).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def loss_weights() -> set[str]:
    return {name for name in vars(MMCLIPConfig()) if name.endswith("_weight")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder as the reader of the page has it: a trained checkpoint, a table of X-rays, and the examples."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in ("examples", "Makefile", "requirements.txt"):
        Path(name).symlink_to(ROOT / name)
    ((_, manifest),) = blocks("README.md", "csv")
    Path("my_xrays").mkdir()
    Path("outputs/prepared").mkdir(parents=True)
    Path("my_xrays/manifest.csv").write_text(manifest)
    for line in manifest.splitlines()[1:]:
        if file := line.split(",")[0]:
            Image.new("L", (40, 50), 90).save(Path("my_xrays", file))
    return tmp_path


def test_the_python_of_the_readme_runs_in_order(home):
    torch.manual_seed(0)
    processor = tiny_processor()
    checkpoint = MMCLIPForPreTraining(tiny_config(vocab_size=len(processor.tokenizer)))
    for saved in (checkpoint, processor):
        saved.save_pretrained("outputs/demo/checkpoint")

    names = {"__name__": "readme"}
    seen = []
    for line, code in blocks("README.md", "python"):
        # blank lines in front, so that a traceback names the line of the page
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), names)
        seen.append(names.get("model"))

    untrained, loaded = seen[0], names["model"]
    assert isinstance(untrained, MMCLIPModel) and untrained is not loaded
    assert torch.equal(loaded.visual_projection.weight, checkpoint.visual_projection.weight)
    assert Image.open("xray.png").size == (256, 256) and Path("heatmap.png").stat().st_size > 0
    assert names["logits"].shape == (1, 3) and names["scores"].shape == (1, 3)
    assert names["heatmap"].shape == (256, 256)
    assert names["classifier"].classifier.weight.grad.abs().sum() > 0
    assert names["classifier"].vision_model.embeddings.patch_embeddings.projection.weight.grad is None
    # b.png of the table is a row of a fully labelled source in which "no finding" is also used
    assert names["rows"][1]["present"] == ["cardiomegaly", "pleural effusion"]
    assert names["rows"][1]["absent"] == ["no finding"]
    assert {f"{name}_weight" for name in names["output"].loss_info} == loss_weights()
    assert all(parameter.grad is not None for parameter in names["pretraining"].parameters())


def parser_of(script: str):
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_arguments


def test_each_command_parses(home):
    scripts = ("run_zero_shot", "run_evaluation", "run_retrieval", "show_heatmaps", "prepare_data", "app", "make_space")
    scripts += ("export_onnx", "push_to_hub", "run_ablation")
    parse = {script: parser_of(script) for script in scripts} | {"run_classification": parse_classification_config}
    parse["onnx_inference"] = list  # folder, picture and sentences, as they come; test_export_onnx.py runs it
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    kinds, prepared = set(), set()
    for page in PAGES:
        for command in commands(page):
            kinds.add(command[0])
            if command[0] == "make":
                assert command[1] in targets, command
            elif command[0] == "python":
                arguments = parse[Path(command[1]).stem](command[2:])
                assert Path(command[1]).is_file()
                if command[1] == "examples/run_zero_shot.py":
                    assert Path(arguments.manifest).is_file()
                for name, options in getattr(arguments, "source_options", {}).items():
                    assert set(options) <= set(inspect.signature(source_reader(name)).parameters), command
                prepared.update(getattr(arguments, "sources", ()))
            elif command[0] == "mmclip":
                build_parser().parse_args(command[1:])
            elif command[0] == "accelerate":
                launch = launch_command_parser().parse_args(command[2:])
                assert Path(launch.training_script).is_file()
                on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
                _, data, _ = parse_run_config([*launch.training_script_args, *on_cpu])
                assert data.train_manifest in (["my_xrays/manifest.csv"], ["outputs/prepared"])
            else:
                assert command[:2] in (["pip", "install"], ["hf", "upload"]), command
    assert kinds == {"make", "python", "mmclip", "accelerate", "pip", "hf"}
    assert prepared == {*SOURCES, "phantom", "cxr-mini"}  # a command for each public set


def test_the_torch_that_the_readme_installs_is_the_required_one():
    (version,) = re.findall(r"torch==[\d.]+", (ROOT / "requirements.txt").read_text())
    assert re.findall(r"torch==[\d.]+", README) == [version]


@pytest.mark.parametrize("page", PAGES)
def test_each_option_in_the_text_is_an_option_of_a_run_and_changes_it(page, home, capsys):
    config_file = "examples/configs/phantom_tiny.yaml"
    kinds = (ModelArguments, DataArguments, MMCLIPTrainingArguments)
    fields = {item.name for kind in kinds for item in dataclasses.fields(kind)}
    launch_options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    plain = vars_of(parse_run_config([config_file]))
    scripts = {
        zero_shot_command: ["--model", "m"],
        parser_of("run_zero_shot"): ["--model", "m", "--phantoms", "1", "--output_dir", "o"],
        parser_of("run_evaluation"): ["--model", "m", "--protocol", "phantom", "--output_dir", "o"],
        parser_of("app"): ["--model", "m"],
        parser_of("prepare_data"): ["--source", "phantom=1", "--output_dir", "o"],
        parser_of("push_to_hub"): ["--model", "m", "--repo_id", "o/n"],
    }
    scripts[parser_of("export_onnx")] = ["--model", "m", "--output_dir", "o"]
    scripts[parser_of("run_ablation")] = ["bench.yaml", "--output_dir", "o"]
    options_of = {parse: help_of(parse, capsys) for parse in scripts}
    for code in inline_code(page):
        if not code.startswith("--"):
            continue
        option, *values = shlex.split(code)
        name = option.removeprefix("--")
        if name in fields and values:
            changed = vars_of(parse_run_config([config_file, option, *values]))
            assert changed[name] != plain[name], f"{code} changes nothing"
        elif name not in fields and option not in launch_options and option != "--help":
            parsers = [parse for parse in scripts if option in options_of[parse]]
            assert parsers, f"no script has {option}"
            for parse in parsers if values else ():
                assert parse([*scripts[parse], option, *values]) != parse(scripts[parse]), f"{code} changes nothing"


def zero_shot_command(arguments: list[str]):
    return build_parser().parse_args(["zero-shot", "a.png", *arguments])


def help_of(parse, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))


def vars_of(parsed) -> dict:
    return {name: value for arguments in parsed for name, value in vars(arguments).items()}


@pytest.mark.parametrize("page", PAGES)
def test_each_file_that_a_page_names_exists(page):
    named = {line.split()[0] for _, file_map in blocks(page, "") for line in file_map.splitlines()}
    named |= {word for code in inline_code(page) if not code.startswith("from ") for word in code.split()}
    named |= set(re.findall(r"\]\(([^)]+)\)", TEXT[page]))
    named |= {word for command in commands(page) for word in command}
    paths = {name for name in named if "/" in name.rstrip("/") or name.endswith((*SUFFIXES, "/"))}
    paths = {path for path in paths if not path.partition("=")[2] and not path.startswith(NOT_OURS)}
    sources = "\n".join(path.read_text() for folder in ("examples", "MMCLIP") for path in (ROOT / folder).rglob("*.py"))
    # what is not a file of ours is a file that a run writes: then some code has its name
    missing = [path for path in paths if not (ROOT / path).exists() and path.strip("/") not in sources]
    assert len(paths) > 10 and not missing


def test_the_file_map_has_each_root_module_and_config():
    for path in [*ROOT.glob("*_mmclip.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("examples/configs/*.yaml")]:
        assert path.relative_to(ROOT).as_posix() in README


@pytest.mark.parametrize("page", PAGES)
def test_each_class_that_a_page_names_exists(page):
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "MMCLIP").rglob("*.py")])
    classes = set(re.findall(r"^class (\w+)", sources, flags=re.MULTILINE))
    assert set(re.findall(r"\bMMCLIP[A-Z]\w+", TEXT[page])) <= classes


def test_the_tables_name_every_loss_and_every_column():
    losses = {re.match(r"`(\w+)`", row[0]).group(1) for row in table("loss")}
    assert {f"{loss}_weight" for loss in losses} == loss_weights()
    columns = {name for row in table("column") for name in re.findall(r"`(\w+)`", row[0])}
    assert columns == {name for names in COLUMN_NAMES.values() for name in names}


def test_the_numbers_in_the_text_are_those_of_the_code():
    assert "twelve findings" in README and len(FINDINGS) == 12
    assert "256 tokens with the default tokenizer" in README and default_tokenizer().model_max_length == 256
    assert "ViT-B/16 and BERT-base" in README
    config = MMCLIPConfig()
    assert (config.vision_config.hidden_size, config.vision_config.patch_size) == (768, 16)
    assert config.text_config.hidden_size == 768 and config.text_config.num_hidden_layers == 12


def test_the_front_matter_is_that_of_a_model_card():
    _, front_matter, _ = README.split("---\n", 2)
    card = yaml.safe_load(front_matter)
    assert card["license"] == "mit" and (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "zero-shot-image-classification"
    assert "datasets" not in card  # none of ours is on the Hub
    assert set(card) <= {"license", "library_name", "pipeline_tag", "language", "tags"}


def test_the_readme_never_claims_to_reproduce_the_paper():
    assert not re.search(r"reproduc|state.of.the.art|\bSOTA\b", README, flags=re.IGNORECASE)
