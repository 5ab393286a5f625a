"""A web server: its address, running until a signal, and the size of bodies. Shared by `serve` and `demo`."""

import asyncio
import math
import signal
import socket
from functools import cache

import h11
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

try:
    import resource
except ImportError:  # Windows
    resource = None

MIB = 2**20
HEADER_SECONDS = 10  # to receive the request headers, and that a connection may stay idle
MAX_CONNECTIONS = 1000


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to this address. It does not listen yet: clients are refused until the model can answer.

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


def format_url(listener: socket.socket) -> str:
    """Return the address for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    return f"http://{_url_host(host)}:{port}"


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def run_server(
    app: ASGIApp,
    listener: socket.socket,
    *,
    greeting: str,
    patience: int,
    request_seconds: float = math.inf,
    log_level: str = "info",
) -> None:
    """Serve until SIGINT or SIGTERM, and return then: whoever called can clean up.

    Args:
        greeting: printed as soon as clients are let in.
        patience: seconds that requests in flight have to be answered once the signal has come.
        request_seconds: that a connection may take for one request, reading the answer included; it is closed then.
    """
    config = uvicorn.Config(
        EndQuietly(app),
        http=_Connection,
        ws="none",
        loop="asyncio",
        backlog=_connections()[1],
        log_level=log_level,
        timeout_graceful_shutdown=patience,
    )
    server = _Server(config, greeting, request_seconds)
    # Uvicorn raises the signal again after it has ended, for whoever listened before: that is made itself, not a
    # default that ends the process there and then.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@cache
def _connections() -> tuple[int, int]:
    """Connections at once, and how many are accepted in one go: fewer than there are file descriptors for, since
    asyncio logs a traceback for each that it cannot accept."""
    most, backlog = MAX_CONNECTIONS, 128
    if resource is not None and (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) != resource.RLIM_INFINITY:
        backlog = max(1, min(backlog, files // 8))
        most = max(1, min(most, files // 2 - backlog))
    return most, backlog


class _Connection(H11Protocol):
    """Uvicorn's connection, with limits on the time until the headers are complete and on the number of connections.

    Attributes:
        since: when it was made, or its last answer was sent, on the event loop's clock.
    """

    # Uvicorn's own do not suffice: timeout_keep_alive starts after an answer, so headers may take forever, and
    # limit_concurrency refuses newcomers while idle connections hold all places.

    aborted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        others = _open(self.server_state)
        if len(others) > _connections()[0]:  # whoever has waited longest without a request makes room
            idle = [other for other in others if other.is_idle] or [self]
            min(idle, key=lambda other: other.since).abort()

    def abort(self) -> None:
        """Close it at once, without sending the rest."""
        self.aborted = True
        self.transport.abort()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """True if it has not sent complete headers, and has read what it was answered."""
        return self.conn.their_state is h11.IDLE and not self.transport.get_write_buffer_size()


def _open(state: ServerState) -> list[_Connection]:
    """The connections that are not being closed for good."""
    made = [connection for connection in state.connections if isinstance(connection, _Connection)]
    return [connection for connection in made if not connection.aborted]


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, greeting: str, request_seconds: float):
        super().__init__(config)
        self._greeting, self._request_seconds = greeting, request_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(socket.SOMAXCONN)  # the system lets many wait, though few are accepted in one go
        print(self._greeting, flush=True)

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in _open(self.server_state):
            if now - connection.since > (HEADER_SECONDS if connection.is_idle else self._request_seconds):
                connection.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in _open(self.server_state):  # those that do not read what they were answered
            connection.abort()
        await asyncio.sleep(0)


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


def limit_body(scope: Scope, receive: Receive, most: int | float) -> Receive:
    """Return a `receive` that raises BodyTooLargeError after `most` bytes, or at once if the body's header says so.

    They are counted as they come, so a length that is missing or wrong changes nothing.
    """
    # Starlette's RequestBodyLimitMiddleware answers by itself, in a fixed text; here the answer names the limit.
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
