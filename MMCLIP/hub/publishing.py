"""Into a Hub repository: what would change there, and one commit that changes it.

    plan = make_plan(api, "me/model", files, card)
    push(api, plan)

A commit is whole or does not happen. Large files that arrived before an interruption are not sent again, so that a
second call goes on where the first one stopped.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from .files import CARD, is_published


NEW, CHANGED, UNCHANGED, REMOVED, UNKNOWN = "new", "changed", "unchanged", "removed", "not compared"
# a repository that holds nothing else is as good as empty
_OF_NO_WEIGHT = (".gitattributes", CARD, "LICENSE", ".gitignore")


@dataclass(frozen=True)
class PlannedFile:
    """`content` is a file here or its bytes, None for one that is removed there; `size` in bytes."""

    name: str
    content: Path | bytes | None
    size: int
    status: str


@dataclass
class Plan:
    """What a push would do. `parent` is the commit that it was compared with, None where the repository is new."""

    repo_id: str
    revision: str
    private: bool
    files: list[PlannedFile] = field(default_factory=list)
    stays: list[str] = field(default_factory=list)
    is_new: bool = False
    needs_branch: bool = False
    parent: str | None = None
    problem: str = ""

    @property
    def changes(self) -> list[PlannedFile]:
        return [file for file in self.files if file.status not in (UNCHANGED, UNKNOWN)]

    def table(self) -> str:
        """A line for each file: status, bytes, name; and what stays here."""
        kind = f"{'private' if self.private else 'public'}{', a new repository' if self.is_new else ''}"
        lines = [f"{self.repo_id} ({kind}), revision {self.revision}"]
        if self.problem:
            lines.append(f"not compared with what is there: {self.problem}")
        lines += [f"  {file.status:<12} {file.size:>15,}  {file.name}" for file in self.files]
        sent = [file.size for file in self.files if file.status in (NEW, CHANGED, UNKNOWN)]
        lines.append(f"{len(sent)} files to send, {sum(sent):,} bytes")
        if self.stays:
            lines.append(f"not for others, stays here: {', '.join(self.stays)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Published:
    """The commit of a push, also where nothing had changed; `sent` are the files that it changed."""

    repo_id: str
    commit: str
    url: str
    sent: list[str]


def make_plan(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    card: ModelCard,
    *,
    revision: str = "main",
    public: bool = False,
    overwrite: bool = False,
    stays: list[str] | None = None,
    offline_ok: bool = False,
) -> Plan:
    """Compare `files` and `card` with the repository, which is only read.

    A file that is not among them goes away there only if it is one of a saved model, such as a shard of larger weights
    before. Raises `ValueError` for a repository that holds something else than an MMCLIP, unless `overwrite`, for one
    of another visibility than asked for, and for a card that the Hub does not take. Without a connection it raises
    ConnectionError, or with `offline_ok` gives a plan that compares nothing.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The repository must be named OWNER/NAME, but is {repo_id!r}.")
    contents = dict(sorted(files.items())) | {CARD: str(card).encode()}
    plan = Plan(repo_id, revision, private=not public, stays=list(stays or ()))
    there = {}
    try:
        with hub_errors(api, repo_id):
            _validate(api, card)
            there = _remote_files(api, plan)
            if plan.parent is not None and not overwrite:
                _check_is_ours(api, plan, there)
    except ConnectionError as error:
        if not offline_ok:
            raise
        plan.problem = str(error)
    if plan.private == public:
        how = "change that in its settings" if public else "pass --public (in training `hub_private_repo: false`)"
        raise ValueError(f"{repo_id} is {'private' if plan.private else 'public'}: {how}, or choose another name.")
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        status = UNKNOWN if plan.problem else _status(content, size, there.get(name))
        plan.files.append(PlannedFile(name, content, size, status))
    gone = [name for name in there if name not in contents and is_published(name)]
    plan.files += [PlannedFile(name, None, there[name].size, REMOVED) for name in sorted(gone)]
    return plan


def _validate(api: HfApi, card: ModelCard) -> None:
    """The Hub's own check of the front matter."""
    # not `card.validate()`: before huggingface_hub 2 that sends the card to huggingface.co, whatever the endpoint is
    body = {"repoType": "model", "content": str(card)}
    headers = {"Accept": "text/plain"}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
    if response.status_code == 400:
        raise ValueError(f"The Hub does not take the front matter of the card: {response.text}")
    hf_raise_for_status(response)


def _remote_files(api: HfApi, plan: Plan) -> dict:
    """name -> what the Hub says of each file at the revision of `plan`, which learns what the repository is."""
    try:
        about = api.model_info(plan.repo_id)
    except RepositoryNotFoundError:
        plan.is_new = True
        plan.needs_branch = plan.revision != "main"
        return {}
    plan.private = bool(about.private)
    try:
        plan.parent = api.model_info(plan.repo_id, revision=plan.revision).sha
    except RevisionNotFoundError:
        plan.needs_branch, plan.parent = True, about.sha
    entries = api.list_repo_tree(plan.repo_id, recursive=True, revision=plan.parent)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _check_is_ours(api: HfApi, plan: Plan, there: Mapping) -> None:
    others = [name for name in there if name not in _OF_NO_WEIGHT]
    if not others:
        return
    model_type = None
    if "config.json" in there:
        path = api.hf_hub_download(plan.repo_id, "config.json", revision=plan.parent)
        with contextlib.suppress(json.JSONDecodeError):
            model_type = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    if model_type != "mmclip":
        holds = f"a model of the type {model_type!r}" if model_type else ", ".join(sorted(others)[:5])
        raise ValueError(
            f"{plan.repo_id} holds something else already: {holds}. Choose another name, or let "
            "examples/push_to_hub.py put the model there with --overwrite; files of other names stay."
        )


def _status(content: Path | bytes, size: int, remote) -> str:
    if remote is None:
        return NEW
    if remote.size != size:
        return CHANGED
    if remote.lfs is not None:
        same = _hash(content, hashlib.sha256()) == remote.lfs.sha256
    else:
        same = _hash(content, hashlib.sha1(b"blob %d\0" % size)) == remote.blob_id
    return UNCHANGED if same else CHANGED


def _hash(content: Path | bytes, digest) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- push


def check_token(api: HfApi) -> str:
    """The name of the user; raises PermissionError without a token, and for one that may only read."""
    with hub_errors(api, ""):
        who = api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"The token of {who['name']} may only read. Make one with write permission at "
            f"{api.endpoint}/settings/tokens, then `hf auth login` or set HF_TOKEN."
        )
    return who["name"]


def push(api: HfApi, plan: Plan, *, message: str = "Publish MMCLIP", tag: str | None = None) -> Published:
    """Do what `plan` says, in one commit, and none where nothing changes; then set `tag`.

    Raises ValueError for a tag that stands at another commit, before anything is sent; PermissionError, ConnectionError
    (call again to go on), and RuntimeError where somebody else has pushed since the plan was made.
    """
    with hub_errors(api, plan.repo_id):
        if tag is not None and not plan.is_new:
            _check_tag(api, plan, tag)
        if plan.is_new:
            api.create_repo(plan.repo_id, private=plan.private, exist_ok=False)
        if plan.needs_branch:
            api.create_branch(plan.repo_id, branch=plan.revision, revision=plan.parent)
        commit = plan.parent
        if plan.changes:
            operations = [
                CommitOperationDelete(file.name)
                if file.content is None
                else CommitOperationAdd(
                    file.name, file.content if isinstance(file.content, bytes) else str(file.content)
                )
                for file in plan.changes
            ]
            commit = api.create_commit(
                plan.repo_id,
                operations,
                commit_message=message,
                revision=plan.revision,
                parent_commit=plan.parent,
            ).oid
        if tag is not None:
            api.create_tag(plan.repo_id, tag=tag, revision=commit, exist_ok=True)
    return Published(plan.repo_id, commit, f"{api.endpoint}/{plan.repo_id}", [file.name for file in plan.changes])


def _check_tag(api: HfApi, plan: Plan, tag: str) -> None:
    found = next((ref for ref in api.list_repo_refs(plan.repo_id).tags if ref.name == tag), None)
    if found is not None and (plan.changes or found.target_commit != plan.parent):
        raise ValueError(f"{plan.repo_id} has a tag {tag} already, at {found.target_commit[:7]}. Choose another.")


@contextlib.contextmanager
def hub_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """What the Hub and the network say, as an error that tells what to do."""
    login = "Log in with `hf auth login`, or set HF_TOKEN to a token with write permission."
    lost = (
        f"{api.endpoint} cannot be reached, or the connection broke{{}}. Check the network and call again: what has "
        "arrived is not sent twice."
    )
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed or compared. Unset it.") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"There is no token of the Hub on this machine. {login}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = getattr(error, "server_message", None) or str(error).splitlines()[0]
        if status == 401 and not repo_id:
            raise PermissionError(f"{api.endpoint} does not know the token. {login}") from error
        if isinstance(error, RepositoryNotFoundError):
            raise PermissionError(f"{repo_id} does not exist, or the token may not see it. {login}") from error
        if status in (401, 403):
            raise PermissionError(f"The token may not write to {repo_id}: {said}. {login}") from error
        if status == 409:
            raise PermissionError(f"{repo_id} exists, but this token may not see it: {said}. {login}") from error
        if status == 400:
            raise ValueError(f"{api.endpoint} refuses the request: {said}.") from error
        if status == 412:
            raise RuntimeError(f"Somebody else has pushed to {repo_id} since it was compared. Call again.") from error
        raise ConnectionError(f"{api.endpoint} answered {status}: {said}.") from error
    except (
        HTTPError,
        LocalEntryNotFoundError,
    ) as error:  # what the HTTP library raises: no route, time-outs, a broken connection
        raise ConnectionError(lost.format(f" ({type(error).__name__})")) from error
    except RuntimeError as error:
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise ConnectionError(lost.format(f" ({type(error.__cause__).__name__})")) from error  # of an upload
