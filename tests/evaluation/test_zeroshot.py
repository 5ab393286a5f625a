import json

import pytest
import torch
from torch.nn.functional import normalize

from contracap.data.shards import write_shard
from contracap.evaluation.zeroshot import TEMPLATES, ZeroShot, classifier, load_classes, load_templates, logits

from .worlds import COLOURS, ColourModel, processor, record, sample

NAMES = [*COLOURS]
PLAIN = ("a photo of a {}.",)


def test_classifier_is_the_normalised_mean_of_the_normalised_prompts() -> None:
    torch.manual_seed(0)
    model, prompts = ColourModel(), processor()
    table = torch.randn(1024, 8)
    model.encode_text = lambda ids: table[ids].mean(dim=1)  # depends on the template too, and is not normalised
    weights = classifier(model, prompts, ["red", "blue"], TEMPLATES, batch_size=3)
    for row, name in zip(weights, ["red", "blue"], strict=True):
        texts = prompts.texts([template.format(name) for template in TEMPLATES])
        mean = normalize(model.encode_text(texts), dim=-1).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_accuracy_of_a_model_that_knows_the_colours(tmp_path) -> None:
    records = [record(f"{name}{i}", name, label=NAMES.index(name)) for name in NAMES for i in range(2)]
    write_shard(tmp_path / "0.tar", records)
    evaluator = ZeroShot(tmp_path, processor(), classes=NAMES, batch_size=5)
    assert dict(evaluator.run(ColourModel())) == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    assert evaluator.predictions == evaluator.labels == [i for i in range(6) for _ in range(2)]
    assert (evaluator.samples, evaluator.reasons) == (12, {})
    assert evaluator.details == {"classes": 6, "templates": len(TEMPLATES)}


def test_class_member_of_a_shard_is_the_label(tmp_path) -> None:
    key, members = record("one", "blue")
    write_shard(tmp_path / "0.tar", [(key, members | {"cls": b"2"})])
    evaluator = ZeroShot(tmp_path, processor(), classes=NAMES)
    assert dict(evaluator.run(ColourModel()))["acc1"] == 1.0


def test_mean_per_class_recall_weighs_the_occurring_classes_alike() -> None:
    samples = [sample(f"r{i}", "red", label=0) for i in range(3)] + [sample("b", "blue", label=1)]
    figures = dict(ZeroShot(samples, processor(), classes=NAMES, templates=PLAIN).run(ColourModel()))
    assert figures["acc1"] == 3 / 4
    assert figures["mean_per_class_recall"] == 1 / 2  # of two classes; four do not occur


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_equal_clip_benchmark_on_random_scores(monkeypatch, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores, labels = torch.randn(200, 9, generator=draw), torch.randint(8, (200,), generator=draw)
    scores[torch.arange(200), labels] += 1
    evaluator = ZeroShot([], processor(), classes=[f"class {i}" for i in range(9)])
    monkeypatch.setattr(evaluator, "_scores", lambda model: (scores, labels))
    figures = dict(evaluator.run(ColourModel()))
    top = scores.topk(5, dim=1).indices == labels[:, None]
    assert figures["acc1"] == pytest.approx(top[:, :1].any(dim=1).float().mean().item())
    assert figures["acc5"] == pytest.approx(top.any(dim=1).float().mean().item())
    recalls = [top[labels == label, 0].float().mean() for label in range(8)]
    assert figures["mean_per_class_recall"] == pytest.approx(torch.stack(recalls).mean().item())


def test_below_five_classes_there_is_a_reason_instead_of_acc5() -> None:
    evaluator = ZeroShot([sample("r", "red", label=0)], processor(), classes=NAMES[:3])
    assert set(dict(evaluator.run(ColourModel()))) == {"acc1", "mean_per_class_recall"}
    assert evaluator.reasons == {"acc5": "acc5 needs at least 5 classes; there are 3"}


def test_last_product_is_fp32_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    pictures, weights = torch.randn(4, 64, generator=draw), torch.randn(7, 64, generator=draw)
    expected = 100 * pictures @ weights.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = logits(pictures, weights)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(("label", "said"), [(None, "no label"), (6, "label 6"), (-1, "label -1"), ("red", "'red'")])
def test_a_label_without_a_class_is_refused(label, said: str) -> None:
    fields = {} if label is None else {"label": label}
    with pytest.raises(ValueError, match=rf"sample x of shard\.tar has .*{said}.* from 0 to 5"):
        dict(ZeroShot([sample("x", "red", **fields)], processor(), classes=NAMES).run(ColourModel()))


def test_class_names_come_from_a_list_or_a_manifest(tmp_path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(NAMES))
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "colours", "classes": NAMES}))
    assert load_classes(tmp_path / "list.json") == load_classes(tmp_path / "manifest.json") == tuple(NAMES)


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '"red"', "nothing", '{"classes": {"red": 0}}'])
def test_a_file_without_class_names_is_refused(tmp_path, content: str) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json.* (give a JSON list|not JSON)"):
        load_classes(tmp_path / "classes.json")


def test_templates_come_from_a_list(tmp_path) -> None:
    (tmp_path / "templates.json").write_text('["a {}", "{} {{}}"]')
    assert load_templates(tmp_path / "templates.json") == ("a {}", "{} {{}}")
    (tmp_path / "templates.json").write_text('["a {}", "a photo"]')
    with pytest.raises(ValueError, match=r"templates\.json: the template 'a photo' has no \{\}"):
        load_templates(tmp_path / "templates.json")


def test_every_built_in_template_has_a_place_for_the_name() -> None:
    assert all(template.count("{}") == 1 for template in TEMPLATES)
