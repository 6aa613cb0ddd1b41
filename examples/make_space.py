"""Make a folder that is a Hugging Face Space as it stands: the web demo, this package, a checkpoint.

python examples/make_space.py --model outputs/demo/checkpoint --output_dir outputs/space
hf upload OWNER/NAME outputs/space . --repo-type space

`--model` may also be a Hub id: then the folder has no checkpoint, and README.md there names the model, which a Space
finds in its variable MMCLIP_MODEL. Whoever can open the Space can see what is in it, the reports too.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from MMCLIP.evaluation.checkpoints import check_checkpoint
from MMCLIP.hub.files import cleaned, collect_files


ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, or a Hub id")
    parser.add_argument("--calibration", type=Path, help="calibration.json of run_zero_shot.py")
    parser.add_argument("--reports", type=Path, help="CSV table with a column `text`, for the nearest reports")
    parser.add_argument("--output_dir", required=True, type=Path, help="must be empty or not be there")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    check_checkpoint(args.model)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir: {args.output_dir} is not empty. Remove it, or name another folder.")
    for name in ("calibration", "reports"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name}: there is no file {path}.")
    if args.reports is not None and args.reports.suffix != ".csv":
        raise ValueError(f"--reports: a Space takes a .csv, got {args.reports.name}.")


def write(content: Path | bytes, target: Path) -> None:
    target.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, target)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check(args)
    # as they go to the Hub: without optimizer, arguments of the run and folders of this machine
    files = collect_files(args.model)[0] if os.path.isdir(args.model) else {}
    calibration = None if args.calibration is None else cleaned(args.calibration)
    space = args.output_dir
    space.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "examples" / "space").iterdir(), ROOT / "examples" / "app.py", ROOT / "LICENSE"]:
        shutil.copy(source, space)
    for source in [*ROOT.glob("*_mmclip.py"), *ROOT.glob("tokenizer*.json")]:
        shutil.copy(source, space)
    shutil.copytree(ROOT / "MMCLIP", space / "MMCLIP", ignore=shutil.ignore_patterns("__pycache__"))
    if files:
        (space / "checkpoint").mkdir()
        for name, content in files.items():
            if not name.endswith(".py"):
                write(content, space / "checkpoint" / name)
    else:
        page = space / "README.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"\n---\n", f"\nmodels:\n- {args.model}\n---\n", text, count=1), encoding="utf-8")
    if calibration is not None:
        write(calibration, space / "calibration.json")
    if args.reports is not None:
        shutil.copy(args.reports, space / "reports.csv")
    print(f"The Space lies in {space}. Upload it: hf upload OWNER/NAME {space} . --repo-type space")
    if not files:
        print(f"Then set the variable MMCLIP_MODEL of the Space to {args.model}, and HF_TOKEN if the model is private.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")
