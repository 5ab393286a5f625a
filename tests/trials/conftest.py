"""Inputs made after public reports of failures. Each test here says what must happen with one of them."""

import os
import runpy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

Trial = Callable[[str], Path]


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The folder of one case, made when it is first asked for. Tests copy what they change.

    The program that makes the cases is `make_inputs.py` in CONTRACAP_TRIALS, else in ../shared/trials.
    """
    root = Path(__file__).parents[2]
    program = Path(os.environ.get("CONTRACAP_TRIALS") or root.parent / "shared" / "trials") / "make_inputs.py"
    if not program.is_file():
        pytest.skip(f"no {program}: set CONTRACAP_TRIALS to the folder of make_inputs.py")
    out = tmp_path_factory.mktemp("trials")

    cases = runpy.run_path(str(program))["CASES"]

    @cache
    def make(case: str) -> Path:
        folder = out / case
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases[case](folder)
        return folder

    return make
