"""Answers to requests that fail: always `{"error": ...}`, one line."""

from textwrap import shorten

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from contracap.apps.serve.batching import BatchError
from contracap.image_files import ImageError


def problem(status: int, error: str, **headers: str) -> JSONResponse:
    """Return the answer that says what went wrong."""
    return JSONResponse({"error": shorten(error, 500, placeholder=" ...")}, status, headers)


async def _bad_image(_: Request, error: Exception) -> JSONResponse:
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
    return problem(500, "internal error; see the server log")


HANDLERS = {
    ImageError: _bad_image,
    RequestValidationError: _invalid,
    HTTPException: _refused,
    BatchError: _failed,
    Exception: _failed,
}
