"""``rerankq demo``: a few questions over the shipped sample, before and after."""

from __future__ import annotations

from ..local import demo as local_demo
from . import render
from .options import Json, settings_with


def demo(as_json: Json = False) -> None:
    """Show what reranking does, with a Redis and a worker of its own: a few questions, chunks before and after."""
    settings = settings_with(model="bundled", default_model="", models=[])
    with render.PairProgress() as progress:
        progress.describe("starting Redis and a worker")
        done = local_demo.run(settings)
    if as_json:
        render.print_json(local_demo.as_record(done))
    else:
        render.print_demo(done)
