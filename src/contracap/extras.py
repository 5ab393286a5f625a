"""Packages that are installed on request only: the extras of pyproject.toml."""

from importlib.util import find_spec


def require_extra(extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Raises: ImportError: naming the first that is missing, and the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: pip install 'contracap[{extra}]'")
