import csv
import io
from dataclasses import replace

import pytest

from contracap.apps.compare.comparison import compare
from contracap.apps.compare.comparison_tables import to_csv, to_latex, to_markdown
from contracap.evaluation.result import Result
from tests.apps.compare.worlds import result

HITS = [1.0] * 30 + [0.0] * 10
FEWER = [1.0] * 20 + [0.0] * 20


def test_a_gap_is_the_first_minus_the_second_with_an_interval_around_it() -> None:
    (row,) = compare([result({"acc1": HITS})], [result({"acc1": FEWER})]).rows
    assert (row.a, row.b) == (0.75, 0.5)
    assert row.gap == pytest.approx(0.25)
    assert row.low is not None and row.high is not None
    assert row.low < 0.25 < row.high
    assert row.p == row.p_holm
    assert row.p is not None and row.p < 0.01  # ten images, all in favour of the first: 2 / 2**10


def test_runs_are_averaged_and_keep_their_own_gaps() -> None:
    nothing = [0.0] * 40
    comparison = compare(
        [result({"acc1": HITS}), result({"acc1": FEWER})], [result({"acc1": FEWER}), result({"acc1": nothing})]
    )
    (row,) = comparison.rows
    assert (row.a, row.b, row.gap) == (0.625, 0.25, 0.375)
    assert row.gaps == (0.25, 0.5)
    assert comparison.runs == 2
    assert "| +37.50 | +25.00 +50.00 |" in to_markdown(comparison)
    assert to_csv(comparison).splitlines()[0] == "figure,A,B,gap,gap_1,gap_2,low,high,reason"


def test_of_several_runs_the_interval_alone_speaks() -> None:
    runs = [result({"acc1": HITS})] * 2, [result({"acc1": FEWER})] * 2
    comparison = compare(*runs)
    (row,) = comparison.rows
    assert row.low is not None and row.low > 0
    assert (row.p, row.p_holm) == (None, None)
    table, _, below = to_markdown(comparison).partition("\n\n")
    assert table.splitlines()[0] == "| figure | A | B | gap | each run | 95 % interval |"
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "No p-value is given" in below and "Holm" not in below


def test_many_figures_make_each_p_value_larger() -> None:
    names = [f"task{number}/acc1" for number in range(5)]
    comparison = compare([result(dict.fromkeys(names, HITS))], [result(dict.fromkeys(names, FEWER))])
    for row in comparison.rows:
        assert row.p is not None
        assert row.p_holm == pytest.approx(5 * row.p)


@pytest.mark.parametrize("other", [{"keys": [f"other{row}" for row in range(40)]}, {"keys": None}])
def test_other_samples_are_refused_by_the_name_of_the_figure(other: dict) -> None:
    values = FEWER if other["keys"] else FEWER[:30]
    with pytest.raises(ValueError, match=r"cifar10/acc1 was measured on other samples.* CLIP"):
        compare([result({"cifar10/acc1": HITS})], [result({"cifar10/acc1": values}, **other)], names=("CoCa", "CLIP"))


def test_without_values_the_numbers_and_keys_of_the_samples_must_be_equal() -> None:
    def measured(count: int, keys: str = "") -> Result:
        return replace(result({}, {"Bleu_4": 0.2}, samples=count), details={"keys_digest": keys} if keys else {})

    def tasks(coco: int, other: int) -> Result:
        found = {"coco": {"samples": coco}, "other": {"samples": other}}
        return replace(result({}, {"coco/Bleu_4": 0.2}, samples=coco + other), details={"tasks": found})

    for first, second, words in (
        (measured(4), measured(5), "Bleu_4 was measured on other samples: the results rest on 4 and 5"),
        (measured(4, "ab"), measured(4, "cd"), "Bleu_4 was measured on other samples, with other keys"),
        (tasks(4, 5), tasks(5, 4), "coco/Bleu_4 was measured on other samples: the results rest on 4 and 5"),
    ):
        with pytest.raises(ValueError, match=words):
            compare([first], [second])
        assert compare([first], [first]).rows[0].gap == 0
    assert compare([tasks(4, 5)], [tasks(4, 7)]).rows[0].gap == 0


@pytest.mark.parametrize("task", ["", "coco/"])
def test_what_was_measured_by_other_means_is_said(task: str) -> None:
    def measured(tokenizer: str, model: str) -> Result:
        facts = {"tokenizer": tokenizer, "clipscore_model": model}
        details = {"tasks": {"coco": facts}} if task else facts
        return replace(result({}, {f"{task}Bleu_4": 0.2, f"{task}CLIPScore": 0.7}), details=details)

    comparison = compare([measured("java", "B")], [measured("python", "B")], names=("CoCa", "CLIP"))
    said = "the tokenizer (java for CoCa, python for CLIP)"
    (remark,) = comparison.remarks
    assert remark.startswith(f"coco: {said}" if task else said)
    assert said in to_markdown(comparison)
    comparison = compare([measured("java", "B")], [measured("java", "L")])
    assert ["the model of CLIPScore (B for A" in remark for remark in comparison.remarks] == [True]
    assert compare([measured("java", "B")], [measured("java", "B")]).remarks == ()


@pytest.mark.parametrize("count", ["captions", "classes", "questions"])
def test_other_numbers_of_what_is_counted_are_refused(count: str) -> None:
    def measured(number: int) -> Result:
        return replace(result({"x/acc1": HITS}), details={"tasks": {"x": {count: number}}})

    words = f"x was measured on other samples: 5 {count} of A, 1 of B; evaluate both on the same data"
    with pytest.raises(ValueError, match=words):
        compare([measured(5)], [measured(1)])
    assert compare([measured(5)], [measured(5)]).rows[0].gap == 0


def test_what_was_asked_of_one_system_in_another_way_is_said() -> None:
    def measured(**asked: object) -> Result:
        return replace(result({"acc1": HITS}), details={"asked": {"task": "zeroshot", **asked}})

    plain = measured(data=["/here/cifar10"], classes="cifar10")
    assert compare([plain], [measured(data=["/elsewhere/cifar10"], classes="cifar10")]).remarks == ()
    other = measured(data=["/here/cifar100"], classes="cifar10", templates="short.json", settings=["a=1", "b=2"])
    assert compare([plain], [other]).remarks == (
        "the data (cifar10 for A, cifar100 for B) may cause part of the gap",
        "the set of templates (the default for A, short.json for B) may cause part of the gap",
        "the strategy's settings (the default for A, a=1 b=2 for B) may cause part of the gap",
    )


def test_published_classes_that_differ_in_their_prefix_alone_are_told_apart() -> None:
    def measured(classes: str, templates: str) -> Result:
        return replace(result({"acc1": HITS}), details={"asked": {"classes": classes, "templates": templates}})

    plain = measured("flowers", "flowers")
    (remark,) = compare([plain], [measured("vtab/flowers", "vtab/flowers")]).remarks
    assert "(flowers for A, vtab/flowers for B)" in remark
    assert compare([plain], [measured("wds/flowers", "wds/flowers")]).remarks == ()
    assert compare([plain], [measured("/here/vtab/flowers", "flowers")]).remarks == ()  # a file, not the set


def test_judges_that_are_the_models_themselves_are_told_of() -> None:
    judged = replace(result({}, {"CLIPScore": 0.7}), details={"asked": {"clipscore": "self"}})
    (remark,) = compare([judged], [judged]).remarks
    assert remark == "a model's CLIPScore of its own captions compares the judges as much as the captions"


def test_a_task_that_failed_in_one_system_is_told_of_with_its_reason() -> None:
    whole = result({"x/acc1": HITS, "late/acc1": HITS})
    failed = result({"x/acc1": HITS}, {"late": None})
    comparison = compare([whole], [failed], names=("CoCa", "CLIP"))
    assert comparison.remarks == ("late of CLIP: SPICE needs a jar",)
    assert "- late of CLIP: SPICE needs a jar" in to_markdown(comparison)
    assert comparison.only == (("late/acc1",), ())
    assert compare([failed], [whole]).only == ((), ("late/acc1",))
    more = result({"x/acc1": HITS}, {"x/SPICE": None})
    assert compare([more], [result({"x/acc1": HITS})]).remarks == ()  # the other has no SPICE either


def test_a_task_that_failed_in_both_systems_keeps_nothing_from_being_compared() -> None:
    more = result({"x/acc1": HITS, "y/acc1": HITS}, {"late": None}, samples=8)
    fewer = result({"x/acc1": FEWER}, {"late": None}, samples=4)
    measured, failed = compare([more], [fewer]).rows
    assert measured.gap == 0.25
    assert (failed.gap, failed.reason) == (None, "A: SPICE needs a jar")


def test_a_figure_without_values_of_samples_has_a_gap_alone() -> None:
    (row,) = compare([result({}, {"Bleu_4": 0.3})], [result({}, {"Bleu_4": 0.2})]).rows
    assert row.gap == pytest.approx(0.1)
    assert (row.low, row.high, row.p, row.p_holm) == (None, None, None, None)
    assert row.reason == "no values of single samples, hence no interval"


def test_a_missing_figure_is_shown_with_its_reason() -> None:
    comparison = compare([result({}, {"SPICE": 0.3})], [result({}, {"SPICE": None})], names=("CoCa", "CLIP"))
    (row,) = comparison.rows
    assert (row.a, row.b, row.gap) == (0.3, None, None)
    assert "| SPICE | 30.00 | missing |" in to_markdown(comparison)
    assert "- SPICE: CLIP: SPICE needs a jar" in to_markdown(comparison)
    content = comparison.result(command="made here").to_dict()
    assert content["figures"] == {"SPICE": None}
    assert content["reasons"] == {"SPICE": "CLIP: SPICE needs a jar"}


def test_figures_of_one_system_alone_are_listed_as_such() -> None:
    comparison = compare([result({"acc1": HITS, "acc5": HITS})], [result({"acc1": HITS, "CIDEr": HITS})])
    assert [row.figure for row in comparison.rows] == ["acc1"]
    assert comparison.only == (("acc5",), ("CIDEr",))
    assert "only of B: CIDEr" in to_markdown(comparison)


def test_what_cannot_be_compared_is_refused() -> None:
    one = result({"acc1": HITS})
    with pytest.raises(ValueError, match="nothing in common: A has acc1; B has CIDEr"):
        compare([one], [result({"CIDEr": HITS})])
    with pytest.raises(ValueError, match="compared in pairs"):
        compare([one, one], [one])
    with pytest.raises(ValueError, match="compared in pairs"):
        compare([], [])
    with pytest.raises(ValueError, match="names that differ"):
        compare([one], [one], names=("CoCa", "CoCa"))


def test_the_figure_shows_headlines_and_where_there_are_none_all_scores() -> None:
    values = {"b/acc1": FEWER, "b/acc5": HITS, "a/text_to_image_recall@5": HITS, "a/text_to_image_recall@1": HITS}
    comparison = compare([result(values)], [result(dict.fromkeys(values, FEWER))])
    assert [row.figure for row in comparison.headlines] == ["a/text_to_image_recall@5", "b/acc1"]  # by size
    other = {"caption_accuracy": 0.5, "seconds": 200.0}
    assert [row.figure for row in compare([result({}, other)], [result({}, other)]).headlines] == ["caption_accuracy"]


def whole() -> tuple[list[Result], list[Result]]:
    a = result({"flickr8k/CIDEr": [0.5, 1.5]}, {"flickr8k/Bleu_4": 0.25, "seconds": 20.0})
    return [a], [replace(a, figures=a.figures | {"flickr8k/Bleu_4": 0.125})]


def test_csv_holds_what_was_computed() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(*whole(), names=("CoCa", "CLIP"))))))
    assert [row["figure"] for row in rows] == ["flickr8k/CIDEr", "flickr8k/Bleu_4", "seconds"]
    assert float(rows[0]["CoCa"]) == 1.0
    assert float(rows[1]["gap"]) == 0.125
    assert rows[1]["low"] == ""


def test_printed_scores_are_times_100_but_seconds_are_seconds() -> None:
    lines = to_markdown(compare(*whole())).splitlines()
    assert lines[2].startswith("| flickr8k/CIDEr | 100.00 | 100.00 | 0.00 | 0.00 to 0.00 | 1.0000 |")
    assert lines[3].startswith("| flickr8k/Bleu_4 | 25.00 | 12.50 | +12.50 |")
    assert lines[4].startswith("| seconds | 20.00 | 20.00 |")


def test_latex_is_escaped() -> None:
    b, a = whole()
    assert "& $-$12.50 &" in to_latex(compare(a, b, names=("A-1", "B-1")))
    assert "A-1 & B-1" in to_latex(compare(a, b, names=("A-1", "B-1")))
    made = to_latex(compare(b, a, names=("CoCa_L", "50 % & CLIP")))
    body = made[made.index(r"\toprule") :]
    assert r"CoCa\_L & 50 \% \& CLIP & gap" in body
    assert r"flickr8k/Bleu\_4 & 25.00" in body
    assert body.count(r"\\") == 4
