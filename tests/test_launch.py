"""The launch files are held to the shell, to YAML and to the tree; none of what they start is there to try them on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracap.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "launch"
FILES = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def shell(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("bash") is None:
        pytest.skip("no bash on this system")
    return subprocess.run(["bash", *arguments, "-c", script], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_launch_file_names_recipes_that_exist_and_resumes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipes = re.findall(r"recipes/[\w-]+\.toml", text)
    assert recipes and "resume=true" in text
    for recipe in recipes:
        load_recipe(ROOT / recipe)
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_shell_reads_the_scripts() -> None:
    (task,) = documents("skypilot.yaml")
    for script in ((FOLDER / "slurm.sbatch").read_text(encoding="utf-8"), task["setup"], task["run"]):
        checked = shell(script, "-n")
        assert checked.returncode == 0, checked.stderr


def slurm_job(folder: Path, commands: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8").replace("cd /shared/contracap", f"cd {folder}")
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=x SLURM_NNODES=1 SLURM_GPUS_ON_NODE=8"
    return shell(f"export PATH={folder}:$PATH {slurm}\n{script}")


def test_a_slurm_job_that_is_asked_to_end_lets_the_run_finish_and_is_requeued(tmp_path: Path) -> None:
    commands = {
        # What Slurm and torchrun do, once the script waits: hand the signal on, wait for the ranks, end with 1.
        "srun": 'trap "sleep 0.3; touch saved; exit 1" USR1; sleep 1; kill -USR1 $PPID\n'
        "while true; do sleep 0.05; done",
        "scontrol": 'if [ "$1" = show ]; then echo first second; else ls saved && echo "$@" > requeued; fi',
    }
    done = slurm_job(tmp_path, commands)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_slurm_job_that_ends_by_itself_is_not_requeued(tmp_path: Path) -> None:
    assert slurm_job(tmp_path, {"srun": "exit 3", "scontrol": '[ "$1" = show ] || touch requeued'}).returncode == 3
    assert not (tmp_path / "requeued").exists()


def test_pods_find_each_other_by_the_names_the_service_gives_them() -> None:
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    machines = job["spec"]["parallelism"]
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", machines)
    options = dict(
        option.removeprefix("--").split("=", 1) for option in container["command"] if option.startswith("--")
    )
    port = container["ports"][0]["containerPort"]
    assert options["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    assert options["nnodes"] == str(machines)
    assert options["nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


AWS = """
import fnmatch, pathlib, shutil, sys
_, command, source, target, *options = sys.argv[1:]
at = lambda place: pathlib.Path(place.replace("s3://", "bucket/"))
excluded = [pattern for option, pattern in zip(options, options[1:]) if option == "--exclude"]
if command == "sync":
    for file in at(source).rglob("*"):
        name = str(file.relative_to(at(source)))
        if file.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in excluded):
            (at(target) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, at(target) / name)
elif command == "rm":
    options = [target, *options]
    excluded = [pattern for option, pattern in zip(options, options[1:]) if option == "--exclude"]
    for file in at(source).rglob("*"):
        if file.is_file() and not any(fnmatch.fnmatch(str(file.relative_to(at(source))), each) for each in excluded):
            file.unlink()
elif source == "-":
    at(target).write_text(sys.stdin.read())
else:
    print(at(source).read_text(), end="")
"""


def test_a_spot_job_goes_on_from_the_whole_checkpoint_that_was_copied(tmp_path: Path) -> None:
    (task,) = documents("skypilot.yaml")
    assert task["resources"]["use_spot"] and load_recipe(ROOT / task["envs"]["RECIPE"]).resume
    run, bucket = task["envs"]["RUN"], task["envs"]["BUCKET"].replace("s3://", "bucket/")
    begins = (
        f"mkdir -p {run}/checkpoints/step-1 {run}/checkpoints/.step-2.partial; ln -s step-1 {run}/checkpoints/last; "
        f"for place in metrics checkpoints/step-1/weights checkpoints/.step-2.partial/weights; do "
        f"echo 1 > {run}/$place; done; exit 3"
    )
    goes_on = f"cat {run}/metrics {run}/checkpoints/last/weights; readlink {run}/checkpoints/last"
    old = tmp_path / bucket / "checkpoints" / "step-0" / "weights"
    old.parent.mkdir(parents=True)
    old.touch()
    for machine, (body, status) in enumerate(((begins, 3), (goes_on, 0))):
        home = tmp_path / str(machine)
        tools = home / ".venv" / "bin"
        tools.mkdir(parents=True)
        (home / "bucket").symlink_to(tmp_path / "bucket")
        (tools / "aws").write_text(f"#!{sys.executable}\n{AWS}")
        (tools / "torchrun").write_text(f"#!/bin/bash\n{body}\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        (tmp_path / bucket).mkdir(parents=True, exist_ok=True)
        if shutil.which("bash") is None:
            pytest.skip("no bash on this system")
        with (home / "said").open("w") as said:  # not a pipe, which the copying in the background would keep open
            done = subprocess.run(
                ["bash", "-c", task["run"]],
                cwd=home,
                env=os.environ | task["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "1"},
                stdout=said,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
        assert done.returncode == status, (home / "said").read_text()
    assert (tmp_path / "1" / "said").read_text() == "1\n1\nstep-1\n"
    assert not old.exists()
    assert not list(tmp_path.rglob("bucket/**/*partial*")) and not list(tmp_path.rglob("bucket/**/last"))
