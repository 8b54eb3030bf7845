"""Let a SQLite database of MLflow that was moved find the artifacts that were moved with it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlflow-artifacts"  # the folder beside the database
# MLflow stores absolute paths
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)


def artifacts_of(database: Path) -> str:
    """Return the artifact location of the experiments in a database: by default, MLflow takes the working directory."""
    return (database.absolute().parent / ARTIFACTS).as_uri()


def follow_move(database: Path) -> None:
    """Replace the old path of the artifacts beside a database by the new one, if both were moved.

    Raises:
        sqlite3.Error: the database cannot be read or written.
    """
    if not database.exists() or not (database.parent / ARTIFACTS).is_dir():
        return
    now = artifacts_of(database)
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        query = "select distinct artifact_location from experiments where artifact_location like ?"
        for (before,) in connection.execute(query, (f"%/{ARTIFACTS}",)).fetchall():
            # Those of another database that is still there keep their place
            if before == now or Path(unquote(urlsplit(before).path)).exists():
                continue
            for table, column in _COLUMNS:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where {column} like ?",
                    (now, len(before) + 1, f"{before}%"),
                )
