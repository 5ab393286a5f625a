"""The verb in a process of its own, over real connections."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

import contracap
from contracap.generation import Captioner, Greedy

from .memory import SETTLE_SECONDS, resident, send
from .pictures import COLOURS, picture, png

pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture(scope="module")
def weights(varied_weights: Path) -> Path:
    return varied_weights


@contextmanager
def serving(weights: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server, and its process."""
    command = [sys.executable, "-m", "contracap", "serve", str(weights), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().partition(" at ")[2].partition(" ")[0]
            while server.poll() is None:
                try:
                    httpx.get(f"{address}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield address, server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    with serving(weights, "--max-body-mib", "4", "--strategy", "greedy") as (address, _):
        yield address


def connected(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answered(connection: socket.socket) -> str:
    """All that comes until the server closes the connection or stops sending."""
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"}"):
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
    return received.decode()


def test_a_hundred_at_once_each_get_their_own_image_s_caption(address, weights):
    captioner = Captioner(*contracap.load(weights))
    alone = {colour: captioner([picture(colour)], Greedy())[0].text for colour in COLOURS}
    assert len(set(alone.values())) > 2, "the model should look at the images"
    colours = [COLOURS[number % len(COLOURS)] for number in range(100)]
    limits = httpx.Limits(max_connections=100)
    with ThreadPoolExecutor(100) as threads, httpx.Client(limits=limits, timeout=60) as client:
        asked = [threads.submit(client.post, f"{address}/v1/caption", content=picture(colour)) for colour in colours]
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 100
    assert [answer.json()["caption"] for answer in answers] == [alone[colour] for colour in colours]


@pytest.mark.parametrize("length", ["Content-Length: 209715200", "Transfer-Encoding: chunked"])
def test_a_body_of_200_mb_is_refused_before_it_has_come(address, length):
    with connected(address) as connection:
        connection.sendall(f"POST /v1/caption HTTP/1.1\r\nHost: server\r\n{length}\r\n\r\n".encode())
        piece = b"%x\r\n%b\r\n" % (MIB, bytes(MIB)) if "chunked" in length else bytes(MIB)
        sent = 0
        for _ in range(200):
            connection.setblocking(False)
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except BlockingIOError:
                pass
            connection.settimeout(20)
            connection.sendall(piece)
            sent += len(piece)
            time.sleep(0.02)
        connection.settimeout(20)
        assert " 413 " in answered(connection).splitlines()[0]
        assert sent < 40 * MIB


def test_a_length_that_lies_hurts_nobody_else(address):
    file = picture("red")
    for said in (len(file) - 20, len(file) + 20):
        with connected(address) as connection:
            connection.sendall(
                f"POST /v1/caption HTTP/1.1\r\nHost: server\r\nContent-Length: {said}\r\n\r\n".encode() + file
            )
            if said < len(file):
                assert " 400 " in answered(connection).splitlines()[0]
    assert httpx.post(f"{address}/v1/caption", content=file).status_code == 200


def wait_for(address: str, *lines: str) -> None:
    end = time.monotonic() + 20
    while not all(line in (text := httpx.get(f"{address}/metrics").text) for line in lines):
        assert time.monotonic() < end, text
        time.sleep(0.05)


def test_memory_does_not_grow_with_the_shapes_that_requests_have(weights):
    with serving(weights) as (address, server):
        one = {"url": "/v1/caption?width=8", "content": picture("red")}
        send(address, [one, {"url": "/v1/embed/text", "json": {"texts": ["a"]}}], at_once=1)
        before = resident(server.pid)
        texts = ({"url": "/v1/embed/text", "json": {"texts": ["a" * number] * number}} for number in range(1, 100, 2))
        captions = ({"url": f"/v1/caption?width={width}", "content": picture("red")} for width in range(1, 17, 2))
        assert set(send(address, [*texts, *captions], at_once=1)) == {200}
        time.sleep(SETTLE_SECONDS)
        assert resident(server.pid) < 1.12 * before


def test_a_stalled_upload_is_told_so_and_a_signal_ends_the_server_in_the_stated_time_whatever_goes_on(weights):
    """Heavy strategies, large images, half heads and half bodies are under way."""
    half = b"POST /v1/caption HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc"
    with ThreadPoolExecutor(8) as clients, ExitStack() as stack, serving(weights, "--timeout-s", "3") as running:
        address, server = running
        with connected(address) as connection:
            connection.sendall(half)
            answer = answered(connection)
            assert " 408 " in answer.splitlines()[0] and "3 seconds" in answer
            assert connection.recv(10) == b""
        large, heavy = png(9400, rows=bytes(9400 * 1176)), "width=32&min_tokens=15"
        for number in range(8):
            query, file = ("", large) if number % 2 else (heavy, picture("red"))
            clients.submit(httpx.post, f"{address}/v1/caption?{query}", content=file, timeout=60)
        for head in (b"GET / HT", half):
            stack.enter_context(connected(address)).sendall(head)
        wait_for(address, "contracap_requests_under_way 9")
        server.send_signal(signal.SIGTERM)
        assert server.wait(3 + 3) == 0


def test_a_request_under_way_is_answered_after_ctrl_c(weights):
    with serving(weights, "--max-wait-ms", "2000") as (address, server), ThreadPoolExecutor(1) as clients:
        answer = clients.submit(httpx.post, f"{address}/v1/caption", content=picture("red"), timeout=60)
        wait_for(address, "contracap_queue_length 1")
        server.send_signal(signal.SIGINT)
        assert answer.result().status_code == 200
        assert server.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        assert server.stderr is not None
        log = server.stderr.read()
        assert "Traceback" not in log and "error" not in log.lower(), log
