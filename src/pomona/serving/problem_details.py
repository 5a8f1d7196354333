"""Errors of the service as problem details (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from pomona.core.schema import CRASHED, EMPTY, NOT_AN_IMAGE, TOO_LARGE, TRUNCATED, UNREADABLE

MEDIA_TYPE = "application/problem+json"

PHOTOS = {
    UNREADABLE: (400, "The photo's bytes could not be read: send it again."),
    EMPTY: (400, "The photo has no bytes: send a whole file."),
    NOT_AN_IMAGE: (415, "This is no JPEG, PNG, WebP, BMP, GIF or TIFF: send one of those."),
    TRUNCATED: (422, "The photo is cut off or damaged: send a whole file."),
    TOO_LARGE: (413, "The photo is too large: send a smaller one."),
    CRASHED: (422, "The photo ended or stalled the decoder: save it anew with another program."),
}
"""Status and detail of each code of `pomona.core.schema.ERRORS`."""


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """A request that can't be answered. ``code`` is for programs, ``detail`` for people."""

    def __init__(
        self, status: int, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(json.dumps(self.body), self.status, self.headers, MEDIA_TYPE)


def of_photo(code: str) -> Problem:
    """Return the problem of a photo that can't be used."""
    status, detail = PHOTOS[code]
    return Problem(status, code, detail)


SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "description": "about:blank: `code` tells which."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, and what to do."},
        "code": {"type": "string", "description": "For programs."},
    },
}
"""JSON Schema of a problem, for OpenAPI."""


def described(status: int, codes: dict[str, str]) -> dict[str, Any]:
    """Return OpenAPI's response object for a status: its codes, each with an example."""
    examples = {
        code: {"value": Problem(status, code, detail).body} for code, detail in codes.items()
    }
    return {
        "description": "; ".join(f"`{code}`" for code in codes),
        "content": {MEDIA_TYPE: {"schema": SCHEMA, "examples": examples}},
    }
