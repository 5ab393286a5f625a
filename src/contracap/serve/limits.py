"""What one request may cost: bytes, seconds, and a place among those under way."""

import asyncio
from dataclasses import dataclass
from textwrap import shorten

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracap.web import MIB, BodyTooLargeError, limited


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits of a request.

    Attributes:
        max_body_mib: MiB of a body; more is refused as soon as it is said, or comes.
        timeout_s: seconds that a body may take to come, and then its answer.
        max_requests: requests with a body under way at once, uploads included. Together with `max_body_mib` this
            bounds the memory that bodies take.
    """

    max_body_mib: float = 20.0
    timeout_s: float = 60.0
    max_requests: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.max_body_mib <= 4096:
            raise ValueError(f"max_body_mib must be above 0 and at most 4096 MiB, not {self.max_body_mib}")
        if not 0 < self.timeout_s <= 86400:
            raise ValueError(f"timeout_s must be above 0 and at most 86400 seconds, not {self.timeout_s}")
        if self.max_requests < 1:
            raise ValueError(f"max_requests must be at least 1 request, not {self.max_requests}")


@dataclass
class UnderWay:
    """Requests with a body that are being read or answered, and how many may be at most."""

    most: int
    count: int = 0

    @property
    def full(self) -> bool:
        """Whether another one is refused."""
        return self.count >= self.most

    @property
    def refusal(self) -> str:
        """Why."""
        return f"{self.count} requests are under way, as many as this server takes: try again later"


def problem(status: int, error: str, **headers: str) -> JSONResponse:
    """The answer to whatever went wrong: `{"error": ...}`, one line."""
    return JSONResponse({"error": shorten(error, 500, placeholder=" ...")}, status, headers)


class _Gone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class LimitRequests:
    """Middleware that reads each body within the limits, then has it answered while its client is there.

    What is refused early is not read, but the server discards what still comes: most clients look at the answer only
    after they have sent all.
    """

    def __init__(self, app: ASGIApp, *, limits: LimitsConfig, under_way: UnderWay):
        self.app, self.limits, self.under_way = app, limits, under_way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):  # these take nothing and wait for nothing
            await self.app(scope, receive, send)
        elif self.under_way.full:
            await problem(503, self.under_way.refusal, **{"Retry-After": "1"})(scope, receive, send)
        else:
            self.under_way.count += 1
            try:
                await self._within_limits(scope, receive, send)
            finally:
                self.under_way.count -= 1

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                body = await _body(limited(scope, receive, self.limits.max_body_mib * MIB))
        except TimeoutError:
            error = f"the body did not come within {self.limits.timeout_s:g} seconds"
            await problem(408, error, Connection="close")(scope, receive, send)
        except BodyTooLargeError:
            error = f"the body is larger than {self.limits.max_body_mib:g} MiB, the most this server takes"
            await problem(413, error)(scope, receive, send)
        except _Gone:
            return
        else:
            await self._answer(body, scope, receive, send)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer; cancel it when the time is up or the client has gone."""
        started = False

        async def read() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

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


async def _body(receive: Receive) -> bytes:
    """The whole body."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
