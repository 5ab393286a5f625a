"""`contracap ask`: answers with their probabilities."""

import math
from pathlib import Path

import pytest
import torch

from contracap.evaluation.vqa import calibration_error
from contracap.pretrained import load
from tests.conftest import Run
from tests.evaluation.worlds import COLOURS, picture


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture(COLOURS["red"]))
    return path


def log_probability(weights: Path, image: Path, prompt: str, answer: str) -> float:
    """That of an answer and the end token after the prompt, from one pass over the whole text."""
    model, processor = load(weights)
    start, tokenizer = processor.tokenizer.start, processor.tokenizer
    first, last = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = torch.tensor([[start, *first, *last, tokenizer.end]])
    with torch.inference_mode():
        scores = model(processor.images([image]), ids).logits[0].double().log_softmax(dim=-1)
    rows = range(len(first), len(first) + len(last) + 1)
    return sum(scores[row, ids[0, row + 1]].item() for row in rows)


def test_probabilities_are_those_of_a_full_pass(run: Run, varied_weights: Path, image: Path) -> None:
    status, out, _ = run(
        "ask", varied_weights, image, "so?", "why?", "--prompt", "{} a:", "--answers", "red", "no star"
    )
    assert status == 0
    for line, question in zip(out.splitlines(), ("so?", "why?"), strict=True):
        scores = {
            answer: math.exp(log_probability(varied_weights, image, f"{question} a:", answer))
            for answer in ("red", "no star")
        }
        answer, probability = line.split("\t")
        assert answer == max(scores, key=scores.__getitem__)
        assert float(probability) == pytest.approx(scores[answer] / sum(scores.values()), abs=1e-3)

    status, out, _ = run("ask", varied_weights, image, "so?", "--prompt", "{} a:")
    answer, probability = out.rstrip("\n").split("\t")
    assert status == 0 and 0 <= float(probability) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{image}", " "], "none of them empty"),
        (["{image}", "so?", "--prompt", "no place"], "has no {} for the question"),
        (["{image}", "so?", "--answers", "a", "a"], "named twice"),
        (["nowhere.png", "so?"], "nowhere.png"),
        (["{image}", "word " * 40], "leaves no room for an answer"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Run, weights: Path, image: Path, arguments: list[str], message: str
) -> None:
    given = [str(image) if argument == "{image}" else argument for argument in arguments]
    status, out, error = run("ask", weights, *given)
    assert status == 1 and message in error and error.count("\n") == 1 and not out


def test_calibration_error_is_the_mean_gap_between_probability_and_accuracy() -> None:
    assert calibration_error([1.0, 0.0], [1.0, 0.0]) == 0
    assert calibration_error([0.9, 0.9, 0.9, 0.9], [1.0, 1.0, 1.0, 0.0]) == pytest.approx(0.15)
    assert calibration_error([0.95, 0.95, 0.05, 0.05], [0.0, 0.0, 1.0, 1.0], bins=10) == pytest.approx(0.95)
    assert calibration_error([0.41, 0.49], [1.0, 0.0], bins=10) == pytest.approx(
        0.05
    )  # one bin, whose means are compared
