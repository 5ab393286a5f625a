"""What is answered, as OpenAPI describes it, and the one thing that is asked in JSON."""

from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field

MAX_TEXTS = 256
MAX_TEXT_LENGTH = 4096  # characters; a context is 77 tokens
MAX_CHARACTERS = 65_536  # of all texts of a request

Answer = TypeVar("Answer", bound=BaseModel)


class Problem(BaseModel):
    """What went wrong, in one line."""

    error: str


class Alternative(BaseModel):
    """One text for the image."""

    caption: str
    score: float = Field(description="what ranks the texts, higher is better")
    log_probability: float = Field(description="sum over its tokens and the end token, in nats")


class CaptionAnswer(Alternative):
    """The best text for the image, and the n best."""

    alternatives: list[Alternative] = Field(description="best first; the first is the caption itself")
    embedding: list[float] | None = Field(default=None, description="of the image, a unit vector, if it was asked for")


class PictureEmbedding(BaseModel):
    """A unit vector in the space that images and texts share."""

    embedding: list[float]


class Answers(BaseModel, Generic[Answer]):
    """The answer for each image of a form, in their order, or what is wrong with it."""

    answers: list[Answer | Problem]


class Texts(BaseModel):
    """Texts to embed."""

    texts: list[Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]] = Field(min_length=1, max_length=MAX_TEXTS)


class TextEmbeddings(BaseModel):
    """A unit vector for each text, in their order."""

    embeddings: list[list[float]]


class LabelAnswer(BaseModel):
    """One label and how well it fits the image."""

    label: str
    probability: float = Field(description="softmax over the labels, at the model's own logit scale")
    similarity: float = Field(description="cosine of image and label")


class Classification(BaseModel):
    """The labels, best first."""

    labels: list[LabelAnswer]


class State(BaseModel):
    """How the server is."""

    status: str
