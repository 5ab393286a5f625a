"""Data sets for evaluation as other tools lay them out."""

import json
from pathlib import Path

import pytest

from contracap.cli import main


def evaluate(weights: Path, task: str, data: object, out: Path, *words: object) -> dict:
    call = ["evaluate", weights, "--task", task, "--data", *(data if isinstance(data, list) else [data])]
    assert main([*map(str, call), *map(str, words), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_names_and_templates_of_clip_benchmark_are_read_a_line_each(trial, weights: Path, tmp_path) -> None:
    folder = trial("wds")
    lines = ("--classes", folder / "classnames.txt", "--templates", folder / "zeroshot_classification_templates.txt")
    found = evaluate(weights, "zeroshot", folder / "test", tmp_path / "lines.json", *lines)
    assert (found["classes"], found["templates"], found["samples"]) == (6, 2, 6)
    (tmp_path / "same.json").write_text('["a photo of a {}.", "there is a {}."]')
    same = ("--classes", folder / "classes.json", "--templates", tmp_path / "same.json")
    expected = evaluate(weights, "zeroshot", folder / "test", tmp_path / "json.json", *same)
    assert found["figures"] == expected["figures"]
    one, *others = (
        evaluate(weights, "zeroshot", folder / "test", tmp_path / "one.json", *same[:3], templates)["figures"]
        for templates in ("a photo of a {}.", folder / "templates_c.json", folder / "templates_name.json")
    )
    assert others == [one, one]


def test_a_test_set_without_answers_gives_predictions(trial, weights: Path, tmp_path) -> None:
    folder = trial("vqa")
    data = [folder / "test_questions.json", folder / "pictures"]
    written = ("--prompt", "{}", "--set", "max_tokens=16", "--predictions", tmp_path / "answers.json")
    result = evaluate(weights, "vqa", data, tmp_path / "out.json", *written)
    assert result["figures"] == {"accuracy": None}
    assert "2 of the questions have no answers" in result["reasons"]["accuracy"]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [set(answer) for answer in answers] == [{"question_id", "answer"}] * 2


@pytest.mark.parametrize("name", ["whole", "strings"])
def test_ids_match_by_number(trial, weights: Path, tmp_path, name: str) -> None:
    folder = trial("vqa")
    data = [folder / f"{name}_questions.json", folder / "pictures"]
    result = evaluate(weights, "vqa", data, tmp_path / "out.json", "--prompt", "{}", "--set", "max_tokens=16")
    assert result["samples"] == 2
    assert result["figures"]["accuracy"] is not None


def test_a_question_without_an_answer_among_others_is_refused(trial, weights: Path, capsys) -> None:
    folder = trial("vqa")
    data = [str(folder / "partly_questions.json"), str(folder / "pictures")]
    assert main(["evaluate", str(weights), "--task", "vqa", "--data", *data]) == 1
    assert "question 730" in capsys.readouterr().err
