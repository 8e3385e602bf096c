"""How the server ends: a first SIGTERM or Ctrl-C closes it in order, a second one at once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from types import FrameType

import uvicorn

from nanochat.server.pool import Pool

log = logging.getLogger("nanochat.server")

EXIT_AT_ONCE = 130  # what shells give for Ctrl-C
LAST_SECONDS = 5  # for clients to read the end of their answers
# Clients and proxies keep an idle connection for 4 to 60 s. Who closes first must be the client, or the server may do
# so just when the next request is on its way.
IDLE_SECONDS = 75


class StoppableServer(uvicorn.Server):
    """Listens on while it stops, so that new requests are told so.

    Args:
        how: "finish" = accepted requests are answered, "cancel" = they end with an error.
        seconds: after which all that is left is cancelled.
    """

    def __init__(self, config: uvicorn.Config, pool: Pool, how: str, seconds: float) -> None:
        config.timeout_graceful_shutdown, config.timeout_keep_alive = LAST_SECONDS, IDLE_SECONDS
        super().__init__(config)
        self.pool, self.how, self.seconds = pool, how, seconds
        self.closing: asyncio.Task[None] | None = None
        self.told = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()  # before signals are listened to
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of the signals that uvicorn listens to."""
        if self.told:
            os._exit(EXIT_AT_ONCE)
        self.told = True
        self.loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        what = "answering what was accepted" if self.how == "finish" else "cancelling what runs"
        log.info("%s: %s, at most %g s; once more = at once", name, what, self.seconds)
        self.closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        try:
            await self.pool.close(self.how, self.seconds)
        finally:  # whatever happens there, or nothing would ever end it
            self.should_exit = True
