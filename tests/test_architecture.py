import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "contracap"

# What a module (or all of a folder, where it has no row of its own) may import of ours, besides what is OPEN to all.
MAY_IMPORT = {
    "config": "",
    "files": "",
    "progress": "",
    "tokenizer": "",
    "formats": "",
    "image": "formats",
    "page": "",
    "processor": "tokenizer image data.download",
    "losses": "",
    "model.cache": "",
    "model.layout": "",
    "model.linear": "",
    "model.attention": "model.cache model.layout model.linear",
    "model.transformer": "model.cache model.layout model.linear model.attention",
    "model": "model tokenizer",
    "pretrained": "pretrained model tokenizer image processor",
    "data": "data tokenizer image formats page",
    "generation.strategy": "tokenizer",
    "generation.texts": "generation.strategy",
    "generation.phrases": "tokenizer",
    "generation.rules": "generation.strategy generation.texts generation.phrases tokenizer",
    "generation.sampling": "generation.strategy generation.texts generation.rules tokenizer",
    "generation.beam": "generation.strategy generation.texts generation.phrases generation.rules tokenizer",
    "generation.legacy": "generation.strategy generation.texts tokenizer",
    "generation.reranking": "generation.strategy generation.sampling generation.beam tokenizer",
    "generation.choice": "generation.strategy generation.sampling generation.beam generation.legacy "
    "generation.reranking",
    "generation": "generation model tokenizer image processor",
    "evaluation.task": "evaluation pretrained model data generation processor",
    "evaluation": "evaluation model data generation tokenizer image processor",
    "parallel": "parallel losses model",
    "training": "training parallel model pretrained losses data tokenizer image processor",
    "start": "training parallel recipe model pretrained data.remote data.shards image",
    "trainer": "start plan evaluation training parallel recipe model pretrained data",
    "plan": "plan recipe evaluation training parallel losses model data tokenizer image",
    "bulk": "bulk evaluation.features generation model data tokenizer image processor",
    "recipe": "evaluation training parallel model losses data tokenizer image",
    "compare": "compare evaluation.published evaluation.result page",
    "report.curves": "page",
    "report.grids": "report.pictures evaluation.retrieval data page",
    "report.pictures": "evaluation.features data image page",
    "report": "report recipe evaluation training.checkpoint training.metrics generation pretrained model data image "
    "page processor",
    "web": "",
    "demo": "demo web evaluation generation data model tokenizer image processor page",
    "serve": "serve web evaluation generation model image page processor",
    "quickstart": "*",
    "study": "*",
    "cli": "*",
    "__main__": "cli",
}
OPEN = {"config", "files", "progress"}
LAST = {"quickstart", "study", "compare", "report", "cli"}  # only those above import these
ABOVE = {"study", "cli", "__main__"}
FOREIGN = {  # and where they are at home, if anywhere
    "benchmarks": "",
    "torchvision": "",
    "open_clip": "",
    "transformers": "",
    "ray": "bulk.cluster",
    "gradio": "demo cli.demo",
    "fastapi": "demo serve",
    "torchao": "model.quantised",
    "matplotlib": "compare.figure",
}


def row(module: str) -> str:
    """The longest entry of the table that covers a module."""
    covering = [name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}.")]
    return max(covering, key=len) if covering else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def offences(path: Path) -> Iterator[str]:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    if module and not row(module):
        yield f"{path}: no row of the table covers {module}"
    for line, name in imports(path):
        if name.startswith("."):
            yield f"{path}:{line}: {name} is relative; write it out, from contracap on"
        homes = FOREIGN.get(name.split(".")[0])
        if homes is not None and not any(f"{module}.".startswith(f"{home}.") for home in homes.split()):
            yield f"{path}:{line}: imports {name}, which is for {homes or 'nothing here'}"
        target = name.removeprefix("contracap.")
        if not name.startswith("contracap.") or not module or target == "__version__" or row(target) in OPEN:
            continue
        allowed = MAY_IMPORT[row(module)].split()
        inside = any(f"{target}.".startswith(f"{prefix}.") for prefix in allowed)
        if not (inside or "*" in allowed) or (row(target) in LAST - {row(module)} and row(module) not in ABOVE):
            yield f"{path}:{line}: {module} imports {target}; it may import: config files {' '.join(allowed)}"


def test_imports_go_up_the_table_only() -> None:
    found = [offence for path in sorted(PACKAGE.rglob("*.py")) for offence in offences(path)]
    assert not found, "\n".join(found)


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, contracap, contracap.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
