"""Routes about the server itself: health, metrics, and a page that lists all routes."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException

from contracap.apps.html_page import page, paragraph, table
from contracap.apps.serve.routes import CurrentService
from contracap.apps.serve.schemas import State

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> State:
    """Check that the server is alive."""
    return State(status="alive")


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(service: CurrentService) -> State:
    """Check that the server takes requests; 503 while it takes none."""
    if service.in_flight.full:
        raise HTTPException(503, service.in_flight.refusal, {"Retry-After": "1"})
    return State(status="ready")


@router.get("/metrics", response_class=PlainTextResponse)
async def prometheus(service: CurrentService) -> PlainTextResponse:
    """Prometheus metrics."""
    return PlainTextResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/", include_in_schema=False)
async def root(request: Request) -> HTMLResponse:
    """List the routes."""
    rows = [
        (method.upper(), path, operation["description"])
        for path, methods in request.app.openapi()["paths"].items()
        for method, operation in methods.items()
    ]
    parts = [
        paragraph("curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://HOST:PORT/v1/caption"),
        table(["", "route", "what it does"], rows),
        paragraph("/docs tries them out in a browser; /openapi.json describes them for programs."),
    ]
    return HTMLResponse(page("contracap", {"": parts}))
