"""What the server of answers and that of the page share: an address, running until a signal, the bytes of a body."""

import asyncio
import signal
import socket

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 2**20


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, not listening yet: clients are refused until there is something to answer them.

    Raises: OSError: if it cannot have the address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen at {_url_host(host)}:{port}: {why}; give another --host or --port") from None
    return listener


def url(listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://{_url_host(host)}:{port}"


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def run(app: ASGIApp, listener: socket.socket, *, greeting: str, patience: int, log_level: str = "info") -> None:
    """Serve until SIGINT or SIGTERM, and return then: whoever called can clean up.

    Args:
        greeting: printed as soon as clients are let in.
        patience: seconds that requests under way have to be answered once the signal has come.
    """
    config = uvicorn.Config(EndQuietly(app), log_level=log_level, timeout_graceful_shutdown=patience)
    server = _Server(config, greeting)
    # Uvicorn raises the signal again after it has ended, for whoever listened before: that is made itself, not a
    # default that ends the process there and then.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)


class EndQuietly:
    """Middleware that completes the answers which the end of the server cuts short, such as an open page's events."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = completed = False

        async def written(message: Message) -> None:
            nonlocal started, completed
            started, completed = True, message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, written)
        except asyncio.CancelledError:  # nobody but the server that ends cancels a whole request
            if not started:
                await PlainTextResponse("the server is ending", 503)(scope, receive, send)
            elif not completed:
                await send({"type": "http.response.body", "body": b"", "more_body": False})


class BodyTooLargeError(Exception):
    """A request has more bytes than it may."""


def limited(scope: Scope, receive: Receive, most: int | float) -> Receive:
    """`receive`, which raises BodyTooLargeError once the body has more than so many bytes, or at once if it says so.

    They are counted as they come, so a length that is missing or wrong changes nothing.
    """
    said = dict(scope["headers"]).get(b"content-length", b"")
    too_large, came = said.isdigit() and float(said) > most, 0

    async def counted() -> Message:
        nonlocal came, too_large
        if not too_large:
            message = await receive()
            came += len(message.get("body", b""))
            too_large = came > most
            if not too_large:
                return message
        raise BodyTooLargeError

    return counted
