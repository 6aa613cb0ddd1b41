"""The Hub that other tests push to refuses what the real one refuses, and keeps what it was given."""

import pytest
from fake_hub import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, FakeHub, card_errors
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with FakeHub(lfs_from=100) as hub:
        yield hub


def client(hub, token=WRITE_TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def push(hub, **files: bytes) -> str:
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return client(hub).create_commit("tester/m", operations, commit_message="push").oid


def test_what_was_pushed_is_listed_and_read_back_at_every_revision(hub, tmp_path):
    api = client(hub)
    api.create_repo("tester/m", private=True)
    first = push(hub, small=b"a", large=b"b" * 100)
    api.create_tag("tester/m", tag="v1")
    second = push(hub, small=b"c")
    assert [file.path for file in api.list_repo_tree("tester/m")] == [".gitattributes", "large", "small"]
    assert {file.path: file.lfs is not None for file in api.list_repo_tree("tester/m")}["large"]
    for revision, content in ((first, b"a"), ("v1", b"a"), (second, b"c"), ("main", b"c")):
        path = api.hf_hub_download("tester/m", "small", revision=revision, cache_dir=tmp_path)
        assert open(path, "rb").read() == content
    assert hub.uploads == [100] and api.model_info("tester/m").private
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tester/m", revision="v2")


def test_tokens_decide_who_sees_and_who_writes(hub):
    client(hub).create_repo("tester/m", private=True)
    for token in (STRANGER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info("tester/m")
    assert client(hub, READ_TOKEN).model_info("tester/m").id == "tester/m"
    with pytest.raises(HfHubHTTPError, match="403"):
        client(hub, READ_TOKEN).create_commit("tester/m", [CommitOperationAdd("a", b"a")], commit_message="no")
    with pytest.raises(HfHubHTTPError, match="401|Invalid"):
        client(hub, "hf_nobody").whoami()
    assert client(hub, READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"


def test_a_commit_onto_another_parent_is_refused(hub):
    client(hub).create_repo("tester/m")
    first = push(hub, small=b"a")
    push(hub, small=b"b")
    with pytest.raises(HfHubHTTPError, match="412"):
        client(hub).create_commit(
            "tester/m", [CommitOperationAdd("small", b"c")], commit_message="late", parent_commit=first
        )
    assert hub.repos["tester/m"].files["small"] == b"b"


def test_metadata_of_a_card_is_checked():
    assert card_errors("---\nlicense: mit\n---\ntext") == []
    assert "license" in card_errors("---\nlicense: MITT\n---\n")[0]
    assert (
        "metrics"
        in card_errors(
            "---\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: D}\n"
            "    metrics: [{type: roc_auc}]\n---\n"
        )[0]
    )
