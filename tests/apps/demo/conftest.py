"""`contracap demo` as a process of its own, with a tiny model."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.apps.demo.uploads import picture

SECONDS = 120  # for a server to start or to end, on a busy machine


@dataclass(frozen=True)
class Server:
    """A server and what it leaves behind: its log, and in the same folder its temporary files."""

    url: str
    log: Path
    process: subprocess.Popen

    def text(self) -> str:
        return self.log.read_text()

    def uploads(self) -> list[Path]:
        return sorted(path for path in self.log.parent.rglob("*") if path.is_file() and path != self.log)


@pytest.fixture(scope="package")
def weights(varied_weights: Path) -> Path:
    return varied_weights


@pytest.fixture(scope="package")
def start(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server with further arguments; all are ended with Ctrl-C, and must then end well."""
    if not os.environ.get("CI"):  # there it must be installed
        missing = "gradio is not installed: pip install 'contracap[demo]'"
        pytest.importorskip("gradio", reason=missing, exc_type=ImportError)
    servers = []

    def started(*arguments: str) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", "contracap", "demo", str(weights), "--port", str(port), *arguments]
        with log.open("w") as file:
            environment = {**os.environ, "TMPDIR": str(log.parent)}
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"http://127.0.0.1:{port}", log, process)
        servers.append(server)
        deadline = time.monotonic() + SECONDS
        while f"the page is at {server.url}" not in server.text():
            assert process.poll() is None and time.monotonic() < deadline, server.text()
            time.sleep(0.2)
        return server

    yield started
    for server in servers:
        server.process.send_signal(2)
    for server in servers:
        assert server.process.wait(SECONDS) == 0, server.text()
        assert "Traceback" not in server.text() and not server.uploads(), server.text()


@pytest.fixture(scope="package")
def server(start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server with 13 images to search, of which one is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        picture(folder / f"{number:02d}.png", seed=number)
    (folder / "broken.png").write_text("no image")
    return start("--pictures", str(folder))


@pytest.fixture(scope="package")
def uploading(start: Callable[..., Server]) -> Server:
    """A server to which images to search are uploaded: its page has all inputs there are."""
    return start()
