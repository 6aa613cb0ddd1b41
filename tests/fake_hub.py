"""A small Hub on localhost, in memory: what huggingface_hub needs to create, push, list, tag and load model repos.

    with FakeHub() as hub:
        HfApi(endpoint=hub.url, token=WRITE_TOKEN).create_repo("tester/model")

Large files go the way of git LFS, so run it with HF_HUB_DISABLE_XET=1. It checks what the real one checks and tests
rely on: tokens and their roles, private repositories, hashes of uploads, the parent of a commit, and the metadata of a
card. After `hub.fail_after` uploads of large files the next ones break; `hub.log` holds every request, `hub.uploads`
the bytes of the large files that arrived.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants


USER = "tester"
WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN = "hf_write", "hf_read", "hf_stranger"
ROLES = {WRITE_TOKEN: (USER, "write"), READ_TOKEN: (USER, "read"), STRANGER_TOKEN: ("stranger", "write")}
# a few of https://huggingface.co/docs/hub/repositories-licenses
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other"}
FRONT_MATTER = re.compile(r"^---\n(.*?)\n---\n", flags=re.DOTALL)


@dataclass
class Repository:
    """`commits` maps each commit to its files (path -> content), oldest first; `refs` a branch or tag to a commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # sha256 of the contents that are stored as large files
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Those of main as it is now."""
        return self.commits[self.branches["main"]]


class FakeHub(ThreadingHTTPServer):
    """`lfs_from` is the size in bytes from which a file counts as large."""

    daemon_threads = True

    def __init__(self, lfs_from: int = 1 << 16):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.lfs_from = lfs_from
        self.fail_after: int | None = None
        self.log: list[str] = []
        self.uploads: list[int] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


def card_errors(content: str) -> list[str]:
    """What the Hub would find wrong with the front matter of a README.md."""
    match = FRONT_MATTER.match(content)
    data = yaml.safe_load(match.group(1)) if match else {}
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for entry in data.get("model-index", []):
        if not entry.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            if not result.get("task", {}).get("type") or not {"type", "name"} <= result.get("dataset", {}).keys():
                errors.append('"model-index[0].results[0]" needs a task and a dataset')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [])):
                errors.append('"model-index[0].results[0].metrics[0]" needs a type and a value')
    for name in data.get("datasets", []):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
            errors.append(f'"datasets[0]" must be the id of a data set, not {name!r}')
    return errors


class _Answer(Exception):
    """Ends a request with a status; `code` is the X-Error-Code that huggingface_hub reads."""

    def __init__(self, status: int, content=b"", code: str = "", headers: dict | None = None):
        self.status, self.content, self.headers = status, content, dict(headers or {})
        if code:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": code}
            self.content = {"error": code}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, or each answer waits 40 ms for the other side

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.read_body()
        self.server.log.append(f"{self.command} {path}")
        try:
            with self.server.lock:
                self.route(path)
            raise _Answer(404, {"error": f"the fake Hub has no {self.command} {path}"})
        except _Answer as answer:
            content, headers = answer.content, answer.headers
            if not isinstance(content, bytes):
                content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
            self.send_response(answer.status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except ConnectionAbortedError:
            self.close_connection = True
            self.connection.close()

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str):
        routes = (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/validate-yaml", self.validate_yaml),
            (r"/api/repos/create", self.create),
            (r"/lfs/([0-9a-f]{64})", self.upload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/api/models/([^/]+/[^/]+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/refs", self.refs),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/(branch|tag)/([^/]+)", self.name_commit),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        for pattern, handle in routes:
            if match := re.fullmatch(pattern, path):
                handle(*match.groups())

    # ------------------------------------------------------------------------------------------------- who may do what

    def who(self) -> tuple[str | None, str]:
        """(user, role) of the request; a token that nobody has is 401."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            said = "Invalid credentials in Authorization header"
            raise _Answer(401, {"error": said}, headers={"X-Error-Message": said})
        return ROLES.get(token, (None, "none"))

    def repository(self, name: str, to_write: bool = False) -> Repository:
        user, role = self.who()
        owner = name.split("/")[0]
        repository = self.server.repos.get(name)
        if repository is None or (repository.private and user != owner):
            raise _Answer(404 if user else 401, code="RepoNotFound")
        if to_write and (user != owner or role != "write"):
            raise _Answer(403, {"error": "You don't have the rights to write here"})
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise _Answer(404, code="RevisionNotFound")
        return commit

    def whoami(self):
        user, role = self.who()
        if user is None:
            raise _Answer(401, {"error": "Unauthorized"})
        access = {"displayName": "test", "role": role}
        raise _Answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": access}})

    # ---------------------------------------------------------------------------------------------------- repositories

    def create(self):
        told = json.loads(self.body)
        user, role = self.who()
        owner = told.get("organization") or user
        name = f"{owner}/{told['name']}"
        if user is None:
            raise _Answer(401, {"error": "Unauthorized"})
        if name in self.server.repos and user == owner:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        if user != owner or role != "write":
            raise _Answer(403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'})
        private = told.get("visibility") == "private" or told.get("private") is True
        self.server.repos[name] = Repository(private)
        raise _Answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str = "main"):
        repository = self.repository(name)
        commit = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        about = {"private": repository.private, "sha": commit, "siblings": siblings, "tags": []}
        raise _Answer(200, {"_id": name, "id": name, "modelId": name, "downloads": 0, "likes": 0, **about})

    def refs(self, name: str):
        repository = self.repository(name)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        found = {
            kind: [{"name": n, "ref": f"refs/{part}/{n}", "targetCommit": c} for n, c in there.items()]
            for kind, (part, there) in kinds.items()
        }
        raise _Answer(200, {**found, "converts": []})

    def name_commit(self, name: str, kind: str, what: str):
        """A new branch is named in the path, a new tag in the body, where the path names what is tagged."""
        repository, told = self.repository(name, to_write=True), json.loads(self.body or b"{}")
        there = repository.branches if kind == "branch" else repository.tags
        new, at = (what, told.get("startingPoint", "main")) if kind == "branch" else (told["tag"], what)
        if new in there:
            raise _Answer(409, {"error": f"{new} already exists"})
        there[new] = self.revision(repository, at)
        raise _Answer(200, {})

    def tree(self, name: str, revision: str, folder: str = ""):
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        entries = []
        for path, content in sorted(files.items()):
            if not folder or path.startswith(f"{folder}/"):
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
                sha256 = hashlib.sha256(content).hexdigest()
                if sha256 in repository.lfs:
                    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
                entries.append(entry)
        raise _Answer(200, entries)

    def resolve(self, name: str, revision: str, path: str):
        repository = self.repository(name)
        commit = self.revision(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise _Answer(404, code="EntryNotFound", headers={"X-Repo-Commit": commit})
        tag = hashlib.sha256(content).hexdigest()
        raise _Answer(200, content, headers={"X-Repo-Commit": commit, "ETag": f'"{tag}"'})

    # --------------------------------------------------------------------------------------------------------- uploads

    def validate_yaml(self):
        errors = card_errors(json.loads(self.body)["content"])
        if self.headers.get("Accept") == "text/plain":
            raise _Answer(400 if errors else 200, "\n".join(errors).encode(), headers={"Content-Type": "text/plain"})
        about = {"errors": [{"message": error} for error in errors], "warnings": []}
        raise _Answer(400 if errors else 200, about)

    def preupload(self, name: str, revision: str):
        self.revision(self.repository(name, to_write=True), revision)
        files = []
        for told in json.loads(self.body)["files"]:
            mode = "lfs" if told["size"] >= self.server.lfs_from else "regular"
            files.append({"path": told["path"], "uploadMode": mode, "shouldIgnore": False})
        raise _Answer(200, {"files": files})

    def lfs_batch(self, name: str):
        self.repository(name, to_write=True)
        objects = []
        for told in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{told['oid']}"}}
            actions = {} if told["oid"] in self.server.blobs else {"actions": upload}
            objects.append({"oid": told["oid"], "size": told["size"], **actions})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, sha256: str):
        if self.server.fail_after is not None and len(self.server.uploads) >= self.server.fail_after:
            raise ConnectionAbortedError
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Answer(422, {"error": "the content has another hash"})
        self.server.blobs[sha256] = self.body
        self.server.uploads.append(len(self.body))
        raise _Answer(200)

    def commit(self, name: str, branch: str):
        repository = self.repository(name, to_write=True)
        if branch not in repository.branches:
            raise _Answer(404, code="RevisionNotFound")
        parent = repository.branches[branch]
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                if value.get("parentCommit", parent) != parent:
                    raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
                repository.lfs.add(value["oid"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Answer(400, {"error": f"the fake Hub knows no {key}"})
        commit = hashlib.sha1(parent.encode() + self.body).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        url = f"{self.server.url}/{name}/commit/{commit}"
        raise _Answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def connect(hub: FakeHub, monkeypatch, home, token: str | None = WRITE_TOKEN) -> None:
    """From now on this process takes `hub` for the Hub, `token` for the one of the user, `home` for its cache."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
