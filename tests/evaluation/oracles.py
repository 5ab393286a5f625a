"""The reference tools that figures are compared to; in CI they must be there."""

import ast
import importlib
import json
import os
from importlib.resources import files
from types import ModuleType
from typing import Any

import pytest


def reference(name: str) -> ModuleType:
    """A module of a reference tool; without it the test is skipped."""
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)


def clip_benchmark_table(name: str) -> dict[str, list[str]]:
    """A JSON file of clip_benchmark's data sets."""
    reference("clip_benchmark")
    return json.loads((files("clip_benchmark") / "datasets" / name).read_text(encoding="utf-8"))


def clip_benchmark_literal(module: str, name: str) -> Any:
    """What is assigned to a name anywhere in a module of clip_benchmark's data sets, which need not be importable."""
    reference("clip_benchmark")
    source = (files("clip_benchmark") / "datasets" / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return ast.literal_eval(node.value)
    raise LookupError(name)
