"""Files of captions as other tools write them."""

import json

import pytest

from contracap.cli import main
from contracap.evaluation.metrics.tokens import tokenize


def score(capsys, *words: object) -> tuple[int, str]:
    status = main(["score", *map(str, words), "--tokenizer", "python"])
    return status, capsys.readouterr().err


def test_cider_of_one_image_is_null_with_a_reason(trial, capsys, tmp_path) -> None:
    status, told = score(
        capsys, trial("scores") / "one.json", "--json", tmp_path / "out.json", "--metrics", "CIDEr", "bleu"
    )
    assert status == 0
    assert "CIDEr left out" in told
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["figures"]["CIDEr"] is None
    assert "at least 2" in result["reasons"]["CIDEr"]
    assert result["figures"]["Bleu_1"] is not None


@pytest.mark.parametrize("name", ["padded", "blip", "float"])
def test_an_unknown_id_is_told_beside_one_that_is_known(trial, capsys, name: str) -> None:
    folder = trial("scores")
    references = ("--references", folder / "annotations.json", "--metrics", "bleu")
    status, told = score(capsys, folder / f"results-{name}.json", *references)
    assert status == 1
    assert "not among the references" in told
    assert "24019" in told.partition("one of theirs is")[2]
    assert score(capsys, folder / "results.json", *references)[0] == 0


def test_signs_beyond_english_stay_in_their_words() -> None:
    assert tokenize(["नमस्ते दुनिया", "5 o’clock", "m²", "a\u200bb"], "python") == [  # noqa: RUF001
        *("नमस्ते दुनिया", "5 o’clock", "m ²", "a b")  # noqa: RUF001
    ]
