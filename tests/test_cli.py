import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import contracap
from contracap.cli.messages import fail
from contracap.data.shards import write_shard
from contracap.evaluation.result import Result
from contracap.pretrained import read_weights
from tests.conftest import Run
from tests.image_samples import encode


def picture(shade: int) -> bytes:
    return encode(Image.new("RGB", (40, 32), (shade, 255 - shade, 90)), "JPEG")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        (folder / f"{index}.jpg").write_bytes(picture(80 * index))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, records = tmp_path_factory.mktemp("shards"), []
    for index in range(12):
        members = {"jpg": picture(20 * index), "txt": f"a flat image {index}".encode(), "cls": b"%d" % (index % 2)}
        records.append((f"{index:03}", members))
    write_shard(folder / "0.tar", records)
    return folder


def test_help_lists_the_verbs_without_torch() -> None:
    program = (
        "import sys; sys.argv = ['contracap', '--help']\n"
        "from contracap.cli import main\n"
        "try: main()\n"
        "finally: sys.exit(3 if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "torch was imported"
    assert all(verb in done.stdout for verb in ("quickstart", "train", "evaluate", "caption", "weights"))


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["evaluate"], ["quickstart", "--out"]])
def test_a_call_that_cannot_be_parsed_exits_with_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_a_verb_that_does_not_exist_is_one_line_with_the_nearest(run: Run) -> None:
    nearest = {
        "captoin": "caption",
        "weights convrt": "convert",
        "bogus": "quickstart",
        "bench": "python -m benchmarks",
    }
    for call, word in nearest.items():
        status, out, err = run(*call.split())
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err


def test_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"contracap {contracap.__version__}\n", "")


def test_help_shows_no_default_that_says_nothing(run: Run) -> None:
    for verb in ("caption", "evaluate", "shards make", "bulk caption", "score", "serve"):
        status, out, _ = run(*verb.split(), "--help")
        text = " ".join(out.replace("│", " ").split())
        assert status == 0 and text.startswith("usage: contracap")
        assert "(default: )" not in text and "None" not in text and "(default: '')" not in text, verb


def test_an_error_keeps_its_white_space_and_shows_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    fail("a  b\tc\nd \x1b[31m")
    assert capsys.readouterr().err == "contracap: error: a  b\\tc\\nd \\x1b[31m\n"


def test_wrong_input_is_one_line_and_status_1(run: Run, weights: Path, shards: Path, tmp_path: Path) -> None:
    empty, recipe = tmp_path / "empty", tmp_path / "recipe.toml"
    empty.mkdir()
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    recipe.write_text('size = "tiny"\nsteps = 3\nout = "run"\nstep = 4\n[data]\ntrain = "x"\nbatch_size = 4\n')
    evaluate = ["evaluate", weights, "--data", shards, "--task"]
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[tasks.pairs]\ntask = "retrieval"\ndata = "none"\n')
    calls: list[tuple[list[object], str]] = [
        (["train", tmp_path / "none.toml"], "no such file"),
        (["train", recipe], "unknown key 'step'; did you mean 'steps'?"),
        (["caption", tmp_path / "none.safetensors", empty], "no images in the folder"),
        (["caption", tmp_path / "none.safetensors", tmp_path / "none.jpg"], "no such image or folder"),
        (["caption", weights], "nothing to read"),
        (["weights", "inspect", tmp_path / "none"], "no weights at"),
        (["weights", "inspect", tmp_path / "other.pt"], "it holds epoch"),
        (["weights", "inspect", weights, "--size", "huge"], "unknown size 'huge'"),
        (["weights", "convert", weights, tmp_path / "file.bin"], "give a folder"),
        (["weights", "convert", weights, tmp_path / "file.bin", "--to", "contracap"], ".safetensors"),
        ([*evaluate, "zeroshot"], "`classes` is missing"),
        ([*evaluate, "zeroshot", "--classes", tmp_path / "none.json"], "No such file or directory"),
        (["evaluate", weights, "--task", "retrieval", "--data", empty], "no shards"),
        (["evaluate", weights], "say what to measure: --task retrieval"),
        (["evaluate", weights, "--task", "retrieval", "--tasks", tasks], "one of them"),
        (
            ["evaluate", weights, "--tasks", tasks, "--set", "width=3", "--no-caption-lines"],
            "--no-caption-lines, --set",
        ),
        (["evaluate", weights, "--tasks", tasks], "task pairs: no such shard or folder"),
    ]
    for arguments, message in calls:
        status, out, err = run(*arguments)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("contracap: error: ") and err.count("\n") == 1 and message in err, err


def test_quiet_leaves_results_and_errors_alone(run, weights, pictures, shards, tmp_path, monkeypatch) -> None:
    """Also on a terminal, where there are bars, and with something skipped."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(9))
    (folder / "a.mp4").touch()
    (folder / "a.txt").write_text("a")
    monkeypatch.setattr("tqdm.std.DisableOnWriteError.isatty", lambda self: True, raising=False)
    silent: list[list[object]] = [
        ["caption", weights, folder, "--out", tmp_path / "c.csv", "--strategy", "greedy"],
        ["shards", "make", folder, "--out", tmp_path / "made", "--workers", 0],
        ["shards", "index", shards, "--out", tmp_path, "--workers", 0],
        ["shards", "show", shards, "--out", tmp_path / "page.html"],
        ["weights", "convert", weights, tmp_path / "open_clip"],
    ]
    for verb in silent:
        assert run(*verb, "--quiet") == (0, "", ""), verb
    status, out, err = run("classify", weights, folder, "--labels", "a", "b", "--quiet")
    assert (status, out.count("\n"), err) == (0, 1, "")
    status, out, err = run("evaluate", weights, "--task", "retrieval", "--data", shards, "--quiet")
    assert (status, err) == (0, "") and "recall" in out
    assert "images/s" in run("embed", weights, folder, "--out", tmp_path / "f.npz")[2]  # --quiet is of its call alone


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        *((verb, signal.SIGINT) for verb in ("classify", "embed", "evaluate", "shards show", "shards index")),
        ("caption", signal.SIGTERM),
    ],
)
def test_an_interrupted_verb_says_what_the_same_command_does(
    run: Run,
    weights: Path,
    pictures: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    number: int,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    places = (
        "apps.bulk.rows.normalise",
        "apps.bulk.embedding.require_finite",
        "evaluation.task.evaluate_retrieval",
        "data.survey.parse_record",
        "data.indexing._describe_file",
    )
    for place in places:
        monkeypatch.setattr(f"contracap.{place}", lambda *_, **__: signal.raise_signal(number))
    arguments: list[object] = {
        "caption": [weights, pictures, "--out", tmp_path / "c.csv"],
        "classify": [weights, pictures, "--labels", "a", "b"],
        "embed": [weights, pictures, "--out", tmp_path / "e.npz"],
        "evaluate": [weights, "--task", "retrieval", "--data", shards],
        "shards show": [shards, "--out", tmp_path / "page.html"],
        "shards index": [shards, "--out", tmp_path, "--workers", 0],
    }[verb]
    status, out, err = run(*verb.split(), *arguments)
    assert (status, out, err.count("\n")) == (128 + number, "", 1)
    assert "interrupted" in err and ("the same command" in err or "run the command again" in err)
    assert signal.getsignal(signal.SIGTERM) is before


INTERRUPTED_VERBS = {
    "twice at once": ("try: send(); send()\n    finally: send()", signal.SIGTERM),
    "during an import": ("import interrupting", signal.SIGINT),
    "in an error of its own": ("try: send()\n    finally: threading.Lock().release()", signal.SIGINT),
    "again, as it hangs": ("try: send()\n    finally: time.sleep(1.1); send(); time.sleep(600)", signal.SIGTERM),
}


@pytest.mark.parametrize(("verb", "number"), INTERRUPTED_VERBS.values(), ids=INTERRUPTED_VERBS)
def test_signals_end_a_verb_in_one_line_wherever_they_arrive(tmp_path: Path, verb: str, number: int) -> None:
    (tmp_path / "interrupting.py").write_text(
        f"import signal, time; signal.raise_signal({int(number)}); time.sleep(600)"
    )
    program = (
        "import signal, sys, threading, time; import contracap.cli as cli\n"
        f"def send(): signal.raise_signal({int(number)})\n"
        f"def verb():\n    {verb}\n"
        "cli.COMMANDS = {'verb': verb}; sys.exit(cli.main(['verb']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "contracap: error: interrupted\n")


@pytest.mark.parametrize(
    ("verb", "flag", "kind"),
    [
        ("serve", "--port", "an integer"),
        ("serve", "--timeout-s", "a number"),
        ("caption", "--limit", "an integer"),
    ],
)
def test_a_number_that_is_none_is_named_with_its_flag(run: Run, verb: str, flag: str, kind: str) -> None:
    status, _, err = run(verb, "WEIGHTS", flag, "many")
    assert status == 2 and flag in err and f"'many' is not {kind}" in err


def test_training_that_has_not_begun_ends_at_once_by_sigterm() -> None:
    program = (
        "import signal; from contracap.training.shutdown import exit_on_signal as at_once\n"
        "with at_once(): signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_an_error_of_our_own_making_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Path:
        return Path({}[name])

    monkeypatch.setattr("contracap.pretrained.find_weights", broken)
    with pytest.raises(KeyError):
        run("weights", "inspect", "x")


def test_caption_prints_a_line_for_each_picture(run: Run, weights: Path, pictures: Path, tmp_path: Path) -> None:
    status, out, _ = run("caption", weights, pictures, pictures / "1.jpg", "--json", tmp_path / "result.json")
    assert status == 0
    model, processor = contracap.load(weights)
    paths = [pictures / name for name in ("0.jpg", "1.jpg", "2.jpg", "1.jpg")]
    captions = contracap.Captioner(model, processor)(paths)
    lines = [f"{path}\t{' '.join(caption.text.split())}" for path, caption in zip(paths, captions, strict=True)]
    assert out == "".join(f"{line}\n" for line in lines)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["samples"] == 4
    assert [row["caption"] for row in result["captions"]] == [caption.text for caption in captions]


def test_strategy_and_its_settings_reach_the_decoding(run, weights, pictures, shards, tmp_path, monkeypatch) -> None:
    model, processor = contracap.load(weights)
    greedy = contracap.Captioner(model, processor)([pictures / "0.jpg"], contracap.Greedy())[0]
    assert greedy.text != contracap.Captioner(model, processor)([pictures / "0.jpg"])[0].text
    status, out, _ = run("caption", weights, pictures / "0.jpg", "--strategy", "greedy")
    assert status == 0 and out == f"{pictures / '0.jpg'}\t{' '.join(greedy.text.split())}\n"
    alone = ["--set", "width=1", "length_penalty=0"]
    run("caption", weights, pictures / "0.jpg", "--json", tmp_path / "sum.json", *alone)
    (row,) = json.loads((tmp_path / "sum.json").read_text())["captions"]
    assert row["score"] == pytest.approx(greedy.log_probability, rel=1e-5)
    made = []
    monkeypatch.setattr(
        "contracap.evaluation.task.evaluate_captioning",
        lambda *_, strategy, **__: made.append(strategy) or Result(figures={"CIDEr": 1.0}, samples=1),
    )
    settings = ["--set", "width=3", "length_penalty=0.5"]
    run("evaluate", weights, "--task", "captioning", "--data", shards, "--strategy", "beam", *settings)
    assert made == [contracap.BeamSearch(width=3, length_penalty=0.5)]
    evaluate = ["evaluate", weights, "--task", "captioning", "--data", shards]
    for verb, wrong in (
        *((["caption", weights, pictures], ["--set", word]) for word in ("width=0", "width", "widht=3")),
        *((evaluate, words) for words in (["--set", "widht=3"], ["--strategy", "beem"])),
    ):
        status, out, err = run(*verb, *wrong)
        assert (status, out, err.count("\n")) == (1, "", 1) and wrong[1].partition("=")[0] in err


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["caption", "W", "x.jpg", "--strategy", "sample"], "top_p"),
        (["caption", "W", "x.jpg", "--strategy", "rerank"], "of.temperature"),
        (["evaluate", "W", "--task", "vqa", "--data", "x"], "rules.banned"),
        (["serve", "W"], "width"),
    ],
)
def test_set_help_lists_the_settings_of_the_strategy(run: Run, arguments: list[str], setting: str) -> None:
    status, out, err = run(*arguments, "--set", "help")
    assert (status, err) == (0, "") and setting in out.splitlines()


def test_a_caption_that_holds_line_breaks_stays_on_its_line(run, weights, pictures, monkeypatch) -> None:
    monkeypatch.setattr("contracap.tokenizer.Tokenizer.decode", lambda *_: "a\tb\r\nc\x0bd\x1ce\x85f\u2028g\n")
    _, out, _ = run("caption", weights, pictures / "0.jpg")
    assert out == f"{pictures / '0.jpg'}\ta b c d e f g\n"


def test_an_unreadable_picture_stops_no_other(run: Run, weights: Path, pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 cut")
    status, out, err = run("caption", weights, pictures / "0.jpg", broken, pictures / "2.jpg")
    assert status == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(pictures / "0.jpg"), str(pictures / "2.jpg")]
    summary, error = err.splitlines()
    assert summary.startswith("2 captions in ") and summary.endswith("1 cannot be used") and str(broken) in error


def test_evaluate_writes_every_figure_or_its_reason(run: Run, weights: Path, shards: Path, tmp_path: Path) -> None:
    classes, result_file = tmp_path / "classes.json", tmp_path / "result.json"
    classes.write_text('{"classes": ["green", "red"]}')
    wanted = {
        "retrieval": {f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)},
        "zeroshot": {"acc1", "acc5", "mean_per_class_recall"},
        "captioning": {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR", "SPICE"},
    }
    for task, figures in wanted.items():
        more = {"zeroshot": ["--classes", classes], "captioning": ["--strategy", "greedy"]}.get(task, [])
        status, out, err = run("evaluate", weights, "--task", task, "--data", shards, "--json", result_file, *more)
        assert status == 0, err
        result = json.loads(result_file.read_text())
        told = {line.split()[0] for line in out.splitlines()} - {"images", "captions"}  # how many were measured
        assert set(result["figures"]) == figures == told
        assert result.keys() >= {"command", "versions", "seed", "samples", "figures"} and result["samples"] == 12
        assert {name for name, value in result["figures"].items() if value is None} == set(result["reasons"])


def test_a_file_of_tasks_gives_the_figures_of_each_under_its_name(run, weights, shards, tmp_path) -> None:
    tasks, result = tmp_path / "tasks.toml", tmp_path / "result.json"
    tasks.write_text(
        f'[tasks.first]\ntask = "retrieval"\ndata = "{shards}"\n[tasks.second]\ntask = "retrieval"\ndata = "{shards}"\n'
    )
    assert run("evaluate", weights, "--tasks", tasks, "--json", result)[0] == 0
    found = json.loads(result.read_text())["figures"]
    assert run("evaluate", weights, "--task", "retrieval", "--data", shards, "--json", result)[0] == 0
    alone = json.loads(result.read_text())["figures"]
    assert found == {f"{name}/{figure}": value for name in ("first", "second") for figure, value in alone.items()}


def test_inspect_finds_the_size_and_tells_differences(run: Run, weights: Path) -> None:
    status, out, _ = run("weights", "inspect", weights)
    assert status == 0
    assert re.search(r"layout +contracap", out) and re.search(r"size +tiny: every name and shape fits", out)
    _, out, _ = run("weights", "inspect", weights, "--size", "ViT-B-32")
    assert re.search(r"size +ViT-B-32: .*missing.*extra.*should be", out)


def test_a_reader_that_has_gone_costs_neither_the_result_nor_a_traceback(run: Run, tmp_path: Path, monkeypatch) -> None:
    recipe, result = tmp_path / "recipe.toml", tmp_path / "plan.json"
    recipe.write_text('size = "tiny"\nsteps = 200\nout = "none"\n[data]\ntrain = "none"\nbatch_size = 64\n')
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert run("plan", recipe, "--gpus", "1", "--gpu", "l40s", "--json", result) == (141, "", "")
    assert json.loads(result.read_text())["samples"] == 200 * 64


def test_convert_there_and_back_is_bit_equal(run: Run, weights: Path, tmp_path: Path) -> None:
    status, _, err = run("weights", "convert", weights, tmp_path / "theirs")
    assert status == 0 and "cannot load" in err
    assert json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())["model_cfg"]
    assert re.search(r"size +tiny: every", run("weights", "inspect", tmp_path / "theirs")[1])
    assert run("weights", "convert", tmp_path / "theirs", tmp_path / "back.safetensors")[0] == 0
    before, after = read_weights(weights), read_weights(tmp_path / "back.safetensors")
    assert before.model == after.model and before.state.keys() == after.state.keys()
    assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)


def test_train_runs_a_recipe_with_overrides(run: Run, shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'size = "tiny"\nsteps = 100\nout = "none"\noptimizer.warmup_steps = 1\n'
        f'[data]\ntrain = "{shards}"\nbatch_size = 4\n'
    )
    status, out, err = run("train", recipe, f"out={tmp_path / 'run'}", "steps=2", "device=cpu")
    assert status == 0, err
    assert Path(out.strip()).exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run("caption", tmp_path / "run" / "checkpoints" / "last", tmp_path / "none.jpg")[0] == 1
    assert run("weights", "inspect", tmp_path / "run" / "checkpoints" / "last")[0] == 0


def test_everything_named_by_the_package_is_there() -> None:
    assert dir(contracap) == contracap.__all__ == sorted(contracap.__all__)
    assert all(getattr(contracap, name) for name in contracap.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Captionr'"):
        contracap.Captionr  # noqa: B018


@pytest.mark.parametrize(
    ("call", "choices"),
    [
        ("caption W x --format sidecar --ext .foo", ("'.txt'", "'.caption'")),
        ("caption W x --format xml", ("'sidecar'", "'jsonl'", "'csv'", "'parquet'", "'metadata'")),
        ("bulk caption W x --out o --embed --dtype int8", ("'float32'", "'float16'")),
        ("score x --tokenizer y", ("'java'", "'python'")),
        ("evaluate W --task None", ("'retrieval'", "'captioning'", "'zeroshot'", "'vqa'")),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(run: Run, call: str, choices: tuple[str, ...]) -> None:
    status, out, err = run(*call.split())
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", out + err).split())
    assert status == 2 and f"({', '.join(choices)})" in said and "'None'," not in said


def test_a_server_keeps_few_kernels(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert run("serve", tmp_path / "none", "--port", "0")[0] == 1
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


@pytest.mark.parametrize(
    "call",
    [
        "quickstart --out {}",
        "train {}",
        "study {}",
        "plan {} --gpus 1 --gpu l40s",
        *("evaluate {} --task retrieval --data x", "evaluate x --task retrieval --data {}"),
        *("evaluate x --tasks {}", "evaluate x --task zeroshot --data x --classes {}", "evaluate x --predictions {}"),
        *("score {}", "score x --references {}", "score x --clipscore {}", "score x --images {}"),
        *("compare x {}", "compare x y --out {}", "report {}"),
        *("caption {} x", "caption x y {} --format sidecar --overwrite", "caption x y --out {}"),
        *("classify x {} --labels a", "embed x y --out {}", "demo x --pictures {}", "serve {}"),
        *("bulk caption x {} --out y", "bulk embed x y --out {}"),
        *("shards make {} --out x", "shards make x --out y --pictures {}", "shards index x --out {}", "shards show {}"),
        *("weights inspect {}", "weights convert x {}"),
    ],
)
def test_an_empty_path_is_refused_by_every_verb(run: Run, call: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*("" if word == "{}" else word for word in call.split()))
    assert (status, out, err.count("\n")) == (1, "", 1) and "is empty" in err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("caption W x --strategy beam --set width=1000000000", "width must be at most"),
        ("caption W x --strategy greedy --set max_tokens=1000000000", "max_tokens must be at most"),
        ("caption W x --batch-size 1000000000", "--batch-size must be at most"),
        ("caption W x --workers 1000000000", "--workers must be at most"),
        ("caption W x --limit 10000000000000000000", "--limit must be at most"),
        ("embed W x --out e.npz --batch-size 1000000000", "--batch-size must be at most"),
        ("bulk embed W x --out o --workers 1000000000", "workers must be at most"),
        ("shards make x --out o --workers 1000000000", "--workers must be at most"),
        ("shards show x --samples 1000000000", "samples must be at most"),
        ("evaluate W --task retrieval --data {0..9999}{0..9999}.tar", "stands for more than 10,000,000 names"),
        ("serve W --max-batch 1000000000", "max_batch must be at most"),
    ],
)
def test_numbers_beyond_any_use_are_refused(run, weights, tmp_path, monkeypatch, arguments: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*(str(weights) if word == "W" else word for word in arguments.split()))
    assert status == 1 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
