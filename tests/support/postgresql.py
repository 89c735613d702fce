"""A PostgreSQL server of a test's own, on loopback, where the programs are installed."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USUAL = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin")


def program(name: str) -> str | None:
    """The path of one of the server's programs."""
    found = shutil.which(name)
    others = sorted(str(path) for place in USUAL for path in Path("/").glob(f"{place[1:]}/{name}"))
    return found or (others[-1] if others else None)


def _run(user: str | None, *command: str) -> None:
    done = subprocess.run(command, user=user, capture_output=True, text=True, check=False, cwd="/", env=_environment())
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A server with its data below `folder`, and the URL of its database; the test is skipped where there is none."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    # The server refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    folder.mkdir(parents=True)
    if user is not None:
        shutil.chown(folder, user)
        for parent in folder.parents:
            if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    data = folder / "data"
    _run(user, initdb, "-D", str(data), "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    _run(user, pg_ctl, "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    finally:
        _run(user, pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop")
