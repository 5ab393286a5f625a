import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.data.samples import Sample
from contracap.data.shards import write_shard
from contracap.evaluation import answers as module
from contracap.evaluation.answers import AnswerChooser, Answerer, AnswerWriter, PromptedQuestion, ScoredAnswer
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.result import compute_digest
from contracap.evaluation.task import build_evaluator
from contracap.evaluation.vqa import STRATEGY, evaluate_vqa, load_answers, write_answers
from contracap.generation import BeamSearch, ContrastiveReranking, Greedy, Sampling
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.processor import Processor
from tests.model.tiny_models import tiny_clip

from .worlds import COLOURS, processor, record, sample

ANSWERS = ["red", "a red wall", "no", "the", "of", "in", "and", "to", "on", "is", "for", "at", "it", "green"]
QUESTIONS = ["is it red?", "what colour is the wall?", "is it?", "how many walls are there in the image?"]


TINY = replace(SIZES["tiny"], text=replace(SIZES["tiny"].text, context=64))


@pytest.fixture(scope="module")
def pair() -> tuple[CoCa, Processor]:
    """A tiny model that gives different answers about different images and questions."""
    model, processor = random_model(TINY, seed=0)
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.vocabulary.weight *= 4.0
        model.decoder.vocabulary.weight[TINY.text.end] *= 2.0
        for name, weight in model.decoder.cross_blocks.named_parameters():
            if name.endswith("attention.out.weight"):
                weight *= 20.0
    return model, processor


def answerer(answers: Sequence[str], strategy: Strategy | None = None) -> Answerer:
    return AnswerChooser(answers) if answers else AnswerWriter(strategy or Greedy(max_tokens=36, min_tokens=0))


def pictures(*asked: tuple[str, list[str]]) -> list[Sample]:
    """Images of a colour, with questions whose answer is `yes`."""
    return [
        sample(str(i), colour, qa=[{"question": question, "answer": "yes"} for question in about])
        for i, (colour, about) in enumerate(asked)
    ]


WORLD = [("red", QUESTIONS), ("green", QUESTIONS[:1]), ("blue", QUESTIONS[1:3])]


@torch.no_grad()
def by_full_pass(model: CoCa, processor: Processor, pixels: torch.Tensor, prompt: str) -> list[float]:
    """Of each answer the sum of its log-probabilities and the end token's, from a pass over the whole text."""
    tokenizer = processor.tokenizer
    begun = tokenizer.encode(prompt)
    ids = tokenizer([f"{prompt} {answer}" for answer in ANSWERS])
    gains = model.eval()(pixels.expand(len(ids), -1, -1, -1), ids).logits.log_softmax(dim=-1)
    gains = gains.gather(2, ids[:, 1:, None]).squeeze(2)
    ends = (ids == tokenizer.end).int().argmax(dim=1).tolist()
    return [row[len(begun) : end].sum().item() for row, end in zip(gains, ends, strict=True)]


def test_answers_are_scored_as_by_a_full_pass_over_each(pair, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROWS", 5)
    model, processor = pair
    pixels = processor.images([item.image for item in pictures(*WORLD)])
    flat = [(i, question) for i, (_, about) in enumerate(WORLD) for question in about]
    asked = [
        PromptedQuestion(image=i, number=number, prompt=tuple(processor.tokenizer.encode(question)), sample="")
        for number, (i, question) in enumerate(flat)
    ]
    found = AnswerChooser(ANSWERS).log_probabilities(model, processor, pixels, asked)
    expected = [by_full_pass(model, processor, pixels[i], question) for i, question in flat]
    assert torch.allclose(found, torch.tensor(expected), atol=2e-4)
    assert len(found.argmax(dim=1).unique()) > 1
    chosen = AnswerChooser(ANSWERS)(model, processor, pixels, asked)
    assert [answer.text for answer in chosen] == [ANSWERS[best] for best in found.argmax(dim=1)]
    assert [answer.probability for answer in chosen] == pytest.approx(
        found.softmax(dim=1).amax(dim=1).tolist(), rel=1e-4
    )


@pytest.mark.parametrize("strategy", [BeamSearch(width=2, max_tokens=24), Sampling(max_tokens=24, seed=1)])
def test_written_answers_are_what_the_captioner_writes_behind_the_question(pair, strategy) -> None:
    model, processor = pair
    answer = answerer((), strategy)
    result = evaluate_vqa(model, processor, pictures(*WORLD), answerer=answer, prompt="q: {} a:", batch_size=8)
    flat = [(colour, question) for colour, about in WORLD for question in about]
    pixels = processor.images([sample("", colour).image for colour, _ in flat])
    prompts = [f"q: {question} a:" for _, question in flat]
    captions = Captioner(model, processor).generate(pixels, strategy, prompts=prompts)
    begun = [len(processor.tokenizer.encode(prompt)) for prompt in prompts]
    texts = [processor.tokenizer.decode(caption.token_ids[n:]) for caption, n in zip(captions, begun, strict=True)]
    assert [answer.prediction for answer in result.predictions] == texts
    probabilities = [math.exp(caption.log_probability) for caption in captions]
    assert [answer.probability for answer in result.predictions] == pytest.approx(probabilities, rel=1e-4)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("answers", [ANSWERS, ()])
def test_batches_do_not_change_the_answers_and_encode_each_picture_once(pair, monkeypatch, answers) -> None:
    model, processor = pair
    found, seen, encode = [], [], CoCa.encode_caption_tokens
    monkeypatch.setattr(
        CoCa, "encode_caption_tokens", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels)
    )
    for size in (2, 16):
        result = evaluate_vqa(model, processor, pictures(*WORLD), answerer=answerer(answers), batch_size=size)
        found.append([answer.prediction for answer in result.predictions])
    assert found[0] == found[1]
    assert seen == [2, 1, 3]


def test_questions_of_like_length_are_answered_together(pair, monkeypatch) -> None:
    model, processor = pair
    strategy = Sampling(max_tokens=24, min_tokens=0, seed=1)
    pixels = processor.images([sample("", colour).image for colour in ("red", "green", "blue", "yellow")])
    prompts = [tuple(processor.tokenizer.encode(question)) for question in (QUESTIONS[2], QUESTIONS[3])]
    asked = [PromptedQuestion(image=i, number=i, prompt=prompts[i % 2], sample="") for i in range(4)]
    steps, next_logits = [], CoCa.next_logits
    monkeypatch.setattr(CoCa, "next_logits", lambda self, *inputs: steps.append(1) or next_logits(self, *inputs))
    monkeypatch.setattr(module, "QUESTIONS", 2)

    def answered(some: list[PromptedQuestion]) -> tuple[list[str], int]:
        before = len(steps)
        texts = [answer.text for answer in AnswerWriter(strategy)(model, processor, pixels, some)]
        return texts, len(steps) - before

    found, together = answered(asked)
    (first, mixed), (second, mixed_again) = answered(asked[:2]), answered(asked[2:])
    assert found == first + second and len(set(found)) > 1
    walked = len(prompts[1]) - len(prompts[0])  # steps along what a longer prompt has and a shorter one has not
    assert walked > 3 and together <= mixed + mixed_again - walked


class Told:
    """Answers in turn as it is told, without doubt."""

    def __init__(self, *answers: str):
        self.answers = iter(answers)

    def __call__(self, model, processor, pixels, asked) -> list[ScoredAnswer]:
        return [ScoredAnswer(next(self.answers), 1.0) for _ in asked]


def test_accuracy_is_over_questions_and_by_their_types(pair) -> None:
    model, processor = pair
    ten = ["two"] * 2 + ["3"] * 8

    def question(answers: list[str], kind: str, of: str) -> dict:
        return {"question": "so?", "answers": answers, "question_type": kind, "answer_type": of}

    samples = [
        sample("a", "red", qa=[question(["Yes."] * 10, "is", "yes/no"), question(ten, "how many", "number")]),
        sample("b", "blue", qa=[question(["no"] * 9 + ["yes"], "is", "yes/no")]),
    ]
    told = ("yes", "the two", "No!")
    result = evaluate_vqa(model, processor, samples, answerer=Told(*told))
    assert result.values["accuracy"] == pytest.approx((0 + 0.6 + 1) / 3)
    assert result.samples == 2
    assert result.per_sample["accuracy"].values == pytest.approx([0.6 * 2 / 3, 1 * 2 / 3])
    assert result.details == {
        "keys_digest": compute_digest(["a", "b"]),
        "questions": 3,
        "accuracy_by_question_type": {"how many": pytest.approx(0.6), "is": 0.5},
        "accuracy_by_answer_type": {"number": pytest.approx(0.6), "yes/no": 0.5},
    }
    assert [(answer.key, answer.prediction) for answer in result.predictions] == list(zip("aab", told, strict=True))

    lenient = evaluate_vqa(model, processor, samples, answerer=Told(*told), strict=False)
    assert lenient.values["accuracy"] == pytest.approx((1 + 0.6 + 1) / 3)
    assert lenient.values["calibration_error"] == pytest.approx(1 - lenient.values["accuracy"])


def test_shards_of_questions_are_answered_from_a_list(pair, tmp_path: Path) -> None:
    model, processor = pair
    qa = [{"question": "is it?", "answer": "yes"}, {"question": "what colour?", "answer": "red"}]
    write_shard(tmp_path / "0.tar", [record(name, name, qa=qa) for name in COLOURS])
    result = evaluate_vqa(model, processor, tmp_path, answerer=answerer(ANSWERS))
    assert 0 <= result.figures["accuracy"] <= 1
    assert (result.details["questions"], result.details["answers"]) == (12, len(ANSWERS))
    assert {answer.prediction for answer in result.predictions} <= set(ANSWERS)
    assert sum(result.per_sample["accuracy"].values) / 6 == pytest.approx(result.figures["accuracy"])


@pytest.mark.parametrize("beside", [True, False])
def test_a_file_of_questions_is_a_source(pair, tmp_path: Path, beside: bool) -> None:
    model, processor = pair
    answers = [{"answer": "yes"}] * 10
    put = {"questions": [{"question_id": 1, "image_id": 9, "question": "is it?"}]}
    file = tmp_path / "asked" / "v2_OpenEnded_mscoco_val2014_questions.json"
    pictures = file.with_name("val2014") if beside else tmp_path / "val2014"
    file.parent.mkdir()
    file.write_text(json.dumps(put))
    said = {"annotations": [{"question_id": 1, "image_id": 9, "question_type": "is it", "answers": answers}]}
    file.with_name("v2_mscoco_val2014_annotations.json").write_text(json.dumps(said))
    pictures.mkdir()
    (pictures / "COCO_val2014_000000000009.png").write_bytes(sample("", "red").image)
    data = [str(file)] if beside else [str(file), str(pictures)]
    result = evaluate_vqa(model, processor, data, answerer=answerer(["no", "yes"]))
    assert [answer.key for answer in result.predictions] == ["COCO_val2014_000000000009"]
    assert list(result.details["accuracy_by_question_type"]) == ["is it"]
    task = TaskConfig(task="vqa", data=str(file) if beside else (str(file), str(pictures)), strategy="greedy")
    built = build_evaluator(task, processor)
    file.unlink()  # it has been read: a run need not do it again
    assert built(model).figures.keys() == {"accuracy", "calibration_error"}
    file.write_text(json.dumps(put))
    with pytest.raises(ValueError, match=r"after the questions .*\.json comes one folder, of images, not 2"):
        evaluate_vqa(model, processor, [file, tmp_path, tmp_path])


def test_what_cannot_be_asked_is_refused(pair) -> None:
    model, processor = pair
    world = pictures(*WORLD)
    with pytest.raises(ValueError, match=r"the prompt 'question:' has no \{\}"):
        evaluate_vqa(model, processor, world, prompt="question:")
    with pytest.raises(ValueError, match="'yes' is named twice"):
        answerer(["yes", "no", "yes"])
    with pytest.raises(ValueError, match="another strategy than rerank"):
        answerer((), ContrastiveReranking())
    with pytest.raises(ValueError, match="the answer '  ' has no text"):
        evaluate_vqa(model, processor, world, answerer=answerer(["yes", "  "]))
    with pytest.raises(ValueError, match="names the start or the end token"):
        evaluate_vqa(model, processor, pictures(("red", ["is <end_of_text> it?"])))
    with pytest.raises(ValueError, match=r"sample 0 of shard\.tar has no questions"):
        evaluate_vqa(model, processor, [sample("0", "red", "a red wall")])


def test_a_question_without_room_for_an_answer_is_named_and_cut_short(pair) -> None:
    model, processor = pair
    long = pictures(("green", ["is it?"]), ("red", ["is it?", "is it " * 60]))
    for answers in (ANSWERS, ()):
        said = r"^sample 1 of shard\.tar: the question 'is it is .{50} leaves no room .*context, or max_tokens, is 64$"
        with pytest.raises(ValueError, match=said):
            evaluate_vqa(model, processor, long, answerer=answerer(answers, STRATEGY), prompt="{}")


def test_the_last_question_with_room_for_an_answer_is_asked(pair) -> None:
    model, processor = pair
    taken = len(processor.tokenizer.encode("is it"))
    for answers, strategy, needed in (
        (("no",), Greedy(), 64 - 1 - len(processor.tokenizer.encode("no")) - 1),
        ((), Greedy(max_tokens=40, min_tokens=0), 40 - 1 - 1),
    ):
        texts = ["is it" + " is" * (needed - taken + more) for more in (0, 1)]
        assert [len(processor.tokenizer.encode(text)) for text in texts] == [needed, needed + 1]
        fits, does_not = (pictures(("red", [text])) for text in texts)
        evaluate_vqa(model, processor, fits, answerer=answerer(answers, strategy), prompt="{}")
        with pytest.raises(ValueError, match="leaves no room"):
            evaluate_vqa(model, processor, does_not, answerer=answerer(answers, strategy), prompt="{}")


def test_broken_weights_are_named_and_a_clip_cannot_answer(pair) -> None:
    _, processor = pair
    broken, _ = random_model(TINY, seed=0)
    with torch.no_grad():
        broken.decoder.vocabulary.weight.fill_(float("nan"))
    asked = [PromptedQuestion(image=0, number=0, prompt=(1,), sample="")]
    for answers in (ANSWERS, ()):
        with pytest.raises(ValueError, match="not finite"):
            evaluate_vqa(broken, processor, pictures(*WORLD), answerer=answerer(answers))
        with pytest.raises(ValueError, match="no text decoder"):
            answerer(answers)(CoCa(tiny_clip()), processor, torch.zeros(1, 3, 32, 32), asked)


@pytest.mark.parametrize("content", [["yes", "no"], {"name": "x", "answers": ["yes", "no"]}])
def test_answers_are_read_from_a_list_or_a_manifest(tmp_path: Path, content) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(content))
    assert load_answers(tmp_path / "answers.json") == ("yes", "no")
    for wrong in ("{}", "[]", '["yes", 1]', '{"answers": "yes"}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"wrong\.json holds no answers; give a JSON list"):
            load_answers(tmp_path / "wrong.json")


@pytest.mark.parametrize("ids", [(7, "x", 0), (7, None, 0)])
def test_answers_are_kept_by_the_ids_of_their_questions_or_by_their_places(tmp_path: Path, ids) -> None:
    first, second, third = ({"question": "so?", "answer": "yes", "question_id": identity} for identity in ids)
    samples = [sample("a", "red", qa=[first, second]), sample("b", "blue", qa=[third])]
    model = random_model(SIZES["tiny"], seed=0)[0]
    result = evaluate_vqa(model, processor(), samples, answerer=Told("one", "two", "3"))
    write_answers(tmp_path / "kept.json", result.predictions)
    names = [{"question_id": identity} for identity in ids]
    if None in ids:
        names = [{"key": key, "number": number} for key, number in (("a", 0), ("a", 1), ("b", 0))]
    expected = [name | {"answer": answer} for name, answer in zip(names, ("one", "two", "3"), strict=True)]
    assert json.loads((tmp_path / "kept.json").read_text()) == expected
