"""Middleware: counts of requests, the API key, and limits on the bytes, seconds and places that a request takes."""

import asyncio
import secrets
from time import perf_counter

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracap.apps.serve.config import AccessConfig
from contracap.apps.serve.error_responses import problem
from contracap.apps.serve.in_flight import RequestLimiter
from contracap.apps.serve.metrics import Metrics
from contracap.apps.serve.service import Service
from contracap.apps.web import MIB, BodyTooLargeError, limit_body

SMALL_BODY = 1  # MiB, of what is not an image: it is parsed between other requests
CLIENT_GONE = 499  # nginx's status for a request whose client has left


def add_middleware(
    app: FastAPI, service: Service, access: AccessConfig, *, image_paths: frozenset[str], paths: frozenset[str]
) -> None:
    """Add the middleware, innermost first: what is added last sees a request first.

    Args:
        image_paths: paths whose bodies may have `max_body_mib`.
        paths: all paths, each of which is counted by itself.
    """
    app.add_middleware(LimitRequests, in_flight=service.in_flight, image_paths=image_paths)
    if access.api_key is not None:
        app.add_middleware(RequireKey, key=access.api_key)
    app.add_middleware(CountRequests, metrics=service.metrics, routes=paths)
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )


class CountRequests:
    """Middleware that counts every request except CORS preflights.

    Unknown routes are counted together, because anyone can make up paths.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]):
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            status = 500  # which is sent further out
            raise
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - start)


class RequireKey:
    """Middleware that refuses requests to `/v1/...` without `Authorization: Bearer KEY` before their body is read."""

    def __init__(self, app: ASGIApp, *, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key, self.key):
                error = "missing or wrong API key: send the header Authorization: Bearer KEY"
                return await problem(401, error, **{"WWW-Authenticate": "Bearer"})(scope, receive, send)
        return await self.app(scope, receive, send)


class _Gone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class _TooManyBytesError(Exception):
    """There is no memory for another body."""


class LimitRequests:
    """Middleware that reads each body within the limits, then has it answered while its client is there.

    What is refused early is not read, but the server discards what still comes: most clients look at the answer only
    after they have sent all.

    Args:
        image_paths: the paths whose bodies may have `max_body_mib`; those of others have `SMALL_BODY`.
    """

    def __init__(self, app: ASGIApp, *, in_flight: RequestLimiter, image_paths: frozenset[str]):
        self.app, self.limits, self.in_flight, self.image_paths = app, in_flight.limits, in_flight, image_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):  # these take nothing and wait for nothing
            await self.app(scope, receive, send)
        elif self.in_flight.full:
            await self._refuse(scope, receive, send)
        else:
            place = object()
            self.in_flight.bodies[place] = 0
            try:
                await self._within_limits(place, scope, receive, send)
            finally:
                del self.in_flight.bodies[place]

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await problem(503, self.in_flight.refusal, **{"Retry-After": "1"})(scope, receive, send)

    async def _within_limits(self, place: object, scope: Scope, receive: Receive, send: Send) -> None:
        most = self.limits.max_body_mib
        if scope["path"] not in self.image_paths:
            most = min(most, SMALL_BODY)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                body = await self._body(place, limit_body(scope, receive, most * MIB))
        except TimeoutError:
            error = f"the body did not come within {self.limits.timeout_s:g} seconds"
            await problem(408, error, Connection="close")(scope, receive, send)
        except BodyTooLargeError:
            error = f"the body is larger than {most:g} MiB, the most this server takes"
            await problem(413, error)(scope, receive, send)
        except _TooManyBytesError:
            await self._refuse(scope, receive, send)
        except _Gone:
            return
        else:
            await self._answer(body, scope, receive, send)

    async def _body(self, place: object, receive: Receive) -> bytearray:
        """Read the whole body."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            self.in_flight.bodies[place] = len(body)
            if self.in_flight.too_many_bytes:
                raise _TooManyBytesError
            if not message.get("more_body", False):
                return body

    async def _answer(self, body: bytearray, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer; cancel it when the time is up or the client has gone."""
        started = False

        async def read() -> Message:
            piece = bytes(body[:MIB])
            del body[:MIB]
            await asyncio.sleep(0)  # others continue while a form is taken apart
            return {"type": "http.request", "body": piece, "more_body": bool(body)}

        async def written(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        answer = asyncio.ensure_future(self.app(scope, read, written))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([answer, gone], timeout=self.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            late = not answer.done() and not gone.done()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled():
            answer.result()  # raises what it raised
        elif late and not started:
            await problem(504, f"there was no answer within {self.limits.timeout_s:g} seconds")(scope, receive, send)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
