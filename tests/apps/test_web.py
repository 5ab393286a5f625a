"""What the servers share: addresses, and bodies counted as they come."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracap.apps.web import BodyTooLargeError, EndQuietly, bind, format_url, limit_body


def test_clients_are_refused_until_the_server_listens() -> None:
    with bind("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())
        listener.listen()
        socket.create_connection(listener.getsockname()).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_address_of_ipv6_stands_in_brackets() -> None:
    try:
        listener = bind("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        assert format_url(listener) == f"http://[::1]:{listener.getsockname()[1]}"


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_address_that_cannot_be_had_is_named(host: str) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cannot listen at {host}:{port}: .*; give another --host or --port$"):
            bind(host, port)


@pytest.mark.parametrize(
    ("pieces", "said", "taken"),
    [([4, 6], None, 2), ([4, 7], None, 1), ([4], b"11", 0), ([11], b"3", 0), ([10], b"many", 1)],
)
def test_a_body_is_taken_up_to_the_limit_whatever_length_it_says(pieces, said, taken) -> None:
    messages = iter([{"type": "http.request", "body": bytes(size), "more_body": True} for size in pieces])

    async def receive() -> Any:
        return next(messages)

    async def read() -> int:
        counted = limit_body({"headers": [(b"content-length", said)] if said else []}, receive, 10)
        for number in range(len(pieces)):
            try:
                await counted()
            except BodyTooLargeError:
                with pytest.raises(BodyTooLargeError):  # and from then on
                    await counted()
                return number
        return len(pieces)

    assert asyncio.run(read()) == taken


@pytest.mark.parametrize("already_sent", [0, 1, 2])
def test_an_answer_that_the_end_of_the_server_cuts_short_is_completed_once(already_sent: int) -> None:
    answer = [{"type": "http.response.start", "status": 200, "headers": []}, {"type": "http.response.body"}]
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in answer[:already_sent]:
            await send(message)
        await asyncio.sleep(60)

    async def write(message: Any) -> None:
        sent.append(message)

    async def cut_short() -> None:
        task = asyncio.ensure_future(EndQuietly(app)({"type": "http"}, asyncio.sleep, write))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cut_short())
    assert sent[0]["status"] == (200 if already_sent else 503) and not sent[-1].get("more_body", False)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


SECONDS = 20  # for what takes 1 or 2, on a busy machine
PROGRAM = """
import contracap.apps.web as web
web.HEADER_SECONDS = 0.5
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(10_000_000 if scope["path"] == "/large" else 9)})
with web.bind("127.0.0.1", 0) as listener:
    greeting = web.format_url(listener)
    web.run_server(app, listener, greeting=greeting, patience=1, request_seconds=1.5, log_level="warning")
"""


@contextmanager
def serving(files: int = 256) -> Iterator[tuple[tuple[str, int], subprocess.Popen[str]]]:
    """The address of a server that may open so many files, and its process."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); {PROGRAM.strip()}"
    command = [sys.executable, "-c", limited.replace("; import", "\nimport")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            host, _, port = server.stdout.readline().strip().removeprefix("http://").partition(":")
            yield (host, int(port)), server
        finally:
            server.kill()


def closed(connection: socket.socket) -> bool:
    connection.settimeout(0.001)
    try:
        while connection.recv(2**20):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def descriptors(server: subprocess.Popen[str]) -> int:
    """Open files of a process, connections included."""
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def test_a_head_that_does_not_end_is_closed_in_time_and_a_connection_in_use_is_not() -> None:
    with serving() as (address, _), ExitStack() as stack:
        half = [stack.enter_context(socket.create_connection(address)) for _ in range(40)]
        client = stack.enter_context(httpx.Client(base_url="http://{}:{}".format(*address)))
        for number, connection in enumerate(half):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: "[: 5 * number])
        end = time.monotonic() + SECONDS
        while half:
            assert time.monotonic() < end
            assert client.get("/").status_code == 200
            for connection in half[::2]:  # however slowly they go on
                with suppress(ConnectionError):
                    connection.send(b"a")
            half = [connection for connection in half if not closed(connection)]
        assert client.get("/").status_code == 200


def test_more_connections_than_descriptors_make_room_and_leave_the_log_short() -> None:
    with serving(files=64) as (address, server), ExitStack() as stack:
        for number in range(300):
            stack.enter_context(socket.create_connection(address)).sendall(b"GET /")
            if number % 50 == 0:
                assert httpx.get("http://{}:{}".format(*address)).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS) == 0
        assert server.stderr is not None
        assert len(server.stderr.read()) < 10_000


def test_clients_that_read_no_answers_are_closed_in_time_and_do_not_hold_up_the_end() -> None:
    with serving() as (address, server), ExitStack() as stack:
        before = descriptors(server)
        for count in (3, 1):
            for _ in range(count):
                client = stack.enter_context(socket.create_connection(address))
                client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
                assert client.recv(1)
            end = time.monotonic() + SECONDS
            while count == 3 and descriptors(server) > before:
                assert time.monotonic() < end
                time.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS) == 0
