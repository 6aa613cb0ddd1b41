"""Publish a trained MMCLIP on the Hugging Face Hub: model, processor, code and a model card, in one commit.

python examples/push_to_hub.py --model outputs/demo/checkpoint --repo_id OWNER/NAME --license mit --dry_run
python examples/push_to_hub.py --model outputs/mine/checkpoint --repo_id OWNER/NAME --about about.yaml --tag v1

The card is made of what run_pretrain.py left beside the checkpoint and of the metrics.json of evaluations. --dry_run
shows each file, new, changed or unchanged, and the card, which alone goes to the Hub, to be checked; nothing is stored.
A repository is private unless --public. A push that was interrupted goes on when called again, and a second push sends
only what changed.
"""

import argparse
import sys

from huggingface_hub import HfApi

from MMCLIP.hub.model_card import read_about
from MMCLIP.hub.preparing import prepare
from MMCLIP.hub.publishing import check_token, make_plan, push


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the saved model and processor, X/checkpoint")
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME; made where it does not exist")
    parser.add_argument(
        "--about", help="YAML file with what no run knows: `license`, `intended_use`, `limits`, `authors`, `citation`, "
        "`base_model`, and under `data` the `title`, `terms` and `url` of each source of training rows"
    )  # fmt: skip
    parser.add_argument("--license", help="of the weights, an id of the Hub such as cc-by-nc-4.0; over that of --about")
    parser.add_argument("--run_dir", help="what run_pretrain.py left; default: the model's folder or the one above")
    parser.add_argument(
        "--results",
        nargs="+",
        help="metrics.json of run_zero_shot.py, run_retrieval.py or run_evaluation.py; default: the run's",
    )
    parser.add_argument(
        "--card",
        help="a README.md of your own, in place of the card that is made; then --about is read for "
        "`data` and `may_share_weights` alone",
    )
    parser.add_argument("--dry_run", action="store_true", help="show what would go, and send nothing")
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    parser.add_argument("--overwrite", action="store_true", help="also where the repository holds something else")
    parser.add_argument(
        "--revision", default="main", help="branch; made where it does not exist (default: %(default)s)"
    )
    parser.add_argument("--tag", help="name for the commit, such as v1")
    parser.add_argument("--message", default="Publish MMCLIP", help="of the commit (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.card and (args.license or args.results):
        parser.error("--license and --results make a card; with --card all of that stands in the file itself")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    api = HfApi()
    if not args.dry_run:
        check_token(api)  # before the long part
    about = read_about(args.about, license=args.license)
    release = prepare(
        args.model,
        args.repo_id,
        about,
        run_dir=args.run_dir,
        results=args.results,
        card_file=args.card,
        public=args.public,
    )
    plan = make_plan(
        api,
        args.repo_id,
        release.files,
        release.card,
        revision=args.revision,
        public=args.public,
        overwrite=args.overwrite,
        stays=release.stays,
        offline_ok=args.dry_run,
    )
    print(plan.table())
    if args.dry_run:
        print(f"\nThe card, README.md:\n\n{release.card}")
        return
    done = push(api, plan, message=args.message, tag=args.tag)
    said = f"sent {', '.join(done.sent)}" if done.sent else "nothing had changed"
    print(f"{done.url} is at {done.commit}: {said}\nLoad it with revision={(args.tag or done.commit)!r}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:  # what is wrong, without the way it took
        sys.exit(f"{type(error).__name__}: {error}")
