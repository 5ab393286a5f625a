"""Bodies of requests and answers, and their descriptions for OpenAPI."""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field

MAX_TEXTS = 256
MAX_TEXT_LENGTH = 4096  # characters; a context is 77 tokens
MAX_IMAGES = 16  # of a form

Result = TypeVar("Result", bound=BaseModel)


class Problem(BaseModel):
    """An error, in one line."""

    error: str


class Alternative(BaseModel):
    """One text for the image."""

    caption: str
    score: float = Field(description="ranking score; higher is better")
    log_probability: float = Field(description="sum over the caption's tokens and the end token, in nats")


class CaptionResult(Alternative):
    """The best text for the image, and the n best."""

    alternatives: list[Alternative] = Field(description="all texts found, best first; the first is the caption")
    embedding: list[float] | None = Field(default=None, description="unit vector of the image, if requested")


class ImageEmbedding(BaseModel):
    """A unit vector in the space that images and texts share."""

    embedding: list[float]


class Results(BaseModel, Generic[Result]):
    """The result for each image of a form, in order, or what is wrong with the image."""

    answers: list[Result | Problem]


class Texts(BaseModel):
    """Texts to embed."""

    texts: list[Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]] = Field(min_length=1, max_length=MAX_TEXTS)


class TextEmbeddings(BaseModel):
    """A unit vector for each text, in their order."""

    embeddings: list[list[float]]


class LabelResult(BaseModel):
    """One label and how well it fits the image."""

    label: str
    probability: float = Field(description="softmax over the labels, at the model's own logit scale")
    similarity: float = Field(description="cosine of image and label")


class Classification(BaseModel):
    """The labels, best first."""

    labels: list[LabelResult]


class State(BaseModel):
    """Server status."""

    status: str


_BYTES = {"type": "string", "format": "binary"}
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "the bytes of an image file: JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF; or a form with several",
        "content": {kind: {"schema": _BYTES} for kind in ("image/*", "application/octet-stream")}
        | {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": _BYTES, "maxItems": MAX_IMAGES}},
                }
            }
        },
    }
}
"""OpenAPI's description of the routes that take images. FastAPI would read the whole body as a form or as JSON."""
STRATEGY_PARAMETERS: dict[str, Any] = {
    "parameters": [
        {
            "name": "strategy",
            "in": "query",
            "description": "decoding strategy, such as greedy or beam; by default the server's",
            "schema": {"type": "string"},
        },
        {
            "name": "settings",
            "in": "query",
            "description": "the strategy's settings by name, such as width=6&length_penalty=0.5",
            "style": "form",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    ]
}
"""OpenAPI's description of a strategy with its settings, whose names FastAPI does not know."""
