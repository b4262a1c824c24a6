"""The parts of Celery and kombu that are overridden or replaced are those that the overrides were written for.

Each is known by a digest of its source without comments and docstrings, or of its value. Where one fails after an
upgrade: read what the library changed, hold what stands here for it against that, run the integration tests, and add
the digest. ``python tests/worker/test_celery_overrides.py`` prints the table for the versions that are installed.
"""

import ast
import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import celery
import kombu
import pytest

from rerankq.broker import celery_app, transport
from rerankq_worker import celery_consumer


class Part(NamedTuple):
    """Something of a library's for which something stands here."""

    of: str  # module:name
    here: str  # what stands here
    digests: dict[str, str]  # to the versions that have it


CONSUMER = "celery.worker.consumer.consumer:Consumer"
REDIS = "kombu.transport.redis"
WORKER, APP, TRANSPORT = (module.__name__ for module in (celery_consumer, celery_app, transport))
PARTS = [
    Part(
        f"{CONSUMER}.on_send_event_buffered",
        f"{WORKER}:SafeConsumer.on_send_event_buffered",
        {"b2972768aa": "5.6.0 to 5.6.3", "7186e0fc4f": "5.7.0"},
    ),
    Part(f"{CONSUMER}.shutdown", f"{WORKER}:SafeConsumer.shutdown", {"ae5f70fad1": "5.6.0 to 5.7.0"}),
    Part(f"{CONSUMER}._flush_events", f"{WORKER}:SafeConsumer._flush_later", {"360c0b218a": "5.6.0 to 5.7.0"}),
    Part(
        f"{CONSUMER}.on_connection_error_after_connected",
        f"{WORKER}:SafeConsumer.on_connection_error_after_connected",
        {"2c1d89f084": "5.6.0 to 5.6.3", "6bded34f22": "5.7.0"},
    ),
    Part(
        f"{CONSUMER}.cancel_active_requests",
        f"{WORKER}:SafeConsumer.cancel_active_requests",
        {"14665f9cdd": "5.6.0 to 5.7.0"},
    ),
    Part(
        f"{CONSUMER}.ensure_connected",
        f"{WORKER}:SafeConsumer.ensure_connected",
        {"99b9c1c6c7": "5.6.0 to 5.6.3", "264c87280d": "5.7.0"},
    ),
    Part(
        f"{CONSUMER}.create_task_handler",
        f"{WORKER}:SafeConsumer.create_task_handler",
        {"3793a1a052": "5.6.0 to 5.6.3", "e44d515868": "5.7.0"},
    ),
    Part(
        "celery.worker.consumer.tasks:Tasks.start",
        f"{WORKER}:BulkConsumer.start",
        {"afb85730fd": "5.6.0 to 5.6.3", "381d7b203f": "5.7.0"},
    ),
    Part("celery.worker.consumer.tasks:Tasks.stop", f"{WORKER}:BulkConsumer.stop", {"65c6f547cf": "5.6.0 to 5.7.0"}),
    Part(
        "celery.worker.consumer.tasks:Tasks.shutdown",
        f"{WORKER}:BulkConsumer.shutdown",
        {"fd64fd9990": "5.6.0 to 5.7.0"},
    ),
    Part("celery.bootsteps:Blueprint.close", f"{WORKER}:EngineInfo.close", {"f6438ea7d4": "5.6.0 to 5.7.0"}),
    Part("celery.bootsteps:Blueprint.info", f"{WORKER}:EngineInfo.info", {"88261935f2": "5.6.0 to 5.7.0"}),
    Part("celery.concurrency.thread:TaskPool.on_apply", f"{WORKER}:give_slots_back", {"f8927e3677": "5.6.0 to 5.7.0"}),
    Part("celery.worker.control:revoke", "rerankq_worker.tasks:revoke", {"2af9f43571": "5.6.0 to 5.7.0"}),
    Part("celery.worker.control:active_queues", "rerankq_worker.tasks:active_queues", {"30036964ca": "5.6.0 to 5.7.0"}),
    Part(
        "kombu.connection:Connection.ensure_connection",
        f"{WORKER}:SafeConsumer.ensure_connected",
        {"d55d1205eb": "5.7.0"},
    ),
    Part(
        "kombu.connection:Connection.release",
        f"{WORKER}:SafeConsumer.on_connection_error_after_connected",
        {"0c80d56315": "5.7.0"},
    ),
    Part("kombu.transport.virtual.base:QoS.can_consume", f"{WORKER}:receive_while", {"d4f21a8ee8": "5.7.0"}),
    Part(f"{REDIS}:QoS.ack", f"{WORKER}:receive_while", {"ada5289380": "5.7.0"}),
    Part(f"{REDIS}:Channel.priority_steps", f"{WORKER}:receive_while", {"82f9fbe107": "5.7.0"}),
    Part(f"{REDIS}:Channel.priority", f"{WORKER}:receive_while", {"9a7cd83b3e": "5.7.0"}),
    Part(f"{REDIS}:Channel._brpop_start", f"{WORKER}:receive_while", {"17e14bf2fb": "5.7.0"}),
    Part(f"{REDIS}:Channel._brpop_read", f"{WORKER}:_reading", {"47b5751b6c": "5.7.0"}),
    Part("celery.app.base:Celery.builtin_fixups", f"{APP}:App.builtin_fixups", {"8eb72af2c2": "5.6.0 to 5.7.0"}),
    Part(
        "celery.app.base:Celery.connection_for_read", f"{APP}:App.connection_for_read", {"8c360e8aad": "5.6.0 to 5.7.0"}
    ),
    Part(
        "celery.app.base:Celery.connection_for_write",
        f"{APP}:App.connection_for_write",
        {"70386626a0": "5.6.0 to 5.7.0"},
    ),
    Part("celery.app.base:Celery.connection", f"{APP}:App.connection", {"aedc21b939": "5.6.0 to 5.7.0"}),
    Part("celery.app.base:Celery._connection", f"{APP}:App.connection_for_read", {"b41b5b000b": "5.6.0 to 5.7.0"}),
    Part("celery.app.base:Celery._get_backend", f"{APP}:App._get_backend", {"2e5cec9ccc": "5.6.0 to 5.7.0"}),
    Part(
        "celery.loaders.base:BaseLoader.read_configuration",
        f"{APP}:NoConfiguration.read_configuration",
        {"9be91f9012": "5.6.0 to 5.7.0"},
    ),
    Part(f"{REDIS}:QoS.restore_visible", f"{TRANSPORT}:QoS.restore_visible", {"00a17aa8c9": "5.7.0"}),
    Part(f"{REDIS}:Channel.QoS", f"{TRANSPORT}:Channel.QoS", {"312e8a3141": "5.7.0"}),
    Part(f"{REDIS}:Channel.fanout_prefix", f"{TRANSPORT}:Channel.fanout_prefix", {"dd931fabaa": "5.7.0"}),
    Part(f"{REDIS}:Channel.keyprefix_fanout", f"{TRANSPORT}:Channel._get_pool", {"9fd3d5368a": "5.7.0"}),
    Part(f"{REDIS}:Channel._get_pool", f"{TRANSPORT}:Channel._get_pool", {"f032b44b9d": "5.7.0"}),
    Part(f"{REDIS}:Channel._connparams", f"{TRANSPORT}:Channel._get_pool", {"7ec9aa4b3e": "5.7.0"}),
    Part(f"{REDIS}:Channel._on_connection_disconnect", f"{TRANSPORT}:_registered_with", {"9631e61092": "5.7.0"}),
    Part(f"{REDIS}:Channel._queue_bind", f"{TRANSPORT}:Channel._queue_bind", {"dfc8e9e5d4": "5.7.0"}),
    Part(f"{REDIS}:Channel._delete", f"{TRANSPORT}:Channel._delete", {"52c2b907cb": "5.7.0"}),
    Part(f"{REDIS}:Channel._size", f"{TRANSPORT}:Channel._size", {"b4e7575675": "5.7.0"}),
    Part(f"{REDIS}:Transport.Channel", f"{TRANSPORT}:Transport.Channel", {"31f5339a3d": "5.7.0"}),
    Part("kombu.transport.base:Transport.as_uri", f"{TRANSPORT}:Transport.as_uri", {"e9c0fb309e": "5.7.0"}),
    Part(
        "kombu.transport.base:Transport.can_parse_url", f"{TRANSPORT}:Transport.can_parse_url", {"3ab05b19da": "5.7.0"}
    ),
]

# What is set on objects of the libraries' in celery_consumer.py, and the parts above that it replaces.
REPLACED_ON_OBJECTS = {
    "pool.on_apply": "celery.concurrency.thread:TaskPool.on_apply",
    "conn.ensure_connection": "kombu.connection:Connection.ensure_connection",
    "self.connection.close": "kombu.connection:Connection.release",
    "channel.qos.can_consume": "kombu.transport.virtual.base:QoS.can_consume",
    "channel.qos.ack": f"{REDIS}:QoS.ack",
    "channel.priority_steps": f"{REDIS}:Channel.priority_steps",
    "channel.priority": f"{REDIS}:Channel.priority",
    "channel.client.parse_response": f"{REDIS}:Channel._brpop_read",
    "channel.handlers['BRPOP']": f"{REDIS}:Channel._brpop_read",
    "c.bulk_consumer.on_message": "celery.worker.consumer.tasks:Tasks.start",
    "message.headers": f"{CONSUMER}.create_task_handler",
}
# What is set there on objects of ours, or read by classes of ours alone.
OURS_ON_OBJECTS = {"c.bulk_consumer", "worker.on_free_slot", "conn.transport.only_listens"}

OUR_CLASSES = [
    celery_consumer.SafeConsumer,
    celery_consumer.BulkConsumer,
    celery_consumer.EngineInfo,
    celery_app.App,
    celery_app.NoConfiguration,
    transport.QoS,
    transport.Channel,
    transport.Transport,
]
# Names that every class has, or that say what a library's class is for.
NO_OVERRIDES = {"__module__", "__doc__", "__init__", "name", "requires", "__qualname__", "__dict__", "__weakref__"}


def found(of: str) -> Any:
    module, _, path = of.partition(":")
    return reduce(getattr, path.split("."), importlib.import_module(module))


def normalised(source: str) -> str:
    """Source without comments, docstrings and white space: what the formatting of another version does not change."""
    source = textwrap.dedent(source)
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno - 1, docstring.end_lineno):
                lines[row] = "\n"
    return "".join("".join(lines).split())


def digest_of(thing: Any) -> str:
    if inspect.isfunction(thing):
        said = normalised(inspect.getsource(thing))
    elif inspect.isclass(thing):
        said = f"{thing.__module__}:{thing.__qualname__}"
    else:
        said = repr(sorted(thing)) if isinstance(thing, frozenset | set) else repr(thing)
    return hashlib.blake2b(said.encode(), digest_size=5).hexdigest()


def installed(of: str) -> str:
    library = celery if of.startswith("celery") else kombu
    return f"{library.__name__} {library.__version__}"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.of)
def test_a_part_for_which_something_stands_here_is_as_it_was_tested(part: Part):
    digest = digest_of(found(part.of))
    assert digest in part.digests, (
        f"{part.of} of {installed(part.of)} is none of those tested ({', '.join(part.digests.values())}): hold "
        f"{part.here} against its new source, run the integration tests, then add its digest, {digest}"
    )


@pytest.mark.parametrize("here", sorted({part.here for part in PARTS if ".tasks:" not in part.here}))
def test_every_override_that_is_named_here_exists(here: str):
    assert found(here) is not None


def overridden(ours: type) -> set[str]:
    """Names that a class of ours has and its library's bases had before."""
    bases = [base for base in ours.__mro__[1:] if base.__module__.split(".")[0] in {"celery", "kombu"}]
    return {name for name in vars(ours) if any(name in vars(base) for base in bases)} - NO_OVERRIDES


@pytest.mark.parametrize("ours", OUR_CLASSES, ids=lambda ours: ours.__name__)
def test_every_name_that_a_class_overrides_is_held_here(ours: type):
    assert {f"{ours.__module__}:{ours.__name__}.{name}" for name in overridden(ours)} <= {part.here for part in PARTS}


def test_every_class_that_is_derived_from_the_libraries_is_held_here():
    for module in (celery_consumer, celery_app, transport):
        derived = {
            kind
            for kind in vars(module).values()
            if inspect.isclass(kind)
            and kind.__module__ == module.__name__
            and any(base.__module__.split(".")[0] in {"celery", "kombu"} for base in kind.__mro__[1:])
        }
        assert derived <= set(OUR_CLASSES)


def test_every_attribute_that_is_set_on_an_object_of_the_libraries_is_held_here():
    tree = ast.parse(Path(celery_consumer.__file__).read_text())
    targets = [
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for several in node.targets
        for target in (several.elts if isinstance(several, ast.Tuple) else [several])
    ]
    on_objects = {
        ast.unparse(target)
        for target in targets
        if isinstance(target, ast.Attribute | ast.Subscript)
        # An attribute of self is ours, one of an attribute of self is not.
        and not (isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self")
    }
    assert on_objects == REPLACED_ON_OBJECTS.keys() | OURS_ON_OBJECTS
    assert set(REPLACED_ON_OBJECTS.values()) <= {part.of for part in PARTS}


@pytest.mark.parametrize(
    ("library", "ours"),
    [
        (CONSUMER, {"process", "bulk_consumer", "queues", "update_bulk", "_bulk_updates", "_flush_at", "_flush_later"}),
        ("celery.app.base:Celery", {"process", "address", "_to"}),
        (f"{REDIS}:Transport", {"only_listens", "url"}),
    ],
)
def test_names_that_we_add_are_not_the_librarys(library: str, ours: set[str]):
    assert {name for name in ours if hasattr(found(library), name)} == set()


def test_a_digest_changes_with_code_and_not_with_comments_docstrings_or_layout():
    plain = "def f(a, b=1):\n    return a + b\n"
    same = '    def f(a,\n          b=1):  # the second\n        """Add.\n\n        Both."""\n\n        return a + b\n'
    assert normalised(same) == normalised(plain)
    for other in ("def f(a, b=2):\n    return a + b\n", "def f(a, b=1):\n    return a - b\n"):
        assert normalised(other) != normalised(plain)


if __name__ == "__main__":
    for part in PARTS:
        print(installed(part.of), part.of, digest_of(found(part.of)))
