import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "contracap"

# What a module (or all of a folder, where it has no row of its own) may import of ours, besides what is OPEN to all.
MAY_IMPORT = {
    "config": "",
    "files": "",
    "progress": "",
    "wording": "",
    "extras": "",
    "precision": "",
    "tokenizer": "",
    "formats": "",
    "image_files": "formats",
    "images": "image_files",
    "download": "",
    "processor": "tokenizer image_files images download",
    "losses": "",
    "model.cache": "",
    "model.packing": "",
    "model.onednn": "",
    "model.attention": "model.cache model.packing",
    "model.transformer": "model.cache model.packing model.attention",
    "model": "model tokenizer",
    "pretrained": "pretrained model tokenizer image_files images processor",
    "data": "data download tokenizer image_files images formats",
    "parallel.process_group": "",
    "parallel": "parallel losses model",
    "generation.strategy": "tokenizer",
    "generation.texts": "generation.strategy",
    "generation.phrases": "tokenizer",
    "generation.constraints": "generation.strategy generation.texts generation.phrases tokenizer",
    "generation.sampling": "generation.strategy generation.texts generation.constraints tokenizer",
    "generation.beam": "generation.strategy generation.texts generation.phrases generation.constraints tokenizer",
    "generation.legacy": "generation.strategy generation.texts tokenizer",
    "generation.reranking": "generation.strategy generation.sampling generation.beam tokenizer",
    "generation.registry": "generation.strategy generation.sampling generation.beam generation.legacy "
    "generation.reranking",
    "generation": "generation model tokenizer image_files images processor",
    "evaluation.metrics": "evaluation.metrics evaluation.features evaluation.distributed parallel.process_group model "
    "processor",
    "evaluation.task": "evaluation parallel.process_group pretrained model data generation processor",
    "evaluation": "evaluation parallel.process_group model data generation tokenizer image_files images processor",
    "training.recipe": "training evaluation parallel model losses data",
    "training.run": "training evaluation parallel data",
    "training.trainer": "training evaluation parallel model pretrained data images",
    "training": "training parallel model pretrained losses data tokenizer image_files images processor",
    "apps": "apps training evaluation generation parallel losses pretrained model data download tokenizer image_files "
    "images formats processor",
    "cli": "*",
    "__main__": "cli",
}
OPEN = {"config", "extras", "files", "precision", "progress", "wording"}
FOREIGN = {  # and where they are at home, if anywhere
    "benchmarks": "",
    "torchvision": "",
    "open_clip": "",
    "transformers": "",
    "ray": "apps.bulk.cluster apps.bulk.ray_session",
    "gradio": "apps.demo cli.demo",
    "fastapi": "apps.demo apps.serve",
    "prometheus_client": "apps.serve",
    "matplotlib": "apps.figures apps.compare.figure",
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
        if not (inside or "*" in allowed):
            yield f"{path}:{line}: {module} imports {target}; it may import: config files {' '.join(allowed)}"


def test_imports_go_up_the_table_only() -> None:
    found = [offence for path in sorted(PACKAGE.rglob("*.py")) for offence in offences(path)]
    assert not found, "\n".join(found)
