"""The API's requests and answers, for its OpenAPI document. The service writes JSON itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from pomona.serving import problem_details, uploads


class Near(BaseModel):
    """A label and how probable it is."""

    label: str
    probability: float


class Answer(BaseModel):
    """What is on a photo."""

    label: str | None = Field(description="null: unknown, or the photo can't be used")
    probability: float | None = Field(description="of the most probable label, also if unknown")
    unknown: bool | None = Field(description="true: none of the labels; null: see error")
    reason: str | None = Field(description="why it is unknown")
    score: float | None = Field(description="below the model's threshold: unknown")
    nearest: list[Near] = Field(description="the most probable labels, best first")
    error: str | None = Field(description="code of a photo that can't be used")


class Version(BaseModel):
    """The model that answered."""

    version: str


class Answers(BaseModel):
    """One answer for each photo, in their order."""

    answers: list[Answer]
    model: Version
    milliseconds: float = Field(description="in the server, waiting included")


class Features(BaseModel):
    """1280 numbers, as `pomona extract` computes them; null for a photo that can't be used."""

    features: list[float] | None
    width: int | None = Field(description="pixels, as the file says")
    height: int | None
    error: str | None


class AllFeatures(BaseModel):
    """Features for each photo, in their order."""

    photos: list[Features]
    model: Version
    milliseconds: float


class Card(BaseModel):
    """The model: its labels, what it was made from, and how good it is."""

    version: str
    labels: list[str]
    metrics: dict[str, Any]
    card: dict[str, Any] = Field(description="all that model.json says")


class Reloaded(BaseModel):
    """Which model answers now."""

    version: str
    changed: bool


EXAMPLE = {
    "answers": [
        {
            "label": "Apple",
            "probability": 0.98,
            "unknown": False,
            "reason": None,
            "score": -121.5,
            "nearest": [
                {"label": "Apple", "probability": 0.98},
                {"label": "Tomato", "probability": 0.02},
            ],
            "error": None,
        }
    ],
    "model": {"version": "04ab518eb906"},
    "milliseconds": 7.9,
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys(("image/jpeg", "image/png", "image/webp", uploads.RAW), BINARY),
            uploads.MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["photo"],
                    "properties": {
                        "photo": {"type": "array", "minItems": 1, "items": BINARY["schema"]}
                    },
                }
            },
        },
    }
}


def document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document, completed by an example and the security scheme."""
    schema = FastAPI.openapi(app)
    answered = schema["paths"]["/v1/predict"]["post"]["responses"]["200"]
    answered["content"]["application/json"]["example"] = EXAMPLE  # FastAPI drops its nulls
    if keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


OTHERS = {
    400: {"malformed": "The form can't be read.", "no_photo": "The form holds no file."},
    401: {"unauthorized": "Send a key: Authorization: Bearer KEY."},
    408: {"timeout": "The photo took too long to arrive: send it again, or a smaller one."},
    413: {"too_many_photos": "A request holds 16 photos at most."},
    415: {
        "unsupported_media_type": "Send a photo as the body with its type, or a form.",
        "unsupported_encoding": "Send the photo without Content-Encoding.",
    },
    422: {"invalid_request": "top: Input should be greater than or equal to 1"},
    503: {"overloaded": "The server is busy: send it again.", "stopping": "The server stops."},
}
"""Status, codes and details of problems other than those of photos."""


def responses() -> dict[int | str, dict[str, Any]]:
    """Return the problems that an operation on photos may answer with, for OpenAPI."""
    codes = {status: dict(details) for status, details in OTHERS.items()}
    for code, (status, detail) in problem_details.PHOTOS.items():
        codes[status][code] = detail
    return {status: problem_details.described(status, each) for status, each in codes.items()}
