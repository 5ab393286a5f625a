"""What the server of the page refuses, asked by programs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracap.apps.demo.uploads import MAX_UPLOAD_MIB
from contracap.apps.web import MIB
from tests.apps.demo.conftest import SECONDS, Server
from tests.apps.demo.uploads import picture

pytestmark = pytest.mark.slow


def asked(server: Server, method: str, path: str, **request: Any) -> httpx.Response:
    """The answer, for which the server has no traceback in its log."""
    answer = httpx.request(method, f"{server.url}/gradio_api/{path}", timeout=SECONDS, **request)
    assert "Traceback" not in answer.text + server.text(), server.text()
    return answer


def test_a_file_is_uploaded(server, tmp_path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    answer = asked(server, "POST", "upload", files={"files": ("a.png", content)})
    (path,) = answer.json()
    assert Path(path).read_bytes() == content and Path(path) in server.uploads()


@pytest.mark.parametrize("query", ["", "?upload_id=q"])
@pytest.mark.parametrize("head", [b'name="files"', b'name="x"; file="a.png"'])
def test_a_field_that_is_no_file_is_refused_in_one_line(server, query, head) -> None:
    form = b"--x\r\nContent-Disposition: form-data; %b\r\n\r\n" % head
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = asked(server, "POST", f"upload{query}", content=form + b"text\r\n--x--\r\n", headers=headers)
    assert (answer.status_code, answer.text) == (400, "only files can be uploaded, in a form's field `files`")


@pytest.mark.parametrize("form", [b"no form at all", b"--x\r\nno header\r\n\r\n", b""])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "text/plain"])
def test_a_broken_form_is_refused(server, form, kind) -> None:
    answer = asked(server, "POST", "upload", content=form, headers={"Content-Type": kind})
    assert answer.status_code in (400, 413) or answer.json() == []


def test_files_that_are_too_large_together_are_refused_and_nothing_of_them_stays(server) -> None:
    before = server.uploads()
    file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.png"\r\n\r\n'

    def form() -> Iterator[bytes]:
        for number in range(MAX_UPLOAD_MIB // 10 + 1):
            yield file % number
            for _ in range(10):
                yield bytes(MIB)
            yield b"\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = asked(server, "POST", "upload", content=form(), headers=headers)
    assert (answer.status_code, "100 MiB" in answer.text, "\n" in answer.text) == (413, True, False)
    assert server.uploads() == before


@pytest.mark.parametrize("path", ["call/caption", "queue/join", "run/caption"])
@pytest.mark.parametrize("told", [True, False])
def test_a_large_question_is_refused_whether_or_not_its_length_is_told(server, path, told) -> None:
    content = bytes(2 * MIB) if told else iter([b'{"data": ["', bytes(2 * MIB)])
    answer = asked(server, "POST", path, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "\n" in answer.text) == (413, False)


@pytest.mark.parametrize("path", ["file=https://", "file=http://", "file/http://", "proxy=https://", "file=%68ttp://"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_other_server_is_asked(server, monkeypatch, path, method) -> None:
    answer = asked(server, method, f"{path}contracap.invalid/a.png")
    assert answer.status_code == 403 and (method == "HEAD" or "\n" not in answer.text)


def test_a_name_that_the_page_does_not_publish_is_refused(server) -> None:
    answer = asked(server, "POST", "call/v2/nothing", json={})
    assert answer.status_code == 403 and "\n" not in answer.text


def test_only_what_visitors_do_has_a_published_name(server) -> None:
    published = asked(server, "GET", "info").json()["named_endpoints"]
    assert sorted(published) == ["/caption", "/classify", "/search_picture", "/search_text"]
