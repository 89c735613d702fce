"""Optuna, and the database that a study is kept in: a file of SQLite, or any that SQLAlchemy has a URL for."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy import URL

STUDY = "study.db"
"""The file of an embedded study, in the folder of its search."""

BUSY = 60.0
"""How long a process waits for others that write to a file of SQLite (s)."""


def load_optuna() -> Any:
    """The package, imported when a search needs it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
        import optuna.storages
    except ImportError as error:
        raise ConfigError(f"search needs Optuna ({error}); run: pip install 'bilevel[search]'") from error
    return optuna


def check_storage(directory: Path, url: str | None) -> None:
    """Before a search is begun: that Optuna is there, and that the database answers, in which nothing is made yet.

    Raises:
        ConfigError: as `open_storage`.
    """
    load_optuna()
    if url is None:
        return
    with _opening(directory, url) as sqlalchemy:
        found = _parsed(url)
        file = Path(found.database or "")
        if found.get_backend_name() == "sqlite" and not file.exists() and file.parent.is_dir():
            # Connecting would make it.
            return
        engine = sqlalchemy.create_engine(url)
        # SQLite opens any file, and says what it is once it is read.
        sqlalchemy.inspect(engine).has_table("studies")
        engine.dispose()


def open_storage(directory: Path, url: str | None) -> RDBStorage:
    """The database of a search: that of `url`, or the file in its folder. Tables are made where there are none.

    A transaction on SQLite begins with BEGIN IMMEDIATE: one that reads and then writes, as all that change a trial's
    state do, excludes others from the start. Deferred ones may read the same state before either writes.

    Raises:
        ConfigError: the database cannot be reached, or its driver is missing.
    """
    optuna = load_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(directory / STUDY, timeout=BUSY, check_same_thread=False)

    with _opening(directory, url) as sqlalchemy:
        options: dict[str, Any] = {}
        if url is None:
            # By a function: a path may hold what means something in a URL.
            options = {"creator": connect, "poolclass": sqlalchemy.pool.NullPool}
        elif _parsed(url).get_backend_name() == "sqlite":
            options = {"connect_args": {"timeout": BUSY}, "poolclass": sqlalchemy.pool.NullPool}
        storage = optuna.storages.RDBStorage(url or "sqlite://", engine_kwargs=options)
        if storage.engine.dialect.name == "sqlite":
            sqlalchemy.event.listen(storage.engine, "connect", _no_transactions_of_its_own)
            sqlalchemy.event.listen(storage.engine, "begin", _begin)
    return storage


@contextmanager
def _opening(directory: Path, url: str | None) -> Iterator[Any]:
    """Gives SQLAlchemy, and says in a sentence what keeps the database from being opened."""
    import sqlalchemy.exc

    if url is not None:
        _parsed(url)
    try:
        yield sqlalchemy
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, LookupError, RuntimeError) as error:
        raise ConfigError(f"--storage: {shown(directory, url)} cannot be opened ({_first_line(error)})") from error


def shown(directory: Path, url: str | None) -> str:
    """The database without a password, for messages and files."""
    if url is None:
        return str(directory / STUDY)
    found = _parsed(url)
    # Drivers take a password among the options, too.
    hidden = {name: "hidden" for name in found.query if "pass" in name.lower()}
    return found.update_query_dict(hidden).render_as_string(hide_password=True)


def _parsed(url: str) -> URL:
    """The parts of a URL.

    Raises:
        ConfigError: it has none, or its tables are gone with the process; what cannot be read is not repeated, since it
            may hold a password anywhere.
    """
    import sqlalchemy.exc

    try:
        found = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ConfigError(
            "--storage: the URL is not of the form dialect+driver://user:password@host:port/database"
        ) from None
    if found.get_backend_name() == "sqlite" and found.database in (None, "", ":memory:"):
        raise ConfigError(f"--storage: {url} is in memory, which no other process sees; name a file: sqlite:///FILE")
    return found


@contextmanager
def reaching(directory: Path, url: str | None) -> Iterator[None]:
    """Say in a sentence that the database does not answer.

    Raises:
        ConfigError: it does not.
    """
    optuna = load_optuna()
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise ConfigError(
            f"search: {shown(directory, url)} does not answer ({_first_line(error.__cause__ or error)}); nothing is "
            "lost, the same command continues"
        ) from error


def _no_transactions_of_its_own(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
