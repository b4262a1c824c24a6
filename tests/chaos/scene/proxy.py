"""A way to Redis that can be cut or swallow: a proxy that stops forwarding and closes nothing, as a parted network."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing, suppress


class Proxy:
    """Listen on a port of the loopback and forward to another, in a thread of its own, until :meth:`close`."""

    def __init__(self, goal: int) -> None:
        self._goal = goal
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._swallows = False
        self._served: set[asyncio.Task] = set()
        self._open, self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Forward nothing from now on; connections stay open, new ones are taken and lead nowhere."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        """Forward again, what was sent meanwhile first."""
        self._loop.call_soon_threadsafe(self._open.set)

    def swallow(self) -> None:
        """Be a black hole from now on: what is sent is taken and lost, on connections that are open and on new ones."""
        self._swallows = True

    def forward(self) -> None:
        """Forward what comes over new connections; those that lost something lead nowhere for ever, and stay open."""
        self._swallows = False

    def close(self) -> None:
        """Close everything."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self):
        way = asyncio.Event()
        way.set()
        return way, await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # A closed connection lets its socket go at the loop's next turn.
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The loop itself holds its tasks weakly: one whose ends have nothing more to say would be collected.
        me = asyncio.current_task()
        self._served.add(me)
        me.add_done_callback(self._served.discard)
        # Cancelled by our own end alone, of which the loop would complain.
        with suppress(OSError, asyncio.CancelledError), closing(writer):
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._goal)
            lost = asyncio.Event()
            with closing(far_writer):
                await asyncio.gather(self._pump(reader, far_writer, lost), self._pump(far_reader, writer, lost))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        """Forward one way; *lost* is set once this connection has swallowed something, either way."""
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._open.wait()
                if self._swallows:
                    lost.set()
                if lost.is_set():
                    continue
                writer.write(data)
                await writer.drain()
        # An end is news too, and must get through neither a cut nor a hole.
        await self._open.wait()
        if lost.is_set():
            return
        writer.close()
