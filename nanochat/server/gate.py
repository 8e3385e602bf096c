"""What every request passes before it reaches a route: the key, the size and pace of its body, and the count."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.server.errors import ApiError
from nanochat.server.metrics import Metrics
from nanochat.server.page import page_files

log = logging.getLogger("nanochat.server")

OPEN_PATHS = ("/health", "/openapi.json")  # need no key, like the page: nothing can be done or learnt with them
BODY_SECONDS = 30.0  # that a client gets to send its whole request


class ClientGone(Exception):
    pass


class Gate:
    """ASGI middleware. Reads the whole body before the application runs, at most `max_body_bytes` of it."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, paths: Collection[str], api_key: str | None, max_body_bytes: int
    ) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)
        self.open_paths = {*OPEN_PATHS, *page_files()}
        self.key = api_key.encode() if api_key else None
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        def count(status: int) -> None:
            known = path if path in self.paths else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.requests.labels(known, method, status).inc()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            headers = Headers(scope=scope)
            if self.key and path not in self.open_paths and not self._has_key(headers):
                raise ApiError(
                    401,
                    "this server wants its API key in the Authorization header: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if scope["method"] == "POST":
                receive = await self._with_body(headers, receive)
        except ApiError as error:
            await error.response(path)(scope, receive, counting)
        except ClientGone:
            pass
        else:
            try:
                await self.app(scope, receive, counting)
            except Exception:
                count(500)  # answered outside of this
                raise

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        assert self.key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.key)

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """`receive` whose first message is the whole body.

        Raises:
            ApiError: it is too long, or too slow.
            ClientGone: half of it came.
        """
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 20 or int(length) > self.max_body_bytes):
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request was not complete after {BODY_SECONDS:g} s", code="timeout") from None
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Message:
            return next(messages, None) or await receive()

        return receive_again

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request is larger than the {self.max_body_bytes} bytes allowed", code="request_too_large"
        )
