import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from contracap.config import build
from contracap.data.loader import evaluation_samples
from contracap.data.shards import write_shard
from contracap.evaluation.class_names import TEMPLATES, load_classes, load_templates, published_set, templates_for
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.metrics import classification
from contracap.evaluation.metrics.classification import accuracy_parts, mean_average_precision
from contracap.evaluation.result import compute_digest
from contracap.evaluation.task import build_evaluator
from contracap.evaluation.zeroshot import build_classifier, compute_logits, evaluate_zeroshot, label_of, match_classes
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model

from .oracles import reference
from .worlds import COLOURS, ColourModel, Largest, picture, processor, record, sample

NAMES = [*COLOURS]
PLAIN = ("a photo of a {}.",)


def test_accuracy_of_a_model_that_knows_the_colours(tmp_path) -> None:
    records = [record(f"{name}{i}", name, label=NAMES.index(name)) for name in NAMES for i in range(2)]
    write_shard(tmp_path / "0.tar", records)
    result = evaluate_zeroshot(ColourModel(), processor(), tmp_path, classes=NAMES, batch_size=5)
    assert result.figures == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    assert result.predictions.predictions == result.predictions.labels == [i for i in range(6) for _ in range(2)]
    assert (result.samples, result.reasons) == (12, {})
    assert (result.details["classes"], result.details["templates"]) == (6, len(TEMPLATES))
    samples = [sample(f"r{i}", "red", label=0) for i in range(3)] + [sample("b", "blue", label=1)]
    result = evaluate_zeroshot(ColourModel(), processor(), samples, classes=NAMES, templates=PLAIN)
    assert result.figures["acc1"] == 3 / 4
    assert result.figures["mean_per_class_recall"] == 1 / 2  # of two classes; four do not occur
    assert result.figures == {name: pytest.approx(sum(found.values) / 4) for name, found in result.per_sample.items()}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # as the mean is over those that occur
def test_accuracies_equal_clip_benchmark_on_random_scores(monkeypatch) -> None:
    oracle = reference("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(oracle, "float", lambda count: count.item(), raising=False)  # NumPy 2.4 refuses its [1] array
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(200, 9, generator=draw), torch.randint(8, (200,), generator=draw)
    scores[torch.arange(200), labels] += 1
    parts = accuracy_parts(scores, labels)
    expected = dict(zip(("acc1", "acc5"), oracle.accuracy(scores, labels, topk=(1, 5)), strict=True))
    expected["mean_per_class_recall"] = oracle.balanced_accuracy_score(labels, scores.argmax(dim=1))
    assert {name: float(part.mean()) for name, part in parts.items()} == pytest.approx(expected, rel=1e-12)


def test_pictures_are_ranked_in_blocks_of_the_same_figures(monkeypatch) -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(1000, 50, generator=draw), torch.randint(50, (1000,), generator=draw)
    whole = accuracy_parts(scores, labels)
    monkeypatch.setattr(classification, "ROWS", 30)  # the last has 10
    with Largest() as largest:
        in_blocks = accuracy_parts(scores, labels)
    assert all(torch.equal(part, in_blocks[name]) for name, part in whole.items())
    assert largest.elements <= 30 * 50


def test_mean_average_precision_equals_clip_benchmark_on_random_scores() -> None:
    oracle = reference("clip_benchmark.metrics.zeroshot_classification")
    draw = torch.Generator().manual_seed(0)
    scores, marks = torch.randn(150, 7, generator=draw), torch.rand(150, 7, generator=draw) < 0.3
    marks[:, 5], marks[0] = False, False  # a class without an image, an image without a class
    labels = [tuple(row.nonzero().flatten().tolist()) for row in marks]
    expected = oracle.average_precision_per_class(scores, marks.long())
    assert mean_average_precision(scores, labels) == pytest.approx(float(expected.mean()), rel=1e-6)  # which is in fp32


def test_classifier_equals_clip_benchmark() -> None:
    oracle = reference("clip_benchmark.metrics.zeroshot_classification")
    model, prompts = random_model(SIZES["tiny"], seed=0)
    names, templates = ["red fox", "red", "a very long name of a bird"], ["a {}.", "a {} in the snow", "{}"]
    expected = oracle.zero_shot_classifier(
        model, prompts.texts, names, [template.replace("{}", "{c}") for template in templates], "cpu", amp=False
    )
    torch.testing.assert_close(build_classifier(model, prompts, names, templates, batch_size=4), expected.T)


def test_pictures_of_several_classes_have_a_mean_average_precision(tmp_path) -> None:
    records = [
        record("one", "blue", labels=[2]),
        record("two", "red", labels=[0, 1]),
        record("none", "cyan", labels=[]),
    ]
    key, members = record("marked", "red")
    write_shard(tmp_path / "0.tar", [*records, (key, members | {"npy": npy(np.array([1, 0, 0, 0, 0, 0]))})])
    result = evaluate_zeroshot(ColourModel(), processor(), tmp_path, classes=NAMES)
    figures = result.figures
    # red: both images first; green: second or later of four; blue: first; three classes without an image count 0
    assert set(figures) == {"mean_average_precision"}
    assert (1 + 1 / 4 + 1) / 6 <= figures["mean_average_precision"] <= (1 + 1 / 2 + 1) / 6
    assert (result.predictions, result.reasons, result.samples) == ((), {}, 4)
    assert result.per_sample == {}  # it is not a mean over images: neither resampling nor swapping them is valid
    with pytest.raises(ValueError, match="sample one has `labels`, others have one `label`"):
        mixed = [*evaluation_samples(tmp_path), sample("x", "red", label=0)]
        evaluate_zeroshot(ColourModel(), processor(), mixed, classes=NAMES)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        npy(np.zeros(6))[:20],
        npy(np.zeros(6)).replace(b"(6,)", b"(6" + b" " * 2),  # a header that never closes
        npy(np.zeros(6)).replace(b"(6,), }" + b" " * 12, b"(6000000000000,), }"),
        npy(np.zeros(5)),  # of other classes
        npy(np.zeros((6, 1))),
        npy(np.full(6, 0.5, np.float16)),  # an embedding
        npy(np.array(["0"] * 6)),
    ],
)
def test_a_npy_member_that_holds_no_marks_is_no_label(content: bytes) -> None:
    with pytest.raises(ValueError, match="has no label"):
        label_of(replace(sample("x", "red"), npy=content), 6)
    assert label_of(replace(sample("x", "red", label=2), npy=content), 6) == 2


def test_of_equal_scores_the_first_picture_and_the_first_class_stand_first() -> None:
    same = torch.zeros(3, 6)
    assert accuracy_parts(same, torch.tensor([0, 4, 5]))["acc5"].tolist() == [1, 1, 0]
    assert accuracy_parts(same, torch.tensor([0, 4, 5]))["acc1"].tolist() == [1, 0, 0]
    assert mean_average_precision(same[:, :1], [(0,), (), ()]) == 1
    assert mean_average_precision(same[:, :1], [(), (), (0,)]) == pytest.approx(1 / 3)


def test_folders_of_classes_name_them(tmp_path) -> None:
    for name in ("sky_blue", "red"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(COLOURS[name.removeprefix("sky_")]))
    result = evaluate_zeroshot(ColourModel(), processor(), tmp_path, templates=PLAIN)
    assert result.predictions.classes == ("red", "sky blue")
    assert result.figures["acc1"] == 1
    assert result.predictions.labels == [0, 1]
    assert result.details["keys_digest"] == compute_digest(["red/0.png", "sky_blue/0.png"])
    assert match_classes((tmp_path,), ["rouge", "bleu"])[1] == ("rouge", "bleu")
    with pytest.raises(ValueError, match="has 2 subfolders, but there are 6 class names"):
        match_classes(tmp_path, NAMES)


def test_the_order_of_folders_and_classes_is_told_once(tmp_path, caplog) -> None:
    for name in ("sky", "red"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(COLOURS["red"]))
    config = build(TaskConfig, {"task": "zeroshot", "data": str(tmp_path), "classes": str(tmp_path / "names.txt")})
    (tmp_path / "names.txt").write_text("rouge\nbleu\n")
    build_evaluator(config, processor())(ColourModel())
    assert caplog.text.count("matched by order") == 1


def test_names_that_several_classes_share_are_warned_of(tmp_path, caplog) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\n")
    assert load_classes(tmp_path / "names.txt") == ("cat", "dog", "cat")
    assert "'cat'" in caplog.text


def test_shards_do_not_name_their_classes(tmp_path) -> None:
    write_shard(tmp_path / "0.tar", [record("one", "blue", label=2)])
    with pytest.raises(ValueError, match="`classes` is missing"):
        match_classes(tmp_path, None)


def test_last_product_is_fp32_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    pictures, weights = torch.randn(4, 64, generator=draw), torch.randn(7, 64, generator=draw)
    expected = 100 * pictures @ weights.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = compute_logits(pictures, weights)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(({}, "no label"), ({"label": 6}, "label 6"), ({"label": -1}, "label -1"), ({"label": "red"}, "'red'")),
        *(({"label": True}, "label True"), ({"labels": [True, False, True]}, r"label \[True, False, True\]")),
        *(({"labels": [0, 6]}, r"label \[0, 6\]"), ({"labels": 2}, "no label")),
    ],
)
def test_a_label_without_a_class_is_refused(fields, said: str) -> None:
    with pytest.raises(ValueError, match=rf"sample x of shard\.tar has .*{said}.* from 0 to 5"):
        label_of(sample("x", "red", **fields), 6)


@pytest.mark.parametrize(("load", "name"), [(load_classes, "classes"), (load_templates, "templates")])
@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '["", "a {}"]', '["a {}", " "]', '"red"', '{"%s": {}}'])
def test_a_file_without_texts_is_refused(tmp_path, load, name: str, content: str) -> None:
    (tmp_path / "mine.json").write_text(content.replace("%s", name))
    with pytest.raises(ValueError, match=rf"mine\.json holds no {name}; give a JSON list of texts"):
        load(tmp_path / "mine.json")


@pytest.mark.parametrize("load", [load_classes, load_templates])
def test_a_file_that_is_no_json_is_refused(tmp_path, load) -> None:
    for content, said in ((b"nothing", "not JSON"), (b"[" * 100_000, "not JSON"), (b'["\xff"]', "not UTF-8")):
        (tmp_path / "mine.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"mine\.json is {said}"):
            load(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_bytes(b'\xef\xbb\xbf["a {}"]')  # a byte order mark
    assert load(tmp_path / "mine.json") == ("a {}",)


def test_published_sets_are_known_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_classes("vtab/eurosat") == published_set("eurosat").classes
    assert load_templates("imagenet-simple") == published_set("imagenet-simple").templates
    assert templates_for("cifar10") == published_set("cifar10").templates
    assert templates_for(None) == TEMPLATES
    assert templates_for("imagenet-a") == published_set("imagenet1k").templates
    (tmp_path / "mine").write_text(json.dumps({"classes": NAMES, "templates": ["a {}"]}))
    assert (load_classes("mine"), load_templates("mine"), templates_for("mine")) == (tuple(NAMES), ("a {}",), TEMPLATES)


def test_a_path_is_never_a_published_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"called '\./cifar10'; the nearest are cifar10"):
        load_classes("./cifar10")
    (tmp_path / "cifar10").write_text('["mine", "a {}"]')
    assert load_classes("./cifar10") == ("mine", "a {}")
    assert load_classes("cifar10") == published_set("cifar10").classes


def test_a_label_may_be_a_member_a_text_or_a_vector_of_marks_and_fields_come_first(tmp_path) -> None:
    key, members = record("one", "blue")
    write_shard(tmp_path / "0.tar", [(key, members | {"cls": b"2"})])
    assert label_of(next(iter(evaluation_samples(tmp_path))), 6) == 2
    assert label_of(sample("x", "red", label="2"), 6) == 2
    assert label_of(sample("x", "red", labels=["0", "5"]), 6) == (0, 5)
    marks = npy(np.array([1, 0, 0, 0, 0, 1], bool))
    assert label_of(replace(sample("x", "red"), npy=marks), 6) == (0, 5)
    assert label_of(replace(sample("x", "red", labels=[1]), npy=marks), 6) == (1,)
    assert label_of(replace(sample("x", "red", label=2), npy=marks), 6) == 2


def test_classes_and_templates_come_from_lists_manifests_lines_or_the_command_line(tmp_path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(NAMES))
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "colours", "classes": NAMES}))
    (tmp_path / "names.txt").write_text("a cat\r\ntwo dogs\n")
    assert load_classes(tmp_path / "list.json") == load_classes(tmp_path / "manifest.json") == tuple(NAMES)
    assert load_classes(tmp_path / "names.txt") == ("a cat", "two dogs")
    names = load_classes("clevr_closest_object_distance")
    assert match_classes([], names)[1] == names and "" in names
    (tmp_path / "templates.json").write_text('["a {}", "{} {{}}"]')
    assert load_templates(tmp_path / "templates.json") == ("a {}", "{} {{}}")
    for place in ("{c}", "{class_name}", "{}"):
        (tmp_path / "templates.txt").write_text(f"a photo of {place}.\n{place}!\n")
        assert load_templates(tmp_path / "templates.txt") == ("a photo of {}.", "{}!")
    for template in ("a photo of a {}.", "{}.png"):
        assert load_templates(template) == (template,)


def test_classes_and_templates_that_cannot_be_read_are_refused(tmp_path) -> None:
    (tmp_path / "templates.json").write_text('["a {}", "a photo"]')
    with pytest.raises(ValueError, match=r"templates\.json: the template 'a photo' has no \{\}"):
        load_templates(tmp_path / "templates.json")
    with pytest.raises(ValueError, match=r"'a photo'.*\{\}"):
        load_templates("a photo")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_classes("none.json")
    with pytest.raises(ValueError, match="'imagenet-simple' has templates alone"):
        load_classes("imagenet-simple")
    with pytest.raises(ValueError, match="called 'imagenet1'; the nearest are imagenet1k, "):
        templates_for("imagenet1")
