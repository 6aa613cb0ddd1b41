"""Trainer.push_to_hub with our card: only what others need goes to the Hub, in whole commits, privately."""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from ..hub.files import check_weights, collect_files
from ..hub.model_card import build_card, read_about
from ..hub.preparing import check_card, check_may_be_public, validation_of_run
from ..hub.publishing import Published, check_token, hub_errors, make_plan, push
from ..hub.training_record import Run, training_record, validation_of


logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """A Trainer whose `push_to_hub`, `hub_strategy` and `create_model_card` are those of MMCLIP.

    `record` is the content of training_record.json, from which the card is made; without one it is made of the
    training arguments, and `args.hub_card` must describe the data. What is wrong with the card, the token or the
    repository is said before training, not after it.
    """

    record: dict | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, private unless `private` or `args.hub_private_repo` is False.

        Raises `ValueError` for a card that would lack licence, training data or results, and for a repository that
        holds something else; PermissionError without a token that may write.
        """
        if not self.is_world_process_zero():
            return
        api = HfApi(token=token or self.args.hub_token)
        user = check_token(api)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        repo_id = name if "/" in name else f"{user}/{name}"
        private = self.args.hub_private_repo if private is None else private
        self._is_public = private is False
        if self.args.push_to_hub and (self.eval_dataset is None or self.args.eval_strategy == "no"):
            raise ValueError(
                "`push_to_hub` needs results for the model card: give validation rows and `eval_strategy`, or publish "
                "afterwards with examples/push_to_hub.py."
            )
        card = self._card(repo_id, self._run(keeps_best=False))
        check_card(card, results="none")
        if self._is_public:
            check_may_be_public(self._run(keeps_best=False), self._config(), self._about())
        plan = make_plan(api, repo_id, {}, card, revision=self.args.hub_revision or "main", public=self._is_public)
        if plan.is_new:
            with hub_errors(api, repo_id):
                api.create_repo(repo_id, private=plan.private)
        self.hub_model_id, self.push_in_progress = repo_id, None

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Published | Future | None:
        """Save the model as it is now and push it with its card; all processes must call it.

        Returns what was published, a Future of it where not `blocking`, None on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        elif private is False:
            raise ValueError(
                f"`private=False` would not make {self.hub_model_id} public, as it is there already. Publish with "
                "examples/push_to_hub.py --public, which asks what the terms of the data allow."
            )
        folder = Path(self.args.output_dir) / "hub" / "end"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # of a push that failed
        self.save_model(str(folder), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        check_weights(folder)
        card = self._card(self.hub_model_id, self._run(self.args.load_best_model_at_end))
        check_card(card, results="validation")
        options = {"token": token, "revision": revision}
        if blocking:
            return self._push_folder(folder, card, commit_message, **options)
        return HfApi().run_as_future(self._push_folder, folder, card, commit_message, **options)

    def create_model_card(self) -> None:
        """Write the card of the model as it is now to README.md in `args.output_dir`, whatever it lacks."""
        if self.is_world_process_zero():
            name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self._card(name, self._run(self.args.load_best_model_at_end)).save(Path(self.args.output_dir, "README.md"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint beside the training, unless the last push is still going on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        card = self._card(self.hub_model_id, self._run(keeps_best=False))
        folder = Path(self.args.output_dir) / "hub" / Path(checkpoint_folder).name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            check_card(card, results="none")
            folder.mkdir(parents=True)
            for name in collect_files(checkpoint_folder)[0]:
                _link(Path(checkpoint_folder, name), folder / name)  # the Trainer may delete the checkpoint meanwhile
        except (OSError, ValueError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning(f"{checkpoint_folder} is not pushed, and training goes on. {error}")
            return
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        reached = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        job = HfApi().run_as_future(self._push_beside_training, folder, card, f"Training in progress, {reached}")
        self.push_in_progress = PushInProgress([job])

    def _push_beside_training(self, folder: Path, card: ModelCard, message: str) -> None:
        try:
            self._push_folder(folder, card, message)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning(f"{message}: the push failed, and training goes on. {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # links hold weights that the Trainer has deleted

    def _push_folder(
        self, folder: Path, card: ModelCard, message: str, token: str | None = None, revision: str | None = None
    ) -> Published:
        api = HfApi(token=token or self.args.hub_token)
        plan = make_plan(
            api,
            self.hub_model_id,
            collect_files(folder)[0],
            card,
            revision=revision or self.args.hub_revision or "main",
            public=self._is_public,
        )
        published = push(api, plan, message=message)
        shutil.rmtree(folder)
        return published

    # -------------------------------------------------------------------------------------------------------- the card

    def _config(self):
        return self.accelerator.unwrap_model(self.model).config

    def _about(self):
        return read_about(self.args.hub_card)

    def _run(self, keeps_best: bool) -> Run:
        if self.record is None:
            self.record = training_record((self.args,))
        state = getattr(self, "state", None)
        if state is None:  # not yet
            return Run(self.record)
        history = state.log_history
        return Run(
            record=self.record,
            seconds=next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None),
            steps=state.global_step,
            validation=validation_of(vars(state), keeps_best),
        )

    def _card(self, repo_id: str, run: Run) -> ModelCard:
        evaluations = [] if run.validation is None else [validation_of_run(run)]
        return build_card(repo_id, self._config(), run, evaluations, self._about())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
