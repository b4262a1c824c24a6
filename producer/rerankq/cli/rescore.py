"""``rerankq rescore``: a first-stage run is scored again, from files to a file."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from ..local.stack import open_client
from ..rescoring import rescore as rescoring
from . import render
from .options import FAILED, Json, Model, settings_with


def rescore(  # noqa: PLR0917 - typer reads them as options
    queries: Annotated[str, typer.Option(help='JSON lines with "_id" and "text".')],
    corpus: Annotated[str, typer.Option(help='JSON lines with "_id", "title" and "text".')],
    run: Annotated[str, typer.Option(help="The first stage: a TREC run of six columns.")],
    output: Annotated[
        str, typer.Option(help="The re-scored run; - is standard output. Until it is done, progress is in OUTPUT.part.")
    ],
    depth: Annotated[int, typer.Option(help="Documents per query: the run's first, by its scores.")] = 100,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="At most this many queries: the run's first.")
    ] = None,
    fusion: Annotated[str, typer.Option(help="A profile of fusion.toml.")] = "default",
    qrels: Annotated[
        str | None, typer.Option(help="Judgements (query-id, corpus-id, score), to measure nDCG@10.")
    ] = None,
    model: Model = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start again, and discard earlier progress.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Re-score a first-stage run offline. Files may be compressed with gzip, bzip2 or xz.

    If RERANKQ_BROKER_URL is not set, a Redis and a worker are started for as long as it runs. If it is interrupted, the
    same command resumes. nDCG@10 is measured as trec_eval does, over the queries that have judgements.
    Failed queries are left out and named, and the exit status is 1; the same command tries them again. Invalid lines
    are skipped and counted if the run does not name their query or document.
    """
    plan = rescoring.Plan(queries, corpus, run, output, depth, fusion, qrels, model, limit, restart, force)
    settings = settings_with()
    target = rescoring.check(plan, settings)
    with render.PairProgress() as progress:
        client = partial(open_client, settings, model, progress.notify)
        report = rescoring.rescore(plan, target, settings, progress, client)
    beside = sys.stderr if target.is_stdout else sys.stdout
    if as_json:
        render.print_json({**asdict(report), "pairs_per_s": report.pairs_per_s}, beside)
    else:
        render.print_report(report, beside)
    if report.failed:
        render.print_failed(report.failed)
        raise typer.Exit(FAILED)
