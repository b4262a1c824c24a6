"""A first-stage run with its texts, on disk: a run over millions of documents need not fit into memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self, TypeVar

from ..contract import Chunk
from . import inputs
from .inputs import InputFault, Line, Query, Skipped

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE query (place INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, line INTEGER NOT NULL, text TEXT);
CREATE TABLE pair (
  query INTEGER NOT NULL, chunk TEXT NOT NULL, score REAL NOT NULL, line INTEGER NOT NULL,
  PRIMARY KEY (query, chunk)
) WITHOUT ROWID;
CREATE TABLE chunk (id TEXT PRIMARY KEY, line INTEGER NOT NULL, title TEXT, text TEXT) WITHOUT ROWID;
"""

# The order of trec_eval, as metrics.trec_order; single precision does not matter for a cut at a depth.
_BEST_FIRST = "score DESC, chunk DESC"


class FirstStage(NamedTuple):
    """A query with its chunks, best first; their keyword score is the run's."""

    query: Query
    chunks: list[Chunk]


class Collection:
    """The queries of a run, in the run's order, each with its first *depth* documents as chunks.

    Only what the run names is kept, and only that must be valid; ``skipped`` counts other invalid lines, by file. The
    database is a temporary one of SQLite, without a name: it is gone when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self.grades: dict[str, dict[str, int]] = {}
        self.skipped: dict[str, Skipped] = {}
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _SCHEMA)

    @classmethod
    def read(
        cls, *, queries: str, corpus: str, run: str, depth: int, limit: int | None = None, qrels: str | None = None
    ) -> Self:
        """Read the files; with a *limit*, only as many queries, the run's first.

        Raises:
            InputFault: if a line that is needed is invalid, or the run names a query or a document that is missing.
        """
        collection = cls()
        try:
            collection._db.execute("BEGIN")
            collection._read_run(run, depth, limit)
            if qrels is not None:
                collection._read_judgements(qrels)
            collection._read_queries(queries)
            collection._read_corpus(corpus)
            collection._check(run, queries, corpus)
            collection._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            collection.close()
            raise InputFault(f"{run}: no space for its texts in the folder of temporary files: {error}") from None
        except BaseException:
            collection.close()
            raise
        return collection

    def close(self) -> None:
        """Delete the database."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def counts(self) -> dict[str, int]:
        """Count the chunks of each query, in the run's order."""
        return dict(
            self._db.execute(
                "SELECT query.id, count(*) FROM query JOIN pair ON pair.query = place GROUP BY place ORDER BY place"
            )
        )

    def first_stage(self, query: str) -> FirstStage:
        """Read a query with its chunks."""
        found = self._db.execute("SELECT place, text FROM query WHERE id = ?", (query,)).fetchone()
        if found is None:
            raise KeyError(query)
        rows = self._db.execute(
            "SELECT id, title, text, score FROM pair JOIN chunk ON chunk.id = pair.chunk "  # noqa: S608 - a constant
            f"WHERE pair.query = ? ORDER BY {_BEST_FIRST}",
            found[:1],
        )
        return FirstStage(
            Query(query, found[1]),
            [Chunk(id=name, title=title, text=text, keyword_score=score) for name, title, text, score in rows],
        )

    def scores(self, query: str) -> dict[str, float]:
        """Read the first-stage scores of a query's chunks, by their ids."""
        return dict(
            self._db.execute(
                "SELECT chunk, score FROM pair JOIN query ON place = pair.query WHERE query.id = ?", (query,)
            )
        )

    def _read_run(self, source: str, depth: int, limit: int | None) -> None:
        for line in inputs.lines(source):
            found = inputs.run_line_of(line)
            self._db.execute("INSERT OR IGNORE INTO query (id, line) VALUES (?, ?)", (found.query, line.number))
            new = self._db.execute(
                "INSERT OR IGNORE INTO pair SELECT place, ?, ?, ? FROM query WHERE id = ?",
                (found.chunk, found.score, line.number, found.query),
            )
            if new.rowcount == 0:
                raise line.fault(f"query {found.query} has document {found.chunk} twice", "document")
        if self._db.execute("SELECT 1 FROM query LIMIT 1").fetchone() is None:
            raise InputFault(f"{source}: is empty")
        if limit is not None:
            self._db.execute(
                "DELETE FROM query WHERE place NOT IN (SELECT place FROM query ORDER BY place LIMIT ?)", (limit,)
            )
            self._db.execute("DELETE FROM pair WHERE query NOT IN (SELECT place FROM query)")
        self._db.execute(
            "DELETE FROM pair WHERE (query, chunk) IN (SELECT query, chunk FROM (SELECT query, chunk, "  # noqa: S608 - a constant
            f"row_number() OVER (PARTITION BY query ORDER BY {_BEST_FIRST}) AS place FROM pair) WHERE place > ?)",
            (depth,),
        )
        self._db.execute("INSERT INTO chunk (id, line) SELECT chunk, min(line) FROM pair GROUP BY chunk")

    def _read_judgements(self, source: str) -> None:
        skipped = self.skipped.setdefault(source, Skipped())
        self.grades = inputs.judgements(source, queries=self.counts().keys(), skipped=skipped)

    def _read_queries(self, source: str) -> None:
        for line, query in self._valid("query", source, inputs.query_of):
            self._fill("query", query.id, {"text": query.text}, line)

    def _read_corpus(self, source: str) -> None:
        for line, chunk in self._valid("chunk", source, inputs.chunk_of):
            self._fill("chunk", chunk.id, {"title": chunk.title, "text": chunk.text}, line)

    def _valid(self, table: str, source: str, read: Callable[[Line], T]) -> Iterator[tuple[Line, T]]:
        """Yield the valid lines; an invalid line whose id the run does not name, or that has none, is skipped."""
        valid = 0
        skipped = self.skipped.setdefault(source, Skipped())
        for line in inputs.lines(source, skipped=skipped):
            try:
                found = read(line)
            except InputFault as fault:
                if fault.about is not None and self._names(table, fault.about):
                    raise
                skipped.add(fault)
            else:
                valid += 1
                yield line, found
        if not valid:
            # No line is valid: a file of another format.
            raise skipped.first or InputFault(f"{source}: is empty")

    def _names(self, table: str, name: str) -> bool:
        return self._db.execute(f"SELECT 1 FROM {table} WHERE id = ?", (name,)).fetchone() is not None  # noqa: S608

    def _fill(self, table: str, name: str, texts: dict[str, str], line: Line) -> None:
        columns = ", ".join(f"{column} = ?" for column in texts)
        filled = self._db.execute(
            f"UPDATE {table} SET {columns} WHERE id = ? AND text IS NULL",  # noqa: S608 - our own names
            (*texts.values(), name),
        )
        if filled.rowcount == 0 and self._names(table, name):
            raise line.fault(f"{name} was given before", "_id")

    def _check(self, run: str, queries: str, corpus: str) -> None:
        for table, source, field in (("query", queries, "query"), ("chunk", corpus, "document")):
            lost = self._db.execute(
                f"SELECT id, line, (SELECT count(*) FROM {table} WHERE text IS NULL) FROM {table} "  # noqa: S608
                "WHERE text IS NULL ORDER BY line LIMIT 1"
            ).fetchone()
            if lost is not None:
                more = f" (and {lost[2] - 1} more)" if lost[2] > 1 else ""
                skipped = self.skipped[source]
                among = f"; {skipped}" if skipped.lines else ""
                raise InputFault(f"{run}:{lost[1]}: {field}: {lost[0]} is not in {source}{more}{among}")
