"""What the verb refuses to start with."""

import socket
import sys

import pytest

from contracap.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a verb that does not start."""
    assert main(["serve", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "bean"), "unknown strategy 'bean'"),
        (("--set", "widht=3"), "unknown key 'widht'"),
        (("--set", "width=33"), "32 allowed"),
        (("--max-batch", "0"), "max_batch"),
        (("--timeout-s", "0"), "timeout_s"),
        (("--max-requests", "100000"), "max_requests"),
        (("--api-key", "two\nlines"), "api_key"),
        (("--device", "nowhere", "--port", "0"), "nowhere"),
        (("--port", "65536"), "65536"),
        (("--host", "nowhere.invalid"), "cannot listen at nowhere.invalid"),
        (("--port", "0"), "no weights at 'none'"),
    ],
)
def test_a_wrong_option_gets_one_line_before_the_weights_are_read(capsys, arguments, words):
    assert words in refusal(capsys, "none", *arguments)


def test_an_empty_key_in_the_environment_gets_one_line(capsys, monkeypatch):
    monkeypatch.setenv("CONTRACAP_API_KEY", "")
    assert "api_key" in refusal(capsys, "none")


def test_an_address_that_others_reach_without_a_key_gets_a_warning(capsys, caplog):
    for options, warns in (
        ((), False),
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--api-key", "k"), False),
    ):
        caplog.clear()
        refusal(capsys, "none", "--port", "0", *options)
        assert ("no API key" in caplog.text) == warns, options


def test_a_port_in_use_gets_one_line(capsys, weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refusal(capsys, str(weights), "--port", port)
    assert f"127.0.0.1:{port}: Address already in use; give another" in line


def test_a_missing_package_gets_one_line_that_says_what_to_install(capsys, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "contracap.apps.serve.app", raising=False)
    line = refusal(capsys, str(weights))
    assert "fastapi" in line and "pip install 'contracap[serve]'" in line
