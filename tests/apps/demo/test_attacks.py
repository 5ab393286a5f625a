"""What a visitor may not get out of the page, whatever is sent in place of a value."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracap.apps.demo.uploads import Uploads
from tests.apps.demo.conftest import SECONDS, Server
from tests.apps.demo.uploads import picture

pytestmark = pytest.mark.slow
SECRET = b"root:x:0:0: known to nobody else"
JSON = {"Content-Type": "application/json"}
FILE = {"meta": {"_type": "gradio.FileData"}}


@dataclass(frozen=True)
class Bait:
    """Things that the page is asked to take for files, and whether it did."""

    secret: Path
    pipe: Path
    listener: socket.socket

    def payloads(self) -> dict[str, Any]:
        secret, host = str(self.secret), f"127.0.0.1:{self.listener.getsockname()[1]}"
        file = FILE | {"path": secret}
        return {
            "path": file,
            "stream": file | {"is_stream": True},
            "scheme": FILE | {"path": f"file://{secret}"},
            "pipe": FILE | {"path": str(self.pipe)},
            "device": FILE | {"path": "/dev/zero"},
            "process": FILE | {"path": "/proc/self/environ"},
            "address": FILE | {"path": f"http://{host}/a.png"},
            "two addresses": FILE | {"path": "a.png", "url": f"http://{host}/a.png"},
            "public address": FILE | {"path": "https://contracap.invalid/a.png"},
            "in a list": [file],
            "in lists": [[[file]], {"a": [file]}],
            "in a dict": {"value": file, "choices": [[file, file]]},
            "update": {"__type__": "update", "value": file, "label": file},
            "no text": FILE | {"path": [secret], "url": {"path": secret}},
        }

    def taken(self, server: Server) -> list[Path]:
        """Files of the server that hold the secret. Nobody waits at the pipe, nor called the listener."""
        with pytest.raises(OSError, match="No such device"):
            os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)  # it has no reader
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        return [path for path in server.uploads() if SECRET in path.read_bytes()]


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bait]:
    folder = tmp_path_factory.mktemp("bait")
    (folder / "secret.png").write_bytes(SECRET)
    os.mkfifo(folder / "pipe.png")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield Bait(folder / "secret.png", folder / "pipe.png", listener)


@pytest.fixture
def client(uploading: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{uploading.url}/gradio_api/", timeout=SECONDS) as client:
        yield client


def uploaded(client: httpx.Client, content: bytes, name: str = "a.png") -> str:
    return client.post("upload", files={"files": (name, content)}).json()[0]


def events(server: Server) -> list[tuple[int, str, list[dict[str, Any]]]]:
    """All that the page can be asked for, private events included: number, name, the components of its inputs."""
    config = httpx.get(f"{server.url}/config", timeout=SECONDS).json()
    components = {component["id"]: component for component in config["components"]}
    return [
        (event["id"], event["api_name"], [components[number] for number in event["inputs"]])
        for event in config["dependencies"]
    ]


def honest(component: dict[str, Any], path: str) -> Any:
    file = FILE | {"path": path}
    return {"image": file, "file": [file], "state": None}.get(component["type"], component["props"].get("value"))


def test_no_input_of_any_event_takes_a_file_that_was_not_uploaded(uploading, client, bait, tmp_path) -> None:
    path = uploaded(client, picture(tmp_path / "a.png").read_bytes())
    payloads, tried = bait.payloads(), set()
    for number, _, components in events(uploading):
        for place, component in enumerate(components):
            # Every kind of value for every kind of input, and one of them for each further one.
            new = component["type"] not in tried
            tried.add(component["type"])
            names = list(payloads) if new else [list(payloads)[place % len(payloads)]]
            for name in names:
                data = [honest(component, path) for component in components]
                data[place] = payloads[name]
                if component["type"] == "state" and not new:
                    continue
                question = {"fn_index": number, "data": data, "session_hash": "attack"}
                answer = client.post("run/predict", content=json.dumps(question), headers=JSON)
                if component["type"] != "state":  # what is sent for it is not looked at
                    assert answer.status_code >= 400 or "error" in answer.json(), (component, name, answer.text)
                assert SECRET not in answer.content
    assert tried >= {"image", "file", "dropdown", "radio", "slider", "textbox", "state"}
    assert not bait.taken(uploading)
    assert "Traceback" not in uploading.text(), uploading.text()


@pytest.mark.parametrize("route", ["queue/join", "call/caption", "call/v2/caption"])
@pytest.mark.parametrize("place", [0, 1], ids=["picture", "strategy"])
def test_no_route_takes_a_file_that_was_not_uploaded(uploading, client, bait, tmp_path, route, place) -> None:
    good = FILE | {"path": uploaded(client, picture(tmp_path / "a.png").read_bytes())}
    (number, components), *_ = [(number, parts) for number, name, parts in events(uploading) if name == "caption"]
    for name, payload in bait.payloads().items():
        values = [good, "greedy", *(component["props"].get("value") for component in components[2:])]
        values[place] = payload
        session = f"{route}-{place}-{name}"
        question: dict[str, Any] = {"data": values, "fn_index": number, "session_hash": session}
        if route == "call/v2/caption":
            question = {"path": values[0], "name": values[1]}
        answer = client.post(route, content=json.dumps(question), headers=JSON)
        if answer.status_code < 400:
            event = answer.json()["event_id"]
            path = f"queue/data?session_hash={session}" if route == "queue/join" else f"call/caption/{event}"
            with client.stream("GET", path) as lines:
                told = next(line for line in lines.iter_lines() if "process_completed" in line or "event: " in line)
            assert '"success":false' in told or told == "event: error", (name, told)
    assert not bait.taken(uploading)
    assert "Traceback" not in uploading.text(), uploading.text()


@pytest.mark.parametrize(
    "way", ["file=", "file=/", "file/", "proxy=", "file=file://", "file=%2e%2e/", "static/../../.."]
)
def test_no_address_gives_a_file_of_the_server(uploading, client, bait, way) -> None:
    for path in (
        f"{bait.secret}",
        f"{bait.secret}"[1:],
        "/etc/passwd",
        "/dev/zero",
        f"{bait.pipe}",
        f"{uploading.log}",
    ):
        answer = client.get(way + path, timeout=10)
        assert answer.status_code >= 400 and SECRET not in answer.content, (way, path)
    inside = uploaded(client, SECRET[::-1])
    answer = client.get(f"file={inside}/../../../../../{bait.secret}")
    assert answer.status_code >= 400 and not bait.taken(uploading)


def test_an_upload_is_found_by_those_who_know_its_path_and_is_not_run_by_a_browser(client) -> None:
    first, second = (uploaded(client, b"<script>", "../../a.html") for _ in range(2))
    assert first != second and Path(first).name == "a.html"
    answer = client.get(f"file={first}")
    assert answer.content == b"<script>" and answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "component_server"),
        ("POST", "process_recording"),
        ("POST", "vibe-edit"),
        ("POST", "stream/a"),
        ("GET", "deep_link?session_hash=attack"),
        ("GET", "runs"),
        ("GET", "custom_component/a/client/component/index.js"),
        ("DELETE", "upload"),
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(client, method, path) -> None:
    assert client.request(method, path, json={}).status_code == 403


def test_an_honest_visitor_is_answered_and_sigterm_ends_the_server_during_an_attack(start, bait, tmp_path) -> None:
    server = start()
    with httpx.Client(base_url=f"{server.url}/gradio_api/", timeout=30) as client:
        for number, _, components in events(server):
            for place in range(len(components)):
                data: list[Any] = [None] * len(components)
                data[place] = FILE | {"path": str(bait.pipe)}
                question = {"fn_index": number, "data": data, "session_hash": f"{number}-{place}"}
                client.post("queue/join", content=json.dumps(question), headers=JSON)
        path = uploaded(client, picture(tmp_path / "a.png").read_bytes())
        classify = next(number for number, name, _ in events(server) if name == "classify")
        question = {"fn_index": classify, "data": [FILE | {"path": path}, "red\ngreen", "a {}"]}
        answer = client.post("run/predict", content=json.dumps(question), headers=JSON)
        assert {share["label"] for share in answer.json()["data"][0]["confidences"]} == {"red", "green"}, answer.text
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, server.text()


def test_the_folder_stays_within_its_bounds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("contracap.apps.demo.uploads.MAX_KEPT_MIB", 1)
    for age in range(5):
        path = tmp_path / str(age) / "a.png"
        path.parent.mkdir()
        path.write_bytes(bytes(300_000))
        os.utime(path, times=(0, time.time() - age))
    os.utime(tmp_path / "0" / "a.png", times=(0, time.time() - 2 * 3600))
    Uploads(tmp_path).tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
