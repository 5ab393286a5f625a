"""Everything that wants a GPU, in under nine minutes: `make bench-gpu`. It needs no network and no data.

Each part runs in a process of its own. Its result is written as soon as it ends, so that a run that is cut keeps what
it had. A part that fails does not end the run.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.stand_in import write_flickr8k
from contracap.files import write_text

Status = Literal["passed", "failed", "cut"]

ROOT = Path(__file__).parents[1]
# The command of each part, and its limit in seconds. A part may also use the time that earlier parts left over, so the
# limits are estimates for an H200 with 16 cores. They count 6 s to start, 9 s to draw the weights of L/14 on one core,
# and for open_clip's compiled steps 60 s (B/32) and 90 s (L/14), which is twice what tracing them takes on a CPU.
PARTS: dict[str, tuple[str, int]] = {
    "parity": ("benchmarks parity", 45),
    "train-b-32": ("benchmarks train --rows b-32", 100),
    "train-l-14": ("benchmarks train --rows l-14", 140),
    "largest-batch": ("benchmarks train --rows largest-batch-b-32", 50),
    "captions-beam": ("benchmarks generate --rows l-14-beam-256-bf16 l-14-beam-256-compiled", 45),
    "captions-greedy": ("benchmarks generate --rows l-14-top-k-1-bf16 l-14-top-k-1-compiled", 45),
    "zeroshot": ("benchmarks zeroshot --rows classifier", 25),
    "feeding": ("benchmarks train --rows feeding", 20),
    "fsdp": ("benchmarks train --rows fsdp", 20),
    "tests": ("pytest", 45),
}
IMAGES = 320  # drawn, for the data pipeline
LINES = 12  # of the output of a part that fails


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit status: 0 if all passed, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="Everything that wants a GPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each part, in place of its own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few samples, to try it out on a CPU")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts, deadline = dict[str, dict[str, Any]](), time.monotonic()
    with TemporaryDirectory() as data:
        write_flickr8k(Path(data), images=IMAGES)
        for name in options.parts:
            deadline += options.limit or PARTS[name][1]
            command = build_command(name, out, device=options.device, small=options.small)
            parts[name] = run_part(name, command, out, data=data, deadline=deadline)
            content = {"data": "drawn images and random words, as many as Flickr8k's captions have", "parts": parts}
            write_text(out / "results.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            print(describe(name, parts[name]), flush=True)
    return 0 if all(part["status"] == "passed" for part in parts.values()) else 1


def build_command(name: str, out: Path, *, device: str, small: bool) -> list[str]:
    """Return the command of a part."""
    module, *words = shlex.split(PARTS[name][0])
    if module == "pytest":
        files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
        chosen = ["-m", "gpu"] if device == "cuda" else ["-k", "cpu"]
        # Neither checkers of types, nor warnings of the versions that happen to be installed.
        words = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "default", *chosen, *files]
    else:
        words += ["--device", device, "--json", str(out / f"{name}.json"), *(["--small"] if small else [])]
    return [sys.executable, "-m", module, *words]


def run_part(name: str, command: Sequence[str], out: Path, *, data: str, deadline: float) -> dict[str, Any]:
    """Run a part until its end or the deadline, and return what it gave."""
    log, result, begin = out / f"{name}.log", out / f"{name}.json", time.monotonic()
    result.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"CONTRACAP_DATA": data, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status: Status = "failed" if process.wait(max(deadline - begin, 1)) else "passed"
        except subprocess.TimeoutExpired:
            status = "cut"
        finally:
            end_session(process)
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "command": shlex.join(command),
        "output": log.read_text("utf-8", errors="replace"),
        "result": json.loads(result.read_text("utf-8")) if result.exists() else None,
    }


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started: they would keep memory of the device."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(name: str, part: dict[str, Any]) -> str:
    """Describe a part in lines for a terminal: its rows, or how it failed."""
    lines = [f"{name}: {part['status']} after {part['seconds']} s"]
    for row in (part["result"] or {}).get("rows", []):
        peer = f", peer {row['peer']:.4g}" if row["peer"] else ""
        ratio = f", ratio {row['ratio']:.3g}" if row["ratio"] else ""
        lines.append(f"  {row['work']}: {row['ours']:.4g} {row['unit']}{peer}{ratio}")
    if part["status"] != "passed" or part["result"] is None:  # the last line of pytest is its summary
        output = part["output"].splitlines()
        lines += [f"  {line}" for line in output[-1 if part["status"] == "passed" else -LINES :]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
