"""The routes: what is asked over HTTP, and by whom it is answered."""

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

import contracap
from contracap.apps.page import page, paragraph, table
from contracap.apps.serve.answers import (
    MAX_CHARACTERS,
    MAX_TEXT_LENGTH,
    Alternative,
    Answer,
    Answers,
    CaptionAnswer,
    Classification,
    LabelAnswer,
    PictureEmbedding,
    Problem,
    State,
    TextEmbeddings,
    Texts,
)
from contracap.apps.serve.batching import Batcher, BatchError, BatchingConfig, Turns
from contracap.apps.serve.config import AccessConfig, LimitsConfig
from contracap.apps.serve.limits import LimitRequests, RequireKey, UnderWay, problem
from contracap.apps.serve.metrics import CountRequests, Metrics
from contracap.apps.serve.model import Picture, ServedModel
from contracap.config import ConfigError
from contracap.evaluation.zeroshot import TEMPLATE, check_templates
from contracap.generation.registry import build_strategy
from contracap.generation.strategy import Strategy
from contracap.images import ImageError, pixel_count
from contracap.model.coca import CoCa
from contracap.processor import Processor

Made = TypeVar("Made")

MAX_BEAMS = 32  # rows that one image may take in a batch
MAX_LABELS = 100
MAX_PICTURES = 16  # of a form
DECODERS = min(4, os.cpu_count() or 1)
LARGE = 16_000_000  # pixels of images that are decoded one at a time: several would take gigabytes
TRIM_SECONDS = 2

BYTES = {"type": "string", "format": "binary"}
PICTURE = {
    "requestBody": {
        "required": True,
        "description": "the bytes of an image file: JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF; or a form with several",
        "content": {kind: {"schema": BYTES} for kind in ("image/*", "application/octet-stream")}
        | {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": BYTES, "maxItems": MAX_PICTURES}},
                }
            }
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

        Raises: ConfigError: for an unknown name or setting, a wrong value, or more rows than an image may take.
        """
        asked = dict(query)
        name = asked.pop("strategy", None)
        settings = [f"{key}={value}" for key, value in asked.items()]
        strategy = build_strategy(name or self.name, settings if name else [*self.settings, *settings])
        if strategy.rows > MAX_BEAMS:
            raise ConfigError(f"{strategy.rows} beams or samples of an image are more than the {MAX_BEAMS} allowed")
        return strategy


def _tokens(strategy: Strategy) -> int:
    """What a strategy may write for an image: the measure of its cost."""
    return strategy.rows * strategy.max_tokens


def build_app(
    model: CoCa,
    processor: Processor,
    *,
    default: DefaultStrategy,
    batching: BatchingConfig,
    limits: LimitsConfig,
    access: AccessConfig = AccessConfig(),
) -> FastAPI:
    """The application, for any ASGI server.

    Raises: ValueError: if the default strategy is wrong, or the model cannot follow it.
    """
    served, metrics, under_way = ServedModel(model, processor), Metrics(), UnderWay(limits)
    if served.captioner is not None:
        served.captioner.check(default.strategy({}))
    usual, turns = _tokens(default.strategy({})), Turns()
    batcher = Batcher(batching, turns=turns, observe=metrics.batch_sizes.observe)
    heavy = Batcher(batching, turns=turns, heavy=True, observe=metrics.batch_sizes.observe)
    metrics.queue_length.set_function(lambda: batcher.waiting + heavy.waiting)
    metrics.under_way.set_function(lambda: len(under_way.bodies))
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    large = ThreadPoolExecutor(1, thread_name_prefix="decode-large")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher, heavy:
            trimming = asyncio.create_task(_trim(large))
            yield
            trimming.cancel()
        for pool in (decoders, large):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPIOffline(  # the docs of FastAPI itself load their scripts from elsewhere
        redoc_url=None,
        title="contracap",
        version=contracap.__version__,
        lifespan=lifespan,
        responses={"default": {"model": Problem, "description": "what went wrong"}},
    )
    # RequireKey checks the key; this only describes it in /openapi.json
    key = [] if access.api_key is None else [Security(HTTPBearer(auto_error=False))]

    async def picture(data: bytes) -> Picture:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(decoders, pixel_count, data)
        return await loop.run_in_executor(large if pixels > LARGE else decoders, served.picture, data)

    async def answer_each(request: Request, answer: Callable[[Picture], Awaitable[Answer]]) -> Answer | Answers[Answer]:
        """One answer if the body is an image, a list of them if it is a form."""
        if not request.headers.get("content-type", "").startswith("multipart/"):
            return await answer(await picture(await request.body()))

        async def one(data: bytes) -> Answer | Problem:
            try:
                return await answer(await picture(data))
            except ImageError as error:
                return Problem(error=str(error))

        return Answers(answers=await _all(one(data) for data in await _files(request)))

    @app.post("/v1/caption", openapi_extra=PICTURE | SETTINGS, dependencies=key)
    async def caption(
        request: Request,
        prompt: Annotated[str, Query(max_length=MAX_TEXT_LENGTH, description="what the caption begins with")] = "",
        embedding: Annotated[bool, Query(description="whether the image's embedding is given too")] = False,
    ) -> CaptionAnswer | Answers[CaptionAnswer]:
        """Write a caption for an image."""
        if served.captioner is None:
            raise HTTPException(501, "this model has no text decoder (it is a CLIP): it can embed and classify only")
        settings = {key: value for key, value in request.query_params.items() if key not in ("prompt", "embedding")}
        if sum(len(key) + len(value) for key, value in settings.items()) > MAX_TEXT_LENGTH:
            raise HTTPException(400, f"the settings have more than the {MAX_TEXT_LENGTH} characters allowed")
        try:
            strategy = default.strategy(settings)
            await asyncio.get_running_loop().run_in_executor(decoders, served.captioner.check, strategy, prompt)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        share = batching.max_batch * usual / _tokens(strategy)  # images that cost as much as a batch of the default's
        queue = batcher if share >= batching.max_batch else heavy

        async def answer(picture: Picture) -> CaptionAnswer:
            best = await queue.submit(served.captions, strategy, (picture, prompt), most=max(1, int(share)))
            texts = [
                Alternative(caption=text.text, score=text.score, log_probability=text.log_probability)
                for text in best.alternatives
            ]
            vector = best.embedding.tolist() if embedding else None
            return CaptionAnswer(**texts[0].model_dump(), alternatives=texts, embedding=vector)

        return await answer_each(request, answer)

    @app.post("/v1/classify", openapi_extra=PICTURE, dependencies=key)
    async def classify(
        request: Request,
        label: Annotated[list[str], Query(min_length=1, max_length=MAX_LABELS, description="once for each label")],
        template: Annotated[str, Query(description="a text with {} where the label goes")] = TEMPLATE,
    ) -> Classification | Answers[Classification]:
        """Say which of some labels fits an image, without any training on them."""
        labels = tuple(dict.fromkeys(label))  # what is asked twice would have its probability halved
        try:
            templates = check_templates([template])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        _check_characters(len(labels) * len(template) + template.count("{}") * sum(map(len, labels)))

        async def answer(picture: Picture) -> Classification:
            similarities = await batcher.submit(served.similarities, (labels, templates), picture)
            probabilities = torch.softmax(similarities * served.logit_scale, dim=0)
            rows = zip(labels, probabilities.tolist(), similarities.tolist(), strict=True)
            answers = [LabelAnswer(label=name, probability=share, similarity=cosine) for name, share, cosine in rows]
            return Classification(labels=sorted(answers, key=lambda answer: -answer.similarity))

        return await answer_each(request, answer)

    @app.post("/v1/embed/image", openapi_extra=PICTURE, dependencies=key)
    async def embed_image(request: Request) -> PictureEmbedding | Answers[PictureEmbedding]:
        """Put an image into the space of images and texts."""

        async def answer(picture: Picture) -> PictureEmbedding:
            embedding = await batcher.submit(served.picture_embeddings, None, picture)
            return PictureEmbedding(embedding=embedding.tolist())

        return await answer_each(request, answer)

    @app.post("/v1/embed/text", dependencies=key)
    async def embed_text(texts: Texts) -> TextEmbeddings:
        """Put texts into the space of images and texts."""
        _check_characters(sum(map(len, texts.texts)))
        made = await _all(batcher.submit(served.text_embeddings, None, text) for text in texts.texts)
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
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

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
            paragraph("/docs tries them out in a browser; /openapi.json describes them for programs."),
        ]
        return HTMLResponse(page("contracap", {"": parts}))

    pictures = frozenset({"/v1/caption", "/v1/classify", "/v1/embed/image"})
    app.add_middleware(LimitRequests, limits=limits, under_way=under_way, pictures=pictures)
    if access.api_key is not None:
        app.add_middleware(RequireKey, key=access.api_key)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(CountRequests, metrics=metrics, routes=paths)
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    for error, answer in ANSWERS.items():
        app.add_exception_handler(error, answer)
    return app


async def _trim(pool: ThreadPoolExecutor) -> None:
    """Hand memory that is free back to the system every few seconds: glibc keeps what the threads have freed."""
    trim = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.get_running_loop().run_in_executor(pool, trim, 0)


def _check_characters(characters: int) -> None:
    """Raises: HTTPException: if the texts of a request are too long together."""
    if characters > MAX_CHARACTERS:
        error = f"the texts have {characters} characters together, more than the {MAX_CHARACTERS} allowed"
        raise HTTPException(400, error)


async def _files(request: Request) -> list[bytes]:
    """The files of a form."""
    async with request.form(max_files=MAX_PICTURES) as form:
        files = [file for _, file in form.multi_items()]
        if not files or not all(isinstance(file, UploadFile) for file in files):
            error = "a form may hold image files only, as in curl -F image=@a.jpg; put settings into the query"
            raise HTTPException(400, error)
        return [await file.read() for file in files if isinstance(file, UploadFile)]


async def _all(calls: Iterable[Awaitable[Made]]) -> list[Made]:
    """What the calls return, together; if one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


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
