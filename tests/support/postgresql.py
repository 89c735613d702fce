"""A PostgreSQL server of a test's own, on loopback, where the programs are installed."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest

USUAL = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin")


def program(name: str) -> str | None:
    """The path of one of the server's programs."""
    found = shutil.which(name)
    others = sorted(str(path) for place in USUAL for path in Path("/").glob(f"{place[1:]}/{name}"))
    return found or (others[-1] if others else None)


@contextmanager
def serve() -> Iterator[str]:
    """A server in a folder of its own, and the URL of its database; the test is skipped where there are no programs."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    # The server refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    with TemporaryDirectory(prefix="postgresql-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        data = ("-D", str(folder / "data"))
        _run(user, initdb, *data, "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        _run(user, pg_ctl, *data, "-l", str(folder / "log"), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            _run(user, pg_ctl, *data, "-m", "immediate", "-w", "stop")


def _run(user: str | None, *command: str) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    # Not through pipes, which the server would keep open.
    with TemporaryFile("w+") as said:
        done = subprocess.run(command, user=user, stdout=said, stderr=said, check=False, cwd="/", env=environment)
        said.seek(0)
        assert done.returncode == 0, said.read()
