"""A stand-in for the Hugging Face Hub on this machine: the part of its API that a download and a push use.

It answers as the Hub does: small files behind a relative redirect, weights behind an absolute one with the hash and
size of what is linked, commit and etag in the headers, errors as `X-Error-Code`. Folders are read when asked for.
A push makes a repository, asks which files are large, puts those elsewhere under their hash, and names all in a commit.
"""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = ("models", "datasets")
TOKEN = "hf_" + "standIn" * 5  # what a test logs in with; nobody's


@dataclass
class Repo:
    "What is at one name: a folder for each revision, and who may read it."

    name: str
    kind: str
    revisions: dict[str, Path]
    gated: bool
    private: bool = False
    commits: list = field(default_factory=list)  # pushed, oldest first: (summary, paths)

    def commit(self, revision: str) -> str | None:
        "The hash of a revision, given by its name or by that hash."
        pushed = f"#{len(self.commits)}" if self.commits else ""
        hashes = {r: hashlib.sha1(f"{self.kind}/{self.name}@{r}{pushed}".encode()).hexdigest() for r in self.revisions}
        return hashes.get(revision) or (revision if revision in hashes.values() else None)

    def folder(self, commit: str) -> Path:
        return next(path for name, path in self.revisions.items() if self.commit(name) == commit)

    def files(self, commit: str) -> list[Path]:
        return sorted(p for p in self.folder(commit).rglob("*") if p.is_file())


@dataclass
class Hub:
    "Serve folders as repositories from a thread, until `close`: `with Hub(tmp_path) as hub: hub.add(...)`."

    home: Path  # the HF_HOME of who asks: its cache and, after `log_in`, its token
    repos: dict = field(default_factory=dict)
    allowed: set = field(default_factory=set)  # tokens that have accepted every licence
    writes: set = field(default_factory=set)  # owners under whose names the token may write
    stored: dict = field(default_factory=dict)  # sha256 → bytes: large files that were sent
    asked: list = field(default_factory=list)  # (method, path, token or "")
    sent: list = field(default_factory=list)  # what was sent, in bytes
    stall: threading.Event | None = None  # whoever sends a large file waits for it
    busy: threading.Event = field(default_factory=threading.Event)  # somebody is sending one

    def __post_init__(self):
        self.server = Server(("127.0.0.1", 0), type("Asked", (Answer,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"  # another host: no token goes there
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def add(self, name: str, folder: Path, kind: str = "models", revision: str = "main", gated: bool = False) -> str:
        "Put a folder at `owner/name`; call again for a second revision. Returns the name."
        repo = self.repos.setdefault((kind, name), Repo(name, kind, {}, gated))
        repo.revisions[revision] = Path(folder)
        return name

    def log_in(self, licence: bool = False, writes: tuple = ()) -> None:
        "Leave a token where `hf auth login` would; has its owner accepted the licences, and where may they write?"
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "token").write_text(TOKEN)
        self.writes |= {*writes}
        if licence:
            self.allowed.add(TOKEN)

    @property
    def env(self) -> dict[str, str]:
        "For a child process: `subprocess.run(..., env=os.environ | hub.env)`."
        return dict(
            HF_ENDPOINT=self.url,
            HF_HOME=str(self.home),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_TOKEN="",
        )

    def patch(self, monkeypatch) -> None:
        "For this process: the libraries read their environment once, on import."
        import datasets.config
        from huggingface_hub import constants, hf_api

        cache = str(self.home / "hub")
        for name, value in dict(
            ENDPOINT=self.url,
            HUGGINGFACE_CO_URL_TEMPLATE=self.url + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_CACHE=cache,
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_TELEMETRY=True,
            HF_TOKEN_PATH=str(self.home / "token"),
        ).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in dict(
            HF_ENDPOINT=self.url,
            HUB_DATASETS_URL=self.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
            HF_HUB_OFFLINE=False,
            HF_DATASETS_OFFLINE=False,
            HF_DATASETS_CACHE=self.home / "datasets",
            HF_MODULES_CACHE=str(self.home / "modules"),
        ).items():
            monkeypatch.setattr(datasets.config, name, value)

    def close(self) -> None:
        "The server is gone: whoever asks is refused a connection."
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
        self.server.server_close()
        self.server.hang_up()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Server(ThreadingHTTPServer):
    "A thread for each connection; `hang_up` ends those that are kept alive."

    daemon_threads = True

    def __init__(self, *args):
        self.lines = []
        super().__init__(*args)

    def process_request(self, request, address):
        self.lines.append(request)
        super().process_request(request, address)

    def hang_up(self):
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


class Refused(Exception):
    "status, X-Error-Code, X-Error-Message"


class Answer(BaseHTTPRequestHandler):
    "One request. `hub` is set by the server that it belongs to."

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def body(self) -> bytes:
        "What was sent, whole or in chunks."
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self):
        self.sent = self.body()
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        self.hub.asked.append((self.command, url.path, token))
        if self.command in ("POST", "PUT"):
            self.hub.sent.append(self.sent)
        try:
            if token not in ("", TOKEN):
                raise Refused(401, "", "Invalid credentials in Authorization header")
            self.route([unquote(x) for x in url.path.strip("/").split("/")], parse_qs(url.query), token)
        except Refused as e:
            status, code, message = e.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.reply(status, json.dumps({"error": message}).encode(), headers)

    def route(self, parts: list[str], query: dict, token: str):
        match parts:
            case ["cdn", kind, owner, name, commit, *rest]:
                self.send_file(self.hub.repos[kind, f"{owner}/{name}"].folder(commit) / "/".join(rest))
            case ["lfs", sha] if self.command == "PUT":
                self.keep(sha)
            case ["api", "repos", "create"]:
                self.create(json.loads(self.sent), token)
            case ["api", "validate-yaml"]:
                self.validate(json.loads(self.sent)["content"])
            case ["api", "models", owner, name, "preupload", _]:
                self.preupload(self.writable(f"{owner}/{name}", token))
            case ["api", "models", owner, name, "commit", revision]:
                self.take(self.writable(f"{owner}/{name}", token), revision)
            case [owner, name, "info", "lfs", "objects", what] if name.endswith(".git"):
                self.objects(self.writable(f"{owner}/{name.removesuffix('.git')}", token), what)
            case ["api", "resolve-cache", kind, owner, name, commit, *rest]:
                repo = self.repo(kind, f"{owner}/{name}", token)
                self.send_file(repo.folder(commit) / "/".join(rest), {"X-Repo-Commit": commit})
            case ["api", kind, owner, name, *rest] if kind in KINDS:
                self.api(self.repo(kind, f"{owner}/{name}", token, public=True), rest, query)
            case ["datasets", owner, name, "resolve", revision, *rest]:
                self.resolve(self.repo("datasets", f"{owner}/{name}", token), revision, "/".join(rest))
            case [owner, name, "resolve", revision, *rest]:
                self.resolve(self.repo("models", f"{owner}/{name}", token), revision, "/".join(rest))
            case _:
                raise Refused(404, "", f"nothing at {self.path}")

    def repo(self, kind: str, name: str, token: str, public: bool = False) -> Repo:
        "Whoever is not logged in learns only that there may be nothing, as on the Hub."
        repo = self.hub.repos.get((kind, name))
        if repo is None or repo.private and repo.name.split("/")[0] not in (self.hub.writes if token else ()):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not public and token not in self.hub.allowed:
            why = (
                "and you are not in the authorized list." if token else "and you are not authenticated. Please log in."
            )
            raise Refused(403 if token else 401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted {why}")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        commit = repo.commit(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def api(self, repo: Repo, rest: list[str], query: dict):
        what, revision, *below = rest if len(rest) > 1 else ["", "main"]
        commit = self.revision(repo, revision)
        folder, files = repo.folder(commit), repo.files(commit)
        if what in ("", "revision"):
            names = [{"rfilename": str(f.relative_to(folder))} for f in files]
            about = dict(id=repo.name, modelId=repo.name, sha=commit, private=repo.private, gated=repo.gated)
            return self.send_json(about | dict(siblings=names, tags=[], downloads=0, likes=0, disabled=False))
        if what == "tree":
            return self.send_json(self.tree(folder, "/".join(below), "true" in str(query.get("recursive", "")).lower()))
        if what == "paths-info":
            wanted = json.loads(self.sent)["paths"]
            return self.send_json([entry(folder, folder / p) for p in wanted if (folder / p).exists()])
        raise Refused(404, "", f"nothing at {self.path}")

    def writable(self, name: str, token: str) -> Repo:
        repo = self.repo("models", name, token)
        self.may_write(name.split("/")[0], token)
        return repo

    def may_write(self, owner: str, token: str):
        if not token:
            raise Refused(401, "", "Invalid username or password.")
        if owner not in self.hub.writes:
            raise Refused(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def create(self, wanted: dict, token: str):
        name = f"{wanted['organization']}/{wanted['name']}"
        self.may_write(wanted["organization"], token)
        about = dict(url=f"{self.hub.url}/{name}", name=name)
        if ("models", name) in self.hub.repos:
            return self.reply(409, json.dumps(about | dict(error="You already created this model repo")).encode(), {})
        folder = self.hub.home.with_name("pushed") / name / "0"
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos["models", name] = Repo(name, "models", {"main": folder}, False, private)
        self.send_json(about)

    def validate(self, card: str):
        "The front matter of a README: is it YAML, and are its names such as the Hub has?"
        front = re.match(r"---\n(.*?)\n---", card, re.S)
        data = yaml.safe_load(front[1]) if front else {}
        names = data.get("base_model") or []
        bad = [x for x in ([names] if isinstance(names, str) else names) if not re.fullmatch(r"[\w.-]+/[\w.-]+", x)]
        errors = [dict(message=f'"base_model" with value "{x}" is not valid') for x in bad]
        self.reply(400 if errors else 200, json.dumps(dict(errors=errors, warnings=[])).encode(), {})

    def preupload(self, repo: Repo):
        folder, found = repo.revisions["main"], []
        for file in json.loads(self.sent)["files"]:
            there = folder / file["path"]
            about = dict(path=file["path"], uploadMode="lfs" if large(there) else "regular", shouldIgnore=False)
            found.append(about | (dict(oid=sha256(there) if large(there) else blob(there)) if there.is_file() else {}))
        self.send_json(dict(files=found))

    def objects(self, repo: Repo, what: str):
        "Git LFS: where to put the large files, and are they there?"
        asked = json.loads(self.sent)
        if what == "verify":
            if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
                raise Refused(404, "", "Object not found")
            return self.send_json({})
        place = f"http://localhost:{self.server.server_port}/lfs"  # another host: no token goes there
        verify = dict(href=f"{self.hub.url}/{repo.name}.git/info/lfs/objects/verify")
        for wanted in asked["objects"]:
            if wanted["oid"] not in self.hub.stored:
                wanted["actions"] = dict(upload=dict(href=f"{place}/{wanted['oid']}"), verify=verify)
        self.send_json(dict(transfer="basic", objects=asked["objects"]))

    def keep(self, sha: str):
        self.hub.busy.set()
        if self.hub.stall:
            self.hub.stall.wait(60)
        if hashlib.sha256(self.sent).hexdigest() != sha:
            raise Refused(400, "", "the hash is another one")
        self.hub.stored[sha] = self.sent
        self.reply(200, b"", {})

    def take(self, repo: Repo, revision: str):
        "One commit, whole or not at all: a new folder, and then the revision is that one."
        head, *changes = map(json.loads, self.sent.decode().splitlines())
        parent = head["value"].get("parentCommit")
        if parent and parent != repo.commit(revision):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        old = repo.revisions[revision]
        new = shutil.copytree(old, self.hub.home.with_name("pushed") / repo.name / str(len(repo.commits) + 1))
        for change in changes:
            value = change["value"]
            place = new / value["path"]
            if change["key"] in ("deletedFile", "deletedFolder"):
                place.unlink() if place.is_file() else shutil.rmtree(place)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            stored = change["key"] == "lfsFile"
            place.write_bytes(self.hub.stored[value["oid"]] if stored else base64.b64decode(value["content"]))
        repo.commits.append((head["value"]["summary"], [c["value"]["path"] for c in changes]))
        repo.revisions[revision] = new
        oid = repo.commit(revision)
        self.send_json(dict(commitUrl=f"{self.hub.url}/{repo.name}/commit/{oid}", commitOid=oid, success=True))

    def tree(self, folder: Path, below: str, deep: bool) -> list[dict]:
        place = folder / below
        if not place.is_dir():
            raise Refused(404, "EntryNotFound", f"{below} does not exist")
        return [entry(folder, p) for p in sorted(place.rglob("*") if deep else place.iterdir())]

    def resolve(self, repo: Repo, revision: str, file: str):
        commit = self.revision(repo, revision)
        path = repo.folder(commit) / file
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            raise Refused(404, "EntryNotFound", "Entry not found")
        here = f"{repo.kind}/{repo.name}/{commit}/{file}"
        if large(path):
            linked = {"X-Linked-Etag": f'"{sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            return self.reply(302, b"", headers | linked | {"Location": f"{self.hub.cdn}/{here}"})
        self.reply(307, b"", headers | {"ETag": f'"{blob(path)}"', "Location": f"/api/resolve-cache/{here}"})

    def send_json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path: Path, headers: dict | None = None):
        data = path.read_bytes()
        etag = sha256(path) if large(path) else blob(path)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | (headers or {})
        wanted = self.headers.get("Range")
        if not wanted:
            return self.reply(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(data) - 1)
        self.reply(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".gguf", ".parquet")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob(path: Path) -> str:
    "git's hash of a file"
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(folder: Path, path: Path) -> dict:
    "A line of the tree."
    name = str(path.relative_to(folder))
    if path.is_dir():
        return dict(type="directory", path=name, size=0, oid="0" * 40)
    found = dict(type="file", path=name, size=path.stat().st_size, oid=blob(path))
    if large(path):
        found["lfs"] = dict(oid=sha256(path), size=path.stat().st_size, pointerSize=134)
    return found
