"""The web page's files, and what a browser may do with them."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
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


def page_router() -> APIRouter:
    """`/`, `/logo.svg` and `/static/NAME`. They hold no secret, so they are served without an API key."""
    files = {path.name: path for path in STATIC.iterdir()}
    router = APIRouter(include_in_schema=False)

    @router.get("/static/{name}")
    def static(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], media_type=MEDIA_TYPES[files[name].suffix], headers=HEADERS)

    @router.get("/")
    def page() -> FileResponse:
        return static("page.html")

    @router.get("/logo.svg")
    def logo() -> FileResponse:
        return static("logo.svg")

    return router
