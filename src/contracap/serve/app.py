"""The routes: what is asked over HTTP, and by whom it is answered."""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

import contracap
from contracap.config import ConfigError
from contracap.evaluation.zeroshot import TEMPLATE, check_templates
from contracap.generation.choice import build_strategy
from contracap.generation.strategy import Strategy
from contracap.image import ImageError
from contracap.model.coca import CoCa
from contracap.page import page, paragraph, table
from contracap.processor import Processor
from contracap.serve.answers import (
    LONGEST_TEXT,
    Alternative,
    CaptionAnswer,
    Classification,
    LabelAnswer,
    PictureEmbedding,
    Problem,
    State,
    TextEmbeddings,
    Texts,
)
from contracap.serve.batching import Batcher, BatchError, BatchingConfig
from contracap.serve.limits import LimitRequests, LimitsConfig, UnderWay, problem
from contracap.serve.metrics import CountRequests, Metrics
from contracap.serve.model import Picture, ServedModel

MOST_BEAMS = 32  # rows that one picture may take in a batch
MOST_LABELS = 100
DECODERS = min(4, os.cpu_count() or 1)  # a picture of the most pixels allowed takes 270 MB while it is decoded

PICTURE = {
    "requestBody": {
        "required": True,
        "description": "the bytes of a picture file: JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*", "application/octet-stream")
        },
    }
}
SETTINGS = {
    "parameters": [
        {
            "name": "strategy",
            "in": "query",
            "description": "how the text is searched, such as greedy or beam; by default as the server was started",
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


@dataclass(frozen=True)
class DefaultStrategy:
    """How captions are written where a request does not name a strategy.

    Attributes:
        settings: `key=value` each.
    """

    name: str = "beam"
    settings: tuple[str, ...] = ()

    def strategy(self, query: dict[str, str]) -> Strategy:
        """The strategy that a request asks for. Without a name its settings change those of the default.

        Raises: ConfigError: for an unknown name or setting, a wrong value, or more rows than a picture may take.
        """
        asked = dict(query)
        name = asked.pop("strategy", None)
        settings = [f"{key}={value}" for key, value in asked.items()]
        strategy = build_strategy(name or self.name, settings if name else [*self.settings, *settings])
        if strategy.rows > MOST_BEAMS:
            raise ConfigError(f"{strategy.rows} beams or samples of a picture are more than the {MOST_BEAMS} allowed")
        return strategy


def build_app(
    model: CoCa,
    processor: Processor,
    *,
    default: DefaultStrategy,
    batching: BatchingConfig,
    limits: LimitsConfig,
) -> FastAPI:
    """The application, for any ASGI server.

    Raises: ValueError: if the default strategy is wrong, or the model cannot follow it.
    """
    served, metrics, under_way = ServedModel(model, processor), Metrics(), UnderWay(limits.max_requests)
    if served.captioner is not None:
        served.captioner.check(default.strategy({}))
    batcher = Batcher(batching, observe=metrics.batch_sizes.observe)
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield
        decoders.shutdown(wait=False)

    app = FastAPI(
        title="contracap",
        version=contracap.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": Problem, "description": "what went wrong"}},
    )

    async def picture_of(request: Request) -> Picture:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the picture itself as the body, not a form: curl --data-binary @photo.jpg")
        return await asyncio.get_running_loop().run_in_executor(decoders, served.picture, await request.body())

    @app.post("/v1/caption", openapi_extra=PICTURE | SETTINGS)
    async def caption(
        request: Request,
        prompt: Annotated[str, Query(max_length=LONGEST_TEXT, description="what the caption begins with")] = "",
        embedding: Annotated[bool, Query(description="whether the picture's embedding is given too")] = False,
    ) -> CaptionAnswer:
        """Write a caption for a picture."""
        if served.captioner is None:
            raise HTTPException(501, "this model has no text decoder (it is a CLIP): it can embed and classify only")
        settings = {key: value for key, value in request.query_params.items() if key not in ("prompt", "embedding")}
        try:
            strategy = default.strategy(settings)
            served.captioner.check(strategy, prompt)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        best = await batcher.submit(served.captions, strategy, (await picture_of(request), prompt))
        texts = [
            Alternative(caption=text.text, score=text.score, log_probability=text.log_probability)
            for text in best.alternatives
        ]
        vector = best.embedding.tolist() if embedding else None
        return CaptionAnswer(**texts[0].model_dump(), alternatives=texts, embedding=vector)

    @app.post("/v1/classify", openapi_extra=PICTURE)
    async def classify(
        request: Request,
        label: Annotated[list[str], Query(min_length=1, max_length=MOST_LABELS, description="once for each label")],
        template: Annotated[str, Query(description="a text with {} where the label goes")] = TEMPLATE,
    ) -> Classification:
        """Say which of some labels fits a picture, without any training on them."""
        try:
            templates = check_templates([template])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        labels = tuple(dict.fromkeys(label))  # what is asked twice would have its probability halved
        classes = (labels, templates)
        similarities = await batcher.submit(served.similarities, classes, await picture_of(request))
        probabilities = torch.softmax(similarities * served.logit_scale, dim=0)
        rows = zip(labels, probabilities.tolist(), similarities.tolist(), strict=True)
        answers = [LabelAnswer(label=name, probability=share, similarity=cosine) for name, share, cosine in rows]
        return Classification(labels=sorted(answers, key=lambda answer: -answer.similarity))

    @app.post("/v1/embed/image", openapi_extra=PICTURE)
    async def embed_image(request: Request) -> PictureEmbedding:
        """Put a picture into the space of pictures and texts."""
        embedding = await batcher.submit(served.picture_embeddings, None, await picture_of(request))
        return PictureEmbedding(embedding=embedding.tolist())

    @app.post("/v1/embed/text")
    async def embed_text(texts: Texts) -> TextEmbeddings:
        """Put texts into the space of pictures and texts."""
        made = await asyncio.gather(*(batcher.submit(served.text_embeddings, None, text) for text in texts.texts))
        return TextEmbeddings(embeddings=[embedding.tolist() for embedding in made])

    @app.get("/health")
    async def health() -> State:
        """Say that the server is alive."""
        return State(status="alive")

    @app.get("/ready")
    async def ready() -> State:
        """Say whether the server takes another request; 503 while it takes none."""
        if under_way.full:
            raise HTTPException(503, under_way.refusal, {"Retry-After": "1"})
        return State(status="ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> PlainTextResponse:
        """Give counts and times for Prometheus."""
        text = metrics.exposition(waiting=batcher.waiting, under_way=under_way.count)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        rows = [
            (method.upper(), path, operation["description"])
            for path, methods in app.openapi()["paths"].items()
            for method, operation in methods.items()
        ]
        parts = [
            paragraph("curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://HOST:PORT/v1/caption"),
            table(["", "route", "what it does"], rows),
            paragraph("/openapi.json describes them all for programs."),
        ]
        return HTMLResponse(page("contracap", {"": parts}))

    app.add_middleware(LimitRequests, limits=limits, under_way=under_way)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(CountRequests, metrics=metrics, routes=paths)
    for error, answer in ANSWERS.items():
        app.add_exception_handler(error, answer)
    return app


async def _unreadable(_: Request, error: Exception) -> JSONResponse:
    return problem(400, str(error))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if any(found["loc"] == ("body",) for found in error.errors()):
        return problem(400, 'the body must be JSON such as {"texts": ["a cat"]}, its Content-Type application/json')
    return problem(400, "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()))


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), **(error.headers or {}))


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return problem(500, "the server failed on this request; its log says why")


ANSWERS = {
    ImageError: _unreadable,
    RequestValidationError: _invalid,
    HTTPException: _refused,
    BatchError: _failed,
    Exception: _failed,
}
