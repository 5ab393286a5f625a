"""Limits of a visitor's requests."""

import re
from collections.abc import Container

from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from contracap.apps.web import MIB

MAX_QUESTION_MIB = 1  # body of every request but an upload: texts and numbers
UPLOAD = "/gradio_api/upload"
# Gradio has more: routes that ask other servers, write files, or call functions of its components.
READ = re.compile(
    r"/((config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|(assets|static)/.*)?"
    r"|/gradio_api/(info|app_id|startup-events|login_check|upload_progress|queue/(data|status)|heartbeat/[^/]*)/?"
    r"|/gradio_api/(file=/|call/).*"
)
ASK = re.compile(r"/gradio_api/(queue/join|cancel|reset|(run|api|call)/[^/]+|call/v2/(?P<name>[^/]+))/?|" + UPLOAD)
ROUTES = {"GET": READ, "HEAD": READ, "POST": ASK}


class LimitVisitors:
    """Middleware that refuses, in one line, what is too large, and routes of gradio that the page does not need."""

    def __init__(self, app: ASGIApp, *, published: Container[str]):
        """`published`: names that may follow call/v2, where gradio fails on others."""
        self.app, self.published = app, published
        self.small = RequestBodyLimitMiddleware(app, MAX_QUESTION_MIB * MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not self._has(scope["method"], scope["path"]):
            await PlainTextResponse("the page has no such address, and fetches nothing", 403)(scope, receive, send)
        elif scope["path"] == UPLOAD:
            await self.app(scope, receive, send)
        else:
            await self.small(scope, receive, send)

    def _has(self, method: str, path: str) -> bool:
        """Return whether the page needs this route."""
        found = ROUTES[method].fullmatch(path) if method in ROUTES else None
        name = found.groupdict().get("name") if found else None
        return found is not None and (name is None or name in self.published)
