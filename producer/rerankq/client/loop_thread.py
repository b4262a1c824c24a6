"""One event loop in a thread of its own, which serves every blocking client of this process.

One, not one a client: where gevent or eventlet make greenlets of threads, all are one thread to asyncio, which runs one
event loop in it.
"""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import ClientUnusable

T = TypeVar("T")

# Seconds for the thread to begin in, and to end in.
START_S = 5.0
STOP_S = 3.0
# Seconds between looks at whether the thread still serves, for whoever waits for it.
LOOK_S = 1.0
# Looks in a row at which its event loop had not made a turn, that make it one that is blocked.
BLOCKED_LOOKS = 30


class LoopThread:
    """An event loop that runs in a daemon thread until :meth:`stop`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # Names of hosts are looked up there. Not waited for at the end: a name server that hangs takes its time.
        self._lookups = ThreadPoolExecutor(thread_name_prefix="rerankq-lookups")
        self.loop.set_default_executor(self._lookups)
        self._made_with = _thread.start_new_thread
        self._process = os.getpid()
        self._begun = False
        self._running = threading.Event()
        self._fault: BaseException | None = None
        self._turns, self._asked = 0, False
        self._thread = threading.Thread(target=self._serve, name="rerankq-client", daemon=True)

    def start(self) -> None:
        """Begin, and wait until it runs; again and again is no harm.

        Raises:
            ClientUnusable: if it cannot run here.
        """
        if not self._begun:
            self._begun = True
            try:
                self._thread.start()
            except RuntimeError as error:
                self._fault = error
        if not self._running.wait(0 if self._fault else START_S) or self._fault is not None:
            why = self._fault or f"it has not begun within {START_S:g} s"
            raise ClientUnusable(
                f"the event loop of the blocking client cannot run here: {why}. Where gevent or eventlet make threads "
                "of one, use AsyncClient beside other event loops of asyncio"
            )

    @property
    def serves(self) -> bool:
        """Whether it can serve: this is its process, its kind of threads is still in use, and it has not ended."""
        same = self._process == os.getpid() and self._made_with is _thread.start_new_thread
        return same and self._fault is None and (self._thread.is_alive() or not self._running.is_set())

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self._thread

    def soon(self, work: Awaitable[T]) -> Future[T]:
        """Begin some work in it.

        Raises:
            ClientUnusable: if it has ended.
        """
        coroutine = _as_coroutine(work)
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise _ended() from None

    def wait(self, future: Future[T], timeout_s: float | None) -> T:
        """Wait for work that was begun, also where nobody does it any more.

        Raises:
            ClientUnusable: if the thread has ended, or its event loop is blocked.
            NotServed: if there is no answer within *timeout_s*.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        looks, turns = 0, self._turns
        while True:
            left_s = LOOK_S if ends_at is None else min(LOOK_S, max(0.0, ends_at - time.monotonic()))
            with suppress(TimeoutError):
                return future.result(left_s)
            if future.done():
                return future.result()  # its own TimeoutError
            if ends_at is not None and time.monotonic() >= ends_at:
                raise NotServed
            if not self._thread.is_alive() or self._process != os.getpid() or sys.is_finalizing():
                raise _ended()
            # By looks, not by a clock: if all of this process was suspended, nothing is blocked.
            looks, turns = (looks + 1, turns) if turns == self._turns else (0, self._turns)
            if looks >= BLOCKED_LOOKS:
                raise ClientUnusable(f"the client's event loop has been blocked for {looks * LOOK_S:g} s")
            if not self._asked:
                self._asked = True
                with suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self._turn)

    def stop(self) -> None:
        """End, within ``STOP_S``; what is still under way is cancelled."""
        if self._process != os.getpid():
            return
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)
        if self.is_current:
            return
        self._thread.join(STOP_S)
        # Not by itself: a thread cannot wait for what it waits for.
        ending = threading.Thread(target=self._lookups.shutdown, name="rerankq-lookups-end", daemon=True)
        with suppress(RuntimeError):  # the interpreter ends: it waits for these threads itself
            ending.start()
            ending.join(STOP_S)

    def _turn(self) -> None:
        self._turns += 1
        self._asked = False

    def _serve(self) -> None:
        try:
            self.loop.call_soon(self._running.set)
            self.loop.run_forever()
        except BaseException as error:  # noqa: BLE001  # told to whoever waits
            self._fault = error
        finally:
            last = _wind_up()
            try:
                self.loop.run_until_complete(last)
            except RuntimeError:  # it could not run at all
                last.close()
            self._fault = self._fault or _ended()
            self._running.set()
            self.loop.close()


class NotServed(Exception):
    """Raised when there is no answer in time; whoever asked knows which error that is."""


def keep_for_ever(kept: Any) -> None:
    """Hold a reference that nobody will ever give back."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _ended() -> ClientUnusable:
    return ClientUnusable("the thread that serves this client has ended")


async def _as_coroutine(work: Awaitable[T]) -> T:
    # run_coroutine_threadsafe takes coroutines alone, and anext() of a generator is only an awaitable.
    return await work


async def _wind_up() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=STOP_S / 2)
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_S / 2):
            await asyncio.get_running_loop().shutdown_asyncgens()


class Shared:
    """The loop thread of this process, while a client needs one."""

    def __init__(self) -> None:
        self._current: LoopThread | None = None
        self._forget()

    def _forget(self) -> None:
        # Reentrant: a signal's handler may come in here in the midst of it.
        self._guard = threading.RLock()
        self._users: weakref.WeakSet[object] = weakref.WeakSet()

    @property
    def current(self) -> LoopThread | None:
        """The thread that serves at the moment, if there is one."""
        thread = self._current
        return thread if thread is not None and thread.serves else None

    def serving(self, user: object) -> LoopThread:
        """Give the thread that serves *user*, begun where there is none.

        Raises:
            ClientUnusable: if none can run here, or the caller is run by it.
        """
        if sys.is_finalizing():
            raise _ended()
        with self._guard:
            thread = self._current
            if thread is not None and thread.is_current:
                raise ClientUnusable("a blocking client cannot be used by what its own thread runs")
            if thread is None or not thread.serves:
                # Before it runs: who comes in here meanwhile, a signal's handler or a greenlet, is to find this one.
                thread = self._current = LoopThread()
            thread.start()
            self._users.add(user)
            return thread

    def leave(self, user: object) -> None:
        """Stop the thread if *user* was the last to use it."""
        with self._guard:
            self._users.discard(user)
            thread = self._current
            if thread is None or self._users:
                return
            self._current = None
        thread.stop()

    def begin_anew(self) -> None:
        """Forget the thread: it stayed with the parent of this forked process."""
        if self._current is not None:
            # To the very end, on purpose. Finalisers would take the parent's sockets out of the event loop's epoll,
            # which both processes share, and the parent would wait for ever.
            keep_for_ever(self._current.loop)
        self._current = None
        self._forget()


SHARED = Shared()
