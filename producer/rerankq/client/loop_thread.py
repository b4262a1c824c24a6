"""One event loop in a thread of its own, which serves every blocking client of this process.

One per process, not one per client: where gevent or eventlet replace threads by greenlets, all of them are one thread
to asyncio, which runs one event loop in it.
"""

from __future__ import annotations

import _thread
import asyncio
import os
import selectors
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import BuiltinFunctionType
from typing import Any, TypeVar

from ..errors import ClientUnusable

T = TypeVar("T")

# Seconds for the thread to begin in, and to end in.
START_S = 5.0
STOP_S = 3.0
# Seconds between checks of whether the thread still serves, by those who wait for it.
CHECK_S = 1.0
# Checks in a row without an iteration of its event loop after which the loop counts as blocked.
BLOCKED_CHECKS = 30


class LoopThread:
    """An event loop that runs in a daemon thread until :meth:`stop`.

    Args:
        after: the one before it, which may still be ending.
    """

    #: Made in the thread, where no signal's handler can interrupt it half made; there once :meth:`start` returned.
    loop: asyncio.AbstractEventLoop

    def __init__(self, after: LoopThread | None = None) -> None:
        self._after = after
        # Host names are resolved there. Not waited for at the end: a name server that hangs takes its time.
        self._resolvers = ThreadPoolExecutor(thread_name_prefix="rerankq-resolvers")
        self._made_with = _thread.start_new_thread
        self._process = os.getpid()
        self._begun = False
        self._running = threading.Event()
        self._fault: BaseException | None = None
        self._iterations, self._asked = 0, False
        self._thread = threading.Thread(target=self._serve, name="rerankq-client", daemon=True)

    def start(self) -> None:
        """Begin, and wait until it runs; may be called again.

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
                f"the event loop of the blocking client cannot run here: {why}. Where gevent or eventlet replace "
                "threads by greenlets, use AsyncClient beside other event loops of asyncio"
            )

    @property
    def serves(self) -> bool:
        """Whether it can serve: in this process, with the threads that were in use when it began, and not ended."""
        same = self._process == os.getpid() and self._made_with is _thread.start_new_thread
        return same and self._fault is None and (self._thread.is_alive() or not self._running.is_set())

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self._thread

    def soon(self, call: Callable[[], Awaitable[T]]) -> Future[T]:
        """Begin some work in it: what *call* returns is made there, and awaited.

        Raises:
            ClientUnusable: if it has ended.
        """
        try:
            return asyncio.run_coroutine_threadsafe(_MadeThere(call), self.loop)
        except RuntimeError:
            raise _ended() from None

    def wait(self, future: Future[T], timeout_s: float | None) -> T:
        """Wait for work that was begun; also notices if the thread no longer does it.

        Raises:
            ClientUnusable: if the thread has ended, or its event loop is blocked.
            NotServed: if there is no answer within *timeout_s*.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        checks, iterations = 0, self._iterations
        while True:
            left_s = CHECK_S if ends_at is None else min(CHECK_S, max(0.0, ends_at - time.monotonic()))
            with suppress(TimeoutError):
                return future.result(left_s)
            if future.done():
                return future.result()  # its own TimeoutError
            if ends_at is not None and time.monotonic() >= ends_at:
                raise NotServed
            if not self._thread.is_alive() or self._process != os.getpid() or sys.is_finalizing():
                raise _ended()
            # By checks, not by a clock: if all of this process was suspended, nothing is blocked.
            checks, iterations = (checks + 1, iterations) if iterations == self._iterations else (0, self._iterations)
            if checks >= BLOCKED_CHECKS:
                raise ClientUnusable(f"the client's event loop has been blocked for {checks * CHECK_S:g} s")
            if not self._asked:
                self._asked = True
                with suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self._count_iteration)

    def stop(self) -> None:
        """End, within ``STOP_S``; what is still under way is cancelled."""
        if self._process != os.getpid() or not self._begun or not self._running.wait(STOP_S):
            return
        with suppress(RuntimeError, AttributeError):  # it has ended, or could not be made
            self.loop.call_soon_threadsafe(self.loop.stop)
        if self.is_current:
            return
        self._thread.join(STOP_S)
        # In another thread, which can be waited for with a limit; shutdown itself has none.
        ending = threading.Thread(target=self._resolvers.shutdown, name="rerankq-resolvers-end", daemon=True)
        with suppress(RuntimeError):  # the interpreter ends: it waits for these threads itself
            ending.start()
            ending.join(STOP_S)

    def _count_iteration(self) -> None:
        self._iterations += 1
        self._asked = False

    def _serve(self) -> None:
        after, self._after = self._after, None
        if after is not None and not isinstance(self._made_with, BuiltinFunctionType):
            # Greenlets are one thread to asyncio, and two loops do not run in one.
            after._thread.join(STOP_S)
        try:
            self.loop = asyncio.SelectorEventLoop(_selector())
        except BaseException as error:  # noqa: BLE001  # told to whoever waits
            self._fault = error
            self._running.set()
            return
        try:
            self.loop.set_default_executor(self._resolvers)
            self.loop.call_soon(self._running.set)
            self.loop.run_forever()
        except BaseException as error:  # noqa: BLE001  # told to whoever waits
            self._fault = error
        finally:
            self._wind_up()
            self._fault = self._fault or _ended()
            self._wind_up()  # of what came while it was wound up
            self._running.set()
            self.loop.close()

    def _wind_up(self) -> None:
        last = _wind_up()
        try:
            self.loop.run_until_complete(last)
        except RuntimeError:  # it could not run at all
            last.close()


class NotServed(Exception):
    """Raised when there is no answer in time; whoever asked knows which error that is."""


def _selector() -> selectors.BaseSelector:
    """Choose poll() instead of epoll, which a forked child shares: its finalisers would take our sockets out of it.

    Where gevent or eventlet have put a selector of their own in epoll's place, only that one lets other greenlets run.
    """
    replaced = selectors.DefaultSelector is not getattr(selectors, "EpollSelector", None)
    return selectors.DefaultSelector() if replaced else selectors.PollSelector()


def _ended() -> ClientUnusable:
    return ClientUnusable("the thread that serves this client has ended")


class _MadeThere(Coroutine[Any, Any, T]):
    """A coroutine that is made when it begins.

    Python prints a warning for each that was made and never awaited, as happens where Ctrl-C comes between the two. In
    the event loop's thread no signal's handler can.
    """

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._coroutine: Coroutine[Any, Any, T] | None = None

    def _made(self) -> Coroutine[Any, Any, T]:
        if self._coroutine is None:
            self._coroutine = _awaited(self._call)
        return self._coroutine

    def send(self, value: Any, /) -> Any:
        return self._made().send(value)

    def throw(self, *error: Any) -> Any:
        return self._made().throw(*error)

    def close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._made().__await__()


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    # A task takes coroutines alone, and anext() of a generator is only an awaitable.
    return await call()


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
        self._ending: LoopThread | None = None
        self._forget()

    def _forget(self) -> None:
        # Reentrant: a signal's handler may interrupt it and come here.
        self._guard = threading.RLock()
        self._users: weakref.WeakSet[object] = weakref.WeakSet()

    @property
    def current(self) -> LoopThread | None:
        """The thread that serves at the moment, if there is one."""
        thread = self._current
        return thread if thread is not None and thread.serves else None

    def serving(self, user: object) -> LoopThread:
        """Give the thread that serves *user*; start one if there is none.

        Raises:
            ClientUnusable: if none can run here, or the caller is run by it.
        """
        if sys.is_finalizing():
            raise _ended()
        with self._guard:
            thread = self._current
            if thread is not None and thread.is_current:
                raise ClientUnusable("a blocking client cannot be used by code that runs in its own thread")
            if thread is None or not thread.serves:
                # Before it runs: a signal's handler or a greenlet that comes here meanwhile must find this one.
                thread = self._current = LoopThread(after=self._ending)
                self._ending = None
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
            self._current, self._ending = None, thread
        thread.stop()
        if self._ending is thread:
            self._ending = None

    def begin_anew(self) -> None:
        """Forget the thread: it runs in the parent of this forked process."""
        self._current = self._ending = None
        self._forget()


SHARED = Shared()
