"""What the servers share: addresses, and bodies counted as they come."""

import asyncio
import socket
from typing import Any

import pytest

from contracap.web import BodyTooLargeError, EndQuietly, bound, limited, url


def test_clients_are_refused_until_the_server_listens() -> None:
    with bound("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())
        listener.listen()
        socket.create_connection(listener.getsockname()).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_address_of_ipv6_stands_in_brackets() -> None:
    try:
        listener = bound("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        assert url(listener) == f"http://[::1]:{listener.getsockname()[1]}"


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_address_that_cannot_be_had_is_named(host: str) -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cannot listen at {host}:{port}: .*; give another --host or --port$"):
            bound(host, port)


@pytest.mark.parametrize(
    ("pieces", "said", "taken"),
    [([4, 6], None, 2), ([4, 7], None, 1), ([4], b"11", 0), ([10], b"10", 1), ([11], b"3", 0), ([10], b"many", 1)],
)
def test_a_body_is_taken_up_to_the_limit_whatever_length_it_says(pieces, said, taken) -> None:
    messages = iter([{"type": "http.request", "body": bytes(size), "more_body": True} for size in pieces])

    async def receive() -> Any:
        return next(messages)

    async def read() -> int:
        counted = limited({"headers": [(b"content-length", said)] if said else []}, receive, 10)
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
