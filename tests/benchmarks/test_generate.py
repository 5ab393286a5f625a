import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType

import pytest

from benchmarks import captioners, generate
from benchmarks.captioners import random_captioner, require_equal_beams, require_equal_greedy
from benchmarks.generate import BEAM, GREEDY, LEGACY, caption_row, folder_row
from benchmarks.harness import Run, UnequalError
from benchmarks.open_clip_captions import PACKAGES, OpenClipCaptions

IMAGES, TOKENS = 6, 9


@pytest.fixture(autouse=True, scope="module")
def short_captions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioners, "MAX_TOKENS", TOKENS)
        for name, strategy in {"BEAM": BEAM, "LEGACY": LEGACY, "GREEDY": GREEDY}.items():
            patch.setattr(generate, name, replace(strategy, max_tokens=TOKENS, min_tokens=TOKENS - 1))
        yield


@pytest.fixture(scope="module")
def peer(short_captions: None, open_clip: ModuleType) -> Iterator[OpenClipCaptions]:
    """open_clip's captioner with the weights of our random one."""
    if not PACKAGES.is_dir():
        pytest.skip(f"no transformers 4.49 at {PACKAGES}: make setup")
    with ExitStack() as stack:
        yield captioners.open_clip_captions(*random_captioner("tiny", Run(), images=IMAGES), stack)


@pytest.mark.slow
def test_equal_captions_are_timed_and_others_are_not(
    peer: OpenClipCaptions, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_clip_captions", lambda captioner, pixels, stack: peer)
    for ours, way in ((generate.BEAM, "groups"), (generate.GREEDY, "top_k")):
        row = caption_row(run, size="tiny", name="x", images=IMAGES, ours=ours, peer=way)
        assert row.ratio and "transformers 4.49.0" in row.note and f"both write {TOKENS - 1} tokens" in row.note
    other, pixels = random_captioner("tiny", Run(seed=1), images=IMAGES)
    for require_equal in (require_equal_beams, require_equal_greedy):
        with pytest.raises(UnequalError, match="image 0"):
            require_equal(other, pixels, peer)
    assert "transformers" not in sys.modules


def test_folder_with_the_captions_of_its_tensors_is_timed_and_others_are_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SMALL", "tiny")
    monkeypatch.setattr(generate, "IMAGES", 2)
    assert folder_row(run).ratio
    monkeypatch.setattr(generate, "one_line", lambda text: "a dog")
    with pytest.raises(UnequalError, match=r"0000\.txt holds"):
        folder_row(run)
