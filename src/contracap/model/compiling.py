"""Requirements of `torch.compile`."""

import os
import shutil
import sys

import torch

DEFAULTS = {"darwin": "clang++", "win32": "cl"}  # elsewhere g++


class CompilerError(ValueError):
    """A model that cannot be compiled here."""


def require_compiler() -> None:
    """Look for the C++ compiler that torch will call, before weights are read and code is traced.

    Raises: CompilerError: if there is none. On a GPU torch compiles otherwise, and nothing is looked for.
    """
    compiler = os.environ.get("CXX") or DEFAULTS.get(sys.platform, "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise CompilerError(
            f"compiled code needs a C++ compiler, and there is no {compiler}: install one (Debian: apt install g++), "
            "name one in the environment variable CXX, or do not compile"
        )


def allow_recompilations(count: int) -> None:
    """Raise torch's limit of compiled versions of a function to `count`; beyond it, torch runs the function uncompiled
    without a warning."""
    import torch._dynamo  # takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)
