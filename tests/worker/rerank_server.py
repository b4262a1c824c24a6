"""A real HTTP server that reranks in the dialects of others, and fails as it is told.

Replies have the shapes that the providers document, results sorted by score as they give them.
"""

import json
import select
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from rerankq.catalogue import RemoteCard

WAIT_S = 20


class Asked(NamedTuple):
    """A request as it came; *at* is of the monotonic clock."""

    path: str
    headers: dict[str, str]
    body: Any
    at: float

    @property
    def query(self) -> str:
        return self.body.get("input", self.body)["query"]

    @property
    def texts(self) -> list[str]:
        where = self.body.get("input", self.body)
        return where["texts"] if "texts" in where else where["documents"]


@dataclass
class Answer:
    """What is answered instead of scores."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    # More bytes than come, as when a connection is lost in the middle.
    promised: int = 0


class Reset:
    """The connection is reset instead of an answer."""


class Held:
    """A request that is answered when it is let go; *broken_off* is set if its client goes away before."""

    def __init__(self) -> None:
        self.arrived, self.let_go, self.broken_off = threading.Event(), threading.Event(), threading.Event()


def score_of(text: str) -> float:
    """A probability for a text, the same in every process."""
    return (zlib.crc32(text.encode()) % 9_973 + 1) / 9_975


def _results(scores: list[float], name: str = "relevance_score", **more: Any) -> list[dict[str, Any]]:
    found = [{"index": at, name: score, **more} for at, score in enumerate(scores)]
    return sorted(found, key=lambda one: -one[name])


# By dialect: a reply to these scores, and the headers that come with it.
SHAPES: dict[str, Callable[[list[float]], tuple[Any, dict[str, str]]]] = {
    "cohere": lambda scores: (
        {
            "id": "07734bd2-2473-4f07-94e1-0d9f0e6843cf",
            "results": _results(scores),
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        },
        {},
    ),
    "dashscope": lambda scores: (
        {
            "output": {"results": _results(scores)},
            "usage": {"total_tokens": 79},
            "request_id": "4b0805c0-6b36-490d-8bc1-4365f4c89905",
        },
        {},
    ),
    "infinity": lambda scores: (
        {
            "object": "rerank",
            "results": _results(scores, document=None),
            "model": "m",
            "usage": {"prompt_tokens": 79, "total_tokens": 79},
            "id": "infinity-1",
            "created": 1_760_000_000,
        },
        {},
    ),
    "jina": lambda scores: (
        {"model": "m", "object": "list", "usage": {"total_tokens": 79}, "results": _results(scores)},
        {},
    ),
    "localai": lambda scores: (
        {
            "model": "m",
            "usage": {"total_tokens": 79, "prompt_tokens": 79},
            "results": _results(scores, document={"text": "a text of many words"}),
        },
        {},
    ),
    "siliconflow": lambda scores: (
        {"id": "1", "results": _results(scores), "meta": {"tokens": {"input_tokens": 79, "output_tokens": 0}}},
        {},
    ),
    "tei": lambda scores: (_results(scores, "score"), {"x-compute-type": "cpu", "x-compute-tokens": "79"}),
    "vllm": lambda scores: (
        {
            "id": "rerank-1",
            "model": "m",
            "usage": {"prompt_tokens": 79, "total_tokens": 79},
            "results": _results(scores, document={"text": "a text of many words", "multi_modal": None}),
        },
        {},
    ),
    "voyage": lambda scores: (
        {"object": "list", "data": _results(scores), "model": "m", "usage": {"total_tokens": 79}},
        {},
    ),
    "xinference": lambda scores: (
        {
            "id": "88177e80-cbeb-11ee-bfe5-0242ac110007",
            "results": _results(scores, document=None),
            "meta": {"api_version": None, "billed_units": None, "tokens": {"input_tokens": 79, "output_tokens": 79}},
        },
        {},
    ),
}


class RerankServer:
    """Serves one dialect at :attr:`url` for as long as a ``with`` block.

    What is put into ``next`` answers one request each, before the usual scores do. ``score`` gives a text's score.
    """

    def __init__(self, dialect: str = "jina", score: Callable[[str], float] = score_of) -> None:
        self.dialect, self.score = dialect, score
        self.asked: list[Asked] = []
        self.next: deque[Answer | Reset | Held | Callable[[list[float]], Any]] = deque()
        self.every: Callable[[], object] = lambda: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                outer._respond(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/rerank"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "RerankServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def card(self, **fields: Any) -> RemoteCard:
        """The entry of a catalogue that leads here."""
        usual = {"model": "m", "score": "probability", "max_length": 512, "max_documents": 100}
        return RemoteCard(**{"dialect": self.dialect, "url": self.url, **usual, **fields})

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(handler.path, headers, body, time.monotonic())
        self.asked.append(asked)
        self.every()
        scores = [self.score(text) for text in asked.texts]
        instead = self.next.popleft() if self.next else None
        if isinstance(instead, Held):
            instead.arrived.set()
            self._hold(handler.connection, instead)
            instead = None
        if isinstance(instead, Reset):
            # A close that sends RST: what was sent is lost, too.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        if isinstance(instead, Answer):
            self._write(handler, instead)
            return
        reply, more = SHAPES[self.dialect](scores)
        if instead is not None:
            reply = instead(scores)
        # Python writes NaN and Infinity, which is no JSON.
        self._write(handler, Answer(200, json.dumps(reply).encode(), more))

    @staticmethod
    def _hold(connection: socket.socket, held: Held) -> None:
        ends = time.monotonic() + WAIT_S
        while not held.let_go.wait(0.01) and time.monotonic() < ends:
            readable, _, _ = select.select([connection], [], [], 0)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                held.broken_off.set()
                return

    @staticmethod
    def _write(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        try:
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(answer.promised or len(answer.body)))
            handler.end_headers()
            handler.wfile.write(answer.body)
        except OSError:
            # The client went away.
            handler.close_connection = True
        if answer.promised:
            handler.close_connection = True
