"""How far it is, where there is no terminal."""

import logging
import time

from contracap.progress import logging_on, progress_bar


def test_without_a_terminal_a_log_line_now_and_then_says_how_far_it_is(caplog, monkeypatch) -> None:
    monkeypatch.setattr("contracap.progress.PAUSE", 0.0)
    with progress_bar(total=1000, unit=" images", desc="drawing") as bar:
        bar.update(250)
    list(progress_bar([7], unit=" shards"))
    first, second = caplog.messages
    assert first.startswith("drawing: 250 of 1,000 images, ") and "images/s, 00:00 left" in first
    assert second.startswith("1 of 1 shards, ")
    caplog.clear()
    monkeypatch.setattr("contracap.progress.PAUSE", 1.0)
    with progress_bar(total=9, unit=" images") as bar, logging_on(bar):
        time.sleep(1.5)
    assert caplog.messages == ["0 of 9 images, 0.0 images/s"]
    caplog.clear()
    monkeypatch.setattr("contracap.progress.PAUSE", 30.0)
    with progress_bar(total=2, unit=" images") as bar:
        bar.update()
    assert not caplog.messages


def test_what_is_disabled_or_quiet_says_nothing(caplog, monkeypatch) -> None:
    monkeypatch.setattr("contracap.progress.PAUSE", 0.0)
    progress_bar(total=2, disable=True).update()
    progress_bar(total=2, log=False).update()
    with caplog.at_level(logging.ERROR, logger="contracap"):
        progress_bar(total=2).update()
    assert not caplog.messages
