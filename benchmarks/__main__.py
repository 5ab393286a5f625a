"""The command line: `python -m benchmarks NAME [--rows ROW ...] [--json OUT]`."""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.harness import MIN_ROUNDS, Benchmark, Run, UnequalError, table
from benchmarks.machine import release_memory, this_machine
from benchmarks.peers import MissingPeerError
from contracap.evaluation.metrics.java import UnavailableError
from contracap.evaluation.result import list_versions
from contracap.files import try_place, write_text

NAMES = ("data", "train", "generate", "zeroshot", "retrieval", "score", "parity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status: 0, or 1 if nothing could be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m benchmarks", description="Speed and memory next to other tools.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="what to measure; by default all rows")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="not of data, retrieval and score")
    parser.add_argument(
        "--small", action="store_true", help="small models and few samples, to try out the rows for a GPU"
    )
    parser.add_argument("--json", metavar="OUT", help="file for the result")
    options = parser.parse_args(arguments)
    benchmark: Benchmark = importlib.import_module(f"benchmarks.{options.name}").BENCHMARK
    available = benchmark.rows
    if options.device == "cuda":
        if not benchmark.cuda:
            parser.error(f"{options.name} runs on the CPU only: leave out --device")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device")
    if options.device == "cuda" or options.small:
        available = available | benchmark.cuda_rows
    names = options.rows or list(available)
    for name in names:
        if name not in available:
            where = "is for --device cuda" if name in benchmark.cuda_rows else "does not exist"
            parser.error(f"row {name!r} {where}: choose from {', '.join(available)}")
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}")
    run = Run(device=torch.device(options.device), rounds=options.rounds, small=options.small)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        if options.json:
            try_place(options.json)
        for content in measure(benchmark, names, run):
            if options.json:
                text = json.dumps({"command": command, **content}, indent=2, ensure_ascii=False)
                write_text(options.json, f"{text}\n")
    except (UnequalError, UnavailableError, MissingPeerError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(benchmark: Benchmark, names: Sequence[str], run: Run) -> Iterator[dict[str, Any]]:
    """Measure some rows, print each as soon as it is done, and yield the content of the result file so far."""
    machine, rows = {**this_machine(run.device), **benchmark.machine(run)}, []
    for name in names:
        rows.append((benchmark.rows | benchmark.cuda_rows)[name](run))
        print(table(rows[-1:]), flush=True)
        yield {
            "versions": list_versions(),
            "seed": run.seed,
            "samples": benchmark.samples(),
            "figures": {row.work: row.ratio for row in rows},
            "reasons": {row.work: row.reason for row in rows if row.reason},
            "rows": [asdict(row) for row in rows],
            "machine": machine,
        }
        release_memory(run.device)
    if len(rows) > 1:
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    sys.exit(main())
