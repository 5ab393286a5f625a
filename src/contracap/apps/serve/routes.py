"""Routes below /v1 that use the model."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from contracap.apps.serve.model import Image
from contracap.apps.serve.schemas import (
    IMAGE_BODY,
    MAX_IMAGES,
    MAX_TEXT_LENGTH,
    STRATEGY_PARAMETERS,
    Alternative,
    CaptionResult,
    Classification,
    ImageEmbedding,
    LabelResult,
    Problem,
    Result,
    Results,
    TextEmbeddings,
    Texts,
)
from contracap.apps.serve.service import Service
from contracap.evaluation.class_names import TEMPLATE, check_templates
from contracap.evaluation.zeroshot import count_characters
from contracap.image_files import ImageError

MAX_LABELS = 100
MAX_CHARACTERS = 65_536  # of all texts of a request
IMAGE_PATHS = frozenset({"/v1/caption", "/v1/classify", "/v1/embed/image"})

Value = TypeVar("Value")


async def refuse_repeated_settings(request: Request) -> None:
    """Raises: HTTPException: if the query gives anything but a label twice; only one value would count."""
    names = [name for name, _ in request.query_params.multi_items() if name != "label"]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise HTTPException(400, f"{', '.join(repeated)}: given more than once; give it once")


router = APIRouter(prefix="/v1", dependencies=[Depends(refuse_repeated_settings)])


async def get_service(request: Request) -> Service:
    """Return the service of the application that a request came to."""
    return request.app.state.service


CurrentService = Annotated[Service, Depends(get_service)]


@router.post("/caption", openapi_extra=IMAGE_BODY | STRATEGY_PARAMETERS)
async def caption(
    request: Request,
    service: CurrentService,
    prompt: Annotated[str, Query(max_length=MAX_TEXT_LENGTH, description="beginning of the caption")] = "",
    embedding: Annotated[bool, Query(description="also return the image's embedding")] = False,
) -> CaptionResult | Results[CaptionResult]:
    """Write a caption for an image."""
    if service.model.captioner is None:
        raise HTTPException(501, "this model has no text decoder (it is a CLIP): it can embed and classify only")
    settings = {key: value for key, value in request.query_params.items() if key not in ("prompt", "embedding")}
    if sum(len(key) + len(value) for key, value in settings.items()) > MAX_TEXT_LENGTH:
        raise HTTPException(400, f"the settings have more than the {MAX_TEXT_LENGTH} characters allowed")
    try:
        strategy = await service.choose_strategy(settings, prompt)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None

    async def answer(image: Image) -> CaptionResult:
        best = await service.caption(image, strategy, prompt)
        texts = [
            Alternative(caption=text.text, score=text.score, log_probability=text.log_probability)
            for text in best.alternatives
        ]
        vector = best.embedding.tolist() if embedding else None
        return CaptionResult(**texts[0].model_dump(), alternatives=texts, embedding=vector)

    return await _process_each(request, service, answer)


@router.post("/classify", openapi_extra=IMAGE_BODY)
async def classify(
    request: Request,
    service: CurrentService,
    label: Annotated[list[str], Query(min_length=1, max_length=MAX_LABELS, description="a label; repeat it for each")],
    template: Annotated[str, Query(description="a text with {} where the label goes")] = TEMPLATE,
) -> Classification | Results[Classification]:
    """Classify an image among the given labels (zero-shot)."""
    labels = tuple(label)
    if not all(text.strip() for text in labels) or len(set(labels)) < len(labels):
        raise HTTPException(400, "label: give each label once, and none empty")
    try:
        templates = check_templates([template])
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    _check_characters(count_characters(labels, templates))

    async def answer(image: Image) -> Classification:
        cosines, probabilities = await service.classify(image, labels, templates)
        rows = zip(labels, probabilities.tolist(), cosines.tolist(), strict=True)
        answers = [LabelResult(label=name, probability=share, similarity=cosine) for name, share, cosine in rows]
        return Classification(labels=sorted(answers, key=lambda answer: -answer.similarity))

    return await _process_each(request, service, answer)


@router.post("/embed/image", openapi_extra=IMAGE_BODY)
async def embed_image(request: Request, service: CurrentService) -> ImageEmbedding | Results[ImageEmbedding]:
    """Return the embedding of an image."""

    async def answer(image: Image) -> ImageEmbedding:
        return ImageEmbedding(embedding=(await service.embed_image(image)).tolist())

    return await _process_each(request, service, answer)


@router.post("/embed/text")
async def embed_text(texts: Texts, service: CurrentService) -> TextEmbeddings:
    """Return the embeddings of texts."""
    _check_characters(sum(map(len, texts.texts)))
    embeddings = await _gather(service.embed_text(text) for text in texts.texts)
    return TextEmbeddings(embeddings=[embedding.tolist() for embedding in embeddings])


async def _process_each(
    request: Request, service: Service, answer: Callable[[Image], Awaitable[Result]]
) -> Result | Results[Result]:
    """Return one answer if the body is an image, a list of them if it is a form."""
    if not request.headers.get("content-type", "").startswith("multipart/"):
        return await answer(await service.read_image(await request.body()))

    async def one(data: bytes) -> Result | Problem:
        try:
            return await answer(await service.read_image(data))
        except ImageError as error:
            return Problem(error=str(error))

    return Results(answers=await _gather(one(data) for data in await _files(request)))


async def _files(request: Request) -> list[bytes]:
    """Read the files of a form."""
    async with request.form(max_files=MAX_IMAGES) as form:
        files = [file for _, file in form.multi_items()]
        if not files or not all(isinstance(file, UploadFile) for file in files):
            error = "a form may hold image files only, as in curl -F image=@a.jpg; put settings into the query"
            raise HTTPException(400, error)
        return [await file.read() for file in files if isinstance(file, UploadFile)]


def _check_characters(characters: int) -> None:
    """Raises: HTTPException: if the texts of a request are too long together."""
    if characters > MAX_CHARACTERS:
        error = f"the texts have {characters} characters together, more than the {MAX_CHARACTERS} allowed"
        raise HTTPException(400, error)


async def _gather(calls: Iterable[Awaitable[Value]]) -> list[Value]:
    """Await all calls; if one raises, cancel the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
