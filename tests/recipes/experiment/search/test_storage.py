"""The database of a study: one process at a time changes a file of SQLite, what cannot be opened is a sentence."""

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.search.plan import StudyPlan
from recipes.experiment.search.space import draw, log_uniform
from recipes.experiment.search.storage import check_storage, load_optuna, open_storage, reaching, shown
from recipes.experiment.search.study import open_study, prepare

optuna: Any = pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
sqlalchemy: Any = pytest.importorskip("sqlalchemy")


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"^search needs Optuna .*; run: pip install 'bilevel\[search\]'"):
        load_optuna()


@pytest.mark.parametrize("given", [True, False])
def test_a_transaction_excludes_others_before_it_reads(tmp_path: Path, given: bool) -> None:
    file = tmp_path / "study.db"
    storage = open_storage(tmp_path, f"sqlite:///{file}" if given else None)
    other = sqlite3.connect(file, timeout=0)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a {b}?c=d #%20"
    folder.mkdir()
    open_storage(folder, None)
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert shown(folder, None) == str(folder / "study.db")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage: the URL is not of the form dialect"),
        ("postgresql://user:secret@127.0.0.1:port/x", "--storage: the URL is not of the form dialect"),
        ("postgresql://user:secret/x", "--storage: the URL is not of the form dialect"),
        ("nothing://127.0.0.1/x?password=secret", r"--storage: nothing://127\.0\.0\.1/x\?password=hidden cannot"),
        ("sqlite://", "--storage: sqlite:// is in memory"),
        ("nothing://user:secret@127.0.0.1/x", r"--storage: nothing://user:\*\*\*@127\.0\.0\.1/x cannot be opened"),
        ("sqlite:////nowhere/at/all.db", "--storage: sqlite:////nowhere/at/all.db cannot be opened .*unable to open"),
    ],
)
def test_what_cannot_be_opened_is_named_without_a_password(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        open_storage(tmp_path, url)
    assert "secret" not in str(refused.value)


def test_a_check_makes_no_file(tmp_path: Path) -> None:
    check_storage(tmp_path, f"sqlite:///{tmp_path / 'new.db'}")
    with pytest.raises(ConfigError, match=r"none/new\.db cannot be opened .*unable to open"):
        check_storage(tmp_path, f"sqlite:///{tmp_path / 'none' / 'new.db'}")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(ConfigError, match=r"text\.db cannot be opened .*not a database"):
        check_storage(tmp_path, f"sqlite:///{tmp_path / 'text.db'}")
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is in the extra search")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://user:secret@127.0.0.1:{probe.getsockname()[1]}/x"
        with pytest.raises(ConfigError, match=r"user:\*\*\*@127\.0\.0\.1:\d+/x cannot be opened") as refused:
            open_storage(tmp_path, url)
    assert "secret" not in str(refused.value)


def test_a_database_that_stops_answering_is_a_sentence(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, None)
    (tmp_path / "study.db").write_bytes(b"no database" * 100)
    sentence = r"does not answer .*; nothing is lost, the same command continues"
    with pytest.raises(ConfigError, match=sentence), reaching(tmp_path, None):
        optuna.create_study(storage=storage)


def test_the_dashboard_shows_the_study(tmp_path: Path) -> None:
    program = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("optuna-dashboard, of the extra search, is not installed")
    space = {"rate": log_uniform(1e-4, 1.0)}
    plan = StudyPlan(tmp_path, space, tuple(draw(space, 3, 0)), 3, 60.0)
    prepare(plan, lambda: True)
    with open_study(plan) as study:
        assert study.missing() == [0, 1, 2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, f"sqlite:///{tmp_path / 'study.db'}", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        listed = ask(server, f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        assert [one["study_name"] for one in listed] == [json.loads((tmp_path / "study.json").read_text())["study"]]
        trials = ask(server, f"http://127.0.0.1:{port}/api/studies/{listed[0]['study_id']}?after=0")["trials"]
        assert [(trial["state"], trial["user_attrs"]) for trial in trials] == [
            ("Waiting", [{"key": "id", "value": str(number)}]) for number in range(3)
        ]
    finally:
        server.terminate()
        server.wait()


def ask(server: subprocess.Popen[bytes], url: str) -> Any:
    """What a server that is just starting answers."""
    while True:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)
