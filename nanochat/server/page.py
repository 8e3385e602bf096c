"""The web page's files, and what a browser may do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{what}-src 'self'" for what in ("script", "style", "img", "connect")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",  # a text that is written as HTML is an error, whoever wrote that line
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version's files must not meet an old one's
}


def page_files() -> dict[str, Path]:
    """The file behind each path. They hold no secret, so a server with an API key serves them without it."""
    files = {f"/static/{path.name}": path for path in sorted(STATIC.iterdir())}
    return {"/": files["/static/page.html"], "/logo.svg": files["/static/logo.svg"], **files}


def page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, file in page_files().items():
        router.add_api_route(path, _answer(file), response_class=FileResponse)
    return router


def _answer(file: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)
