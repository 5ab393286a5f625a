"""The page in a real Chromium."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import contracap
from contracap.generation import BeamSearch, Captioner
from tests.apps.demo.conftest import SECONDS, Server
from tests.apps.demo.uploads import bad_uploads, huge_file, picture

if os.environ.get("CI"):  # there both must be installed
    import playwright.sync_api as playwright
else:
    for module, package in (("gradio", "'contracap[demo]'"), ("playwright", "playwright")):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install {package}", exc_type=ImportError)
    playwright = pytest.importorskip("playwright.sync_api")

MILLISECONDS = 60_000  # for a page to answer, on a busy machine
WIDE = {"width": 1200, "height": 900}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on the path: apt-get install chromium")
    playwright.expect.set_options(timeout=MILLISECONDS)
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[Server], Any]]:
    """Opens the page of a server. At the end nothing but that server was asked, and nobody saw a traceback."""
    visits = []

    def opened(server: Server) -> Any:
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(MILLISECONDS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        visits.append((server, page, asked))
        page.goto(server.url)
        return page

    yield opened
    for server, page, asked in visits:
        outside = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
        assert asked and not outside, f"the page asked for {outside}"
        assert "Traceback" not in page.content()
        assert "Traceback" not in server.text(), server.text()
        page.close()


def upload(page: Any, file: Path) -> None:
    """Choose a file in the image input of the tab that was opened last."""
    page.locator("input[type=file][accept*=image]:not([multiple])").last.set_input_files(file)


def told(page: Any, text: str) -> None:
    """The page says this in a message, which is then closed."""
    message = page.locator(".toast-body", has_text=text).first
    message.wait_for()
    assert "Traceback" not in message.inner_text()
    for close in page.locator(".toast-close").all():
        close.click()


def caption_of(page: Any) -> str:
    """The caption, once there is one."""
    box = page.locator("#caption textarea")
    playwright.expect(box).not_to_have_value("")
    return box.input_value()


def rows(page: Any) -> Any:
    return page.locator(".wide tr:has(td)")


def test_an_uploaded_image_gets_a_caption_alternatives_and_a_map_for_each_word(visit, server, tmp_path) -> None:
    page = visit(server)
    upload(page, picture(tmp_path / "a.png"))
    words = caption_of(page).split()
    assert rows(page).count() == 6 and " ".join(words) in rows(page).first.inner_text()
    maps = page.locator("#maps .thumbnail-item img")
    playwright.expect(maps).to_have_count(len(words))
    assert all(image.evaluate("image => image.naturalWidth") == 384 for image in maps.all())
    page.get_by_role("radio").nth(1).click()
    shown = page.locator("#maps .preview")
    shown.wait_for()
    assert shown.locator(".caption").inner_text() == words[1]
    shown.get_by_label("Close").click()
    shown.wait_for(state="detached")


def test_strategy_and_settings_change_the_caption(visit, server, tmp_path) -> None:
    page = visit(server)
    upload(page, picture(tmp_path / "a.png"))
    longer = caption_of(page)
    page.get_by_label("Strategy").click()
    page.get_by_role("option", name="Greedy").click()
    playwright.expect(page.get_by_label("number input for Beams")).to_be_hidden()
    page.get_by_label("number input for Most tokens").fill("8")
    page.get_by_label("number input for Most tokens").press("Tab")
    page.get_by_role("button", name="Caption").click()
    playwright.expect(rows(page)).to_have_count(1)
    assert len(caption_of(page)) < len(longer)


def test_typed_labels_are_ranked(visit, server, tmp_path) -> None:
    page = visit(server)
    page.get_by_role("tab", name="Classify").click()
    page.get_by_label("Labels").fill("a cat\na dog")
    upload(page, picture(tmp_path / "a.png"))
    shares = page.locator(".confidence-set")
    playwright.expect(shares).to_have_count(2)
    found = [int(share) for share in re.findall(r"(\d+)%", " ".join(shares.all_inner_texts()))]
    assert sum(found) in (99, 100, 101) and found == sorted(found, reverse=True)
    page.get_by_label("Prompt").fill("no place")
    page.get_by_role("button", name="Classify").click()
    told(page, "has no {}")


def test_a_folder_is_searched_by_text_and_by_image(visit, server, tmp_path) -> None:
    page = visit(server)
    page.get_by_role("tab", name="Search").click()
    page.get_by_role("button", name="Search by text").click()
    told(page, "there is nothing to search for")
    page.get_by_label("Text", exact=True).fill("a red circle")
    page.get_by_role("button", name="Search by text").click()
    playwright.expect(page.locator("#found .thumbnail-item")).to_have_count(12)
    page.get_by_text("12 images to search; 1 skipped, for they cannot be read.").wait_for()
    upload(page, picture(tmp_path / "mine.png", seed=7))
    playwright.expect(page.locator("#found .thumbnail-item").first).to_contain_text("1.000 07.png")


def test_an_example_is_captioned_and_classified_as_an_upload_is(visit, server) -> None:
    page = visit(server)
    page.locator(".examples img:visible").first.click()
    assert caption_of(page)
    page.get_by_role("tab", name="Classify").click()
    page.locator(".examples img:visible").first.click()
    playwright.expect(page.locator(".confidence-set")).to_have_count(10)


def test_uploaded_images_are_searched_where_there_is_no_folder(visit, uploading, tmp_path) -> None:
    page = visit(uploading)
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Text", exact=True).fill("a red circle")
    page.get_by_role("button", name="Search by text").click()
    told(page, "upload some images")
    (tmp_path / "broken.png").write_text("no image")
    files = [picture(tmp_path / f"{number}.png", seed=number) for number in range(3)]
    page.locator("input[type=file][multiple]").set_input_files([*files, tmp_path / "broken.png"])
    page.get_by_text("3 images to search; 1 skipped, for they cannot be read.").wait_for()
    upload(page, files[1])
    playwright.expect(page.locator("#found .thumbnail-item")).to_have_count(3)
    playwright.expect(page.locator("#found .thumbnail-item").first).to_contain_text("1.000 1.png")


def test_too_many_images_to_search_and_images_too_large_together_are_refused(visit, uploading, tmp_path) -> None:
    page = visit(uploading)
    page.get_by_role("tab", name="Search").click()
    pictures = page.locator("input[type=file][multiple]")
    pictures.set_input_files([huge_file(tmp_path / f"{number}.jpg", 19) for number in range(6)])
    told(page, "100 MiB")
    pictures = page.locator("input[type=file][multiple]")
    small = picture(tmp_path / "small.png").read_bytes()
    many = [{"name": f"{number}.png", "mimeType": "image/png", "buffer": small} for number in range(201)]
    pictures.set_input_files(many)
    told(page, "these are 201 images; the page searches at most 200")


def test_the_camera_gives_a_image(visit, server) -> None:
    page = visit(server)
    page.get_by_label("Capture from camera").first.click()
    page.get_by_text("Click to Access Webcam").first.click()
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")  # nothing is taken before
    page.get_by_label("capture photo").first.click()
    assert caption_of(page)


@pytest.mark.parametrize("name", ["truncated.jpg", "bomb.png"])
def test_a_bad_file_is_named_and_the_page_goes_on(visit, server, tmp_path, name) -> None:
    page = visit(server)
    file, said = bad_uploads(tmp_path)[name]
    upload(page, file)
    told(page, said)
    assert str(tmp_path) not in page.content() and "/tmp/" not in page.locator("body").inner_text()
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.wait_for_timeout(2000)  # the page empties its boxes; a caption that is faster would be emptied too
    upload(page, picture(tmp_path / "good.png"))
    assert caption_of(page)


def test_a_huge_file_is_refused_and_the_page_goes_on(visit, server, tmp_path) -> None:
    page = visit(server)
    upload(page, huge_file(tmp_path / "huge.jpg", 21))
    told(page, "maximum")
    upload(page, picture(tmp_path / "good.png"))
    assert caption_of(page)


def test_captions_asked_at_once_are_the_captioners(server, weights, tmp_path) -> None:
    from gradio_client import Client, handle_file

    files = [picture(tmp_path / f"{number}.png", seed=number) for number in range(10)]

    def answer(file: Path) -> str:
        client = Client(server.url, verbose=False, analytics_enabled=False, download_files=False)
        return client.predict(path=handle_file(file), api_name="/caption")[0]

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(answer, files))
    expected = [caption.text for caption in Captioner(*contracap.load(weights))(files, BeamSearch())]
    assert len(set(expected)) > 2, "the model should look at the images"
    assert together == expected
    assert "Traceback" not in server.text(), server.text()


def test_sigterm_ends_the_server_well_and_deletes_uploads_though_a_page_is_open(visit, start, tmp_path) -> None:
    """The page has told before, without a click, when all images could be searched."""
    first = picture(tmp_path / "000.png")
    for number in range(1, 400):
        (tmp_path / f"{number:03d}.png").hardlink_to(first)
    server = start("--pictures", str(tmp_path))
    page = visit(server)
    page.get_by_role("tab", name="Search").click()
    page.get_by_text("400 images to search.").wait_for()
    page = visit(server)
    upload(page, first)
    assert caption_of(page) and server.uploads()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS) == 0, server.text()
    assert not server.uploads() and "Traceback" not in server.text() and "ASGI" not in server.text(), server.text()


def test_a_port_in_use_is_told_in_one_line_before_the_page_starts(weights) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "contracap", "demo", str(weights), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr
