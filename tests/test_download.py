import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from contracap import download as module
from contracap.download import DownloadError, download

CONTENT = bytes(range(256)) * 500
FAILURES = {"/once-503": [503], "/twice-503": [503, 429], "/always-503": [503] * 9, "/404": [404] * 9}
ASKED = Counter[str]()


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ASKED[self.path] += 1
        failures = FAILURES.get(self.path, [])
        attempt = ASKED[self.path]
        if attempt <= len(failures):
            self.send_error(failures[attempt - 1])
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
        elif self.path == "/silent":
            time.sleep(0.4)
        else:
            cut = self.path == "/always-cut" or (self.path == "/once-cut" and attempt == 1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000] if cut else CONTENT)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(module, "SILENCE", 0.1)
    ASKED.clear()


@pytest.mark.parametrize(
    ("path", "attempts"), [("/good", 1), ("/once-503", 2), ("/twice-503", 3), ("/once-cut", 2), ("/a%20b", 1)]
)
def test_whole_content_comes_after_passing_failures(address: str, path: str, attempts: int) -> None:
    assert download(address + path) == CONTENT
    assert ASKED[path] == attempts


def test_redirection_is_followed_and_odd_letters_are_encoded(address: str) -> None:
    assert download(f"{address}/moved") == CONTENT
    assert download(f"{address}/a é%20b") == CONTENT
    assert ASKED == {"/moved": 1, "/good": 1, "/a%20%C3%A9%20b": 1}


@pytest.mark.parametrize(
    ("path", "kind", "attempts", "reason"),
    [
        ("/404", "http_404", 1, "HTTP status 404"),
        ("/always-503", "http_503", 3, "HTTP status 503"),
        ("/always-cut", "no_answer", 3, "cut off after 1000 of 128000 bytes"),
        ("/silent", "no_answer", 3, "timed out"),
    ],
)
def test_lasting_failure_is_reported_by_kind(address: str, path: str, kind: str, attempts: int, reason: str) -> None:
    with pytest.raises(DownloadError, match=reason) as error:
        download(address + path)
    assert error.value.kind == kind
    assert str(error.value).startswith(address + path)
    assert ASKED[path] == attempts


def test_nobody_at_the_address_is_no_answer(address: str) -> None:
    with pytest.raises(DownloadError, match="refused") as error:
        download("http://127.0.0.1:1/a.jpg")
    assert error.value.kind == "no_answer"


def test_answers_that_are_too_large_or_too_slow_are_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(DownloadError, match="larger than 1000 bytes") as error:
        download(f"{address}/good")
    assert (error.value.kind, ASKED["/good"]) == ("too_large", 1)
    monkeypatch.setattr(module, "LARGEST", 2**30)
    monkeypatch.setattr(module, "LONGEST", -1.0)
    with pytest.raises(DownloadError, match=r"not complete after|timed out"):
        download(f"{address}/good")


def test_the_time_limit_is_that_of_all_attempts(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01, 9.0))
    monkeypatch.setattr(module, "LONGEST", 0.3)
    with pytest.raises(DownloadError, match="timed out"):
        download(f"{address}/silent")
    assert ASKED["/silent"] == 2


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://x.org/a.jpg", "/a.jpg", "http://x.org:port/a.jpg"])
def test_what_is_no_web_address_is_never_opened(url: str) -> None:
    with pytest.raises(DownloadError) as error:
        download(url)
    assert error.value.kind == "bad_url"
