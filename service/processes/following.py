"""A serving process follows the state that the leader publishes, see `service.processes.reloads`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import Callable

from service.errors import BusyError
from service.inference.catalogue import Catalogue, Order, State

_log = logging.getLogger(__name__)

_SENT = itertools.count()


class Follower:
    """Belongs to the event loop; models are loaded on a thread, and the loop takes them in one step."""

    def __init__(
        self,
        catalogue: Catalogue,
        read: Callable[[], State | None],
        send: Callable[[Order], bool],
        changed: Callable[[], None],
    ) -> None:
        """Follow nothing yet.

        Args:
            catalogue: of this process.
            read: returns the last state, once.
            send: hands an order to the leader; returns whether there was room.
            changed: called after the catalogue has followed.
        """
        self._catalogue = catalogue
        self._read = read
        self._send = send
        self._changed = changed
        self._thread: threading.Thread | None = None
        self._state: State | None = None
        self._waiting: dict[str, asyncio.Future[str | None]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether models are being loaded."""
        return self._state is not None

    def look(self) -> None:
        """Follow a new state; called several times a second."""
        if self._state is not None:
            if self._thread is not None and self._thread.is_alive():
                return
            self._changed()
            for number, fault in self._state.results.items():
                future = self._waiting.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(fault)
            self._state = self._thread = None
        state = self._read()
        if state is None:
            return
        if state.is_reading:
            self._catalogue.retain()
            return
        self._state = state
        # Daemon: the end of the server does not wait for a model.
        self._thread = threading.Thread(target=self._follow, args=(state,), name="models", daemon=True)
        self._thread.start()

    async def ask(self, order: Order) -> str | None:
        """Hand an order to the leader; return why it was refused, null once this process has followed it.

        Raises:
            BusyError: too many orders wait.
        """
        number = f"{os.getpid()}-{next(_SENT)}"
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            if not self._send(order._replace(id=number)):
                raise BusyError("too many orders wait; try again later")
            return await future
        finally:
            self._waiting.pop(number, None)

    def _follow(self, state: State) -> None:
        try:
            self._catalogue.follow(state, warms=True)
        except Exception:
            _log.exception("the models could not be changed")
