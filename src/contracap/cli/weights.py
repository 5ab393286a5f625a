"""The commands of weights files."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from contracap.cli.flags import arg
from contracap.cli.messages import say
from contracap.cli.options import AllowCommands, Size, WeightsName, check_outputs, command_line

Start = Annotated[str, arg(metavar="START", help="Weights before fine-tuning, as WEIGHTS of other commands.")]
FineTuned = Annotated[str, arg(metavar="FINETUNED", help="Weights after it, of the same model.")]


def inspect(
    file: WeightsName, /, *, size: Annotated[str | None, arg(metavar="NAME", help="Size to compare with.")] = None
) -> None:
    """Print what a weights file holds, and how it differs from a size."""
    from contracap.model.sizes import SIZES, find_size
    from contracap.pretrained import find_weights
    from contracap.pretrained.errors import printable
    from contracap.pretrained.fit import at_own_lengths, differences, family_of, find_nonfinite, match_sizes
    from contracap.pretrained.shapes import shapes_of
    from contracap.pretrained.tensors import METADATA_KEY, read_tensors
    from contracap.pretrained.weights import OUR_NAME

    path = find_weights(file)
    tensors, metadata = read_tensors(path)
    ours, shapes = METADATA_KEY in metadata or OUR_NAME in tensors, shapes_of(tensors)
    sizes = [size] if size else match_sizes(shapes, ours=ours)
    if not sizes:
        fit = f"none fits exactly; --size NAME compares with one of {', '.join(SIZES)}"
    else:
        config = at_own_lengths(find_size(sizes[0]), shapes, ours=ours)
        problems = "; ".join(differences(config, shapes, ours=ours))
        fit = f"{' or '.join(sizes)}: {problems or 'every name and shape fits'}"
        if config != find_size(sizes[0]):
            vision = config.vision
            fit += (
                f", with images of {vision.image_size} pixels, patches of {vision.patch_size} and "
                f"{config.text.context} tokens of text"
            )
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.split(".")[0]] += tensor.numel()
    print(f"file           {path}")
    print(f"layout         {'contracap' if ours else 'open_clip'}")
    print(f"family         {family_of(shapes)}")
    print(f"tensors        {len(tensors)}, {', '.join(sorted({str(tensor.dtype) for tensor in tensors.values()}))}")
    if broken := find_nonfinite(tensors):
        print(f"not finite     {printable(broken)}: these weights cannot be used")
    print(f"parameters     {parts.total() / 1e6:.2f} million")
    for part, count in parts.most_common():
        print(f"  {printable(part):12} {count / 1e6:.2f}")
    if METADATA_KEY in metadata:
        print(f"configuration  {printable(metadata[METADATA_KEY])}")
    print(f"size           {printable(fit)}")


def show_sizes() -> None:
    """List the sizes and the released weights that can be loaded by name."""
    import torch

    from contracap.model.coca import CoCa
    from contracap.model.sizes import PURPOSES, SIZES
    from contracap.pretrained.find import RELEASED, size_of_release

    print(f"{'size':19} {'million':>7} {'pixels':>6} {'patch':>5} {'tokens':>6}  {'what it is':36} released weights")
    for name, config in SIZES.items():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in CoCa(config).parameters()) / 1e6
        vision, released = config.vision, [each for each in RELEASED if size_of_release(each) == name]
        print(
            f"{name:19} {parameters:7.1f} {vision.image_size:6} {vision.patch_size:5} {config.text.context:6}  "
            f"{PURPOSES[name]:36} {', '.join(released)}".rstrip()
        )


def convert(
    file: WeightsName,
    out: Annotated[Path, arg(metavar="OUT", help="A folder for open_clip, a .safetensors file for contracap.")],
    /,
    *,
    to: Annotated[
        Literal["open_clip", "contracap"] | None,
        arg(help="Layout to write; the default is the one that the file does not have."),
    ] = None,
    size: Size = None,
) -> None:
    """Write weights in the other layout, bit-equal.

    open_clip 3.3.0 computes the same as contracap with models that were trained with text.cls_mask = "legacy", the
    full vocabulary of 49,408 tokens, and a shared pooler without positions, such as coca_ViT-B-32 and coca_ViT-L-14.
    The weights of other models are written too, and how far open_clip's results differ is printed. A MaMMUT is written
    as LAION's fork of open_clip, open_clip_mammut, reads it.
    """
    from contracap.pretrained import read_weights, save_open_clip, write_weights
    from contracap.pretrained.fidelity import measure_open_clip_changes
    from contracap.pretrained.find import ENDINGS, OPEN_CLIP_WEIGHTS
    from contracap.pretrained.open_clip_config import list_open_clip_problems

    found = read_weights(file, size=size)
    to = to or ("open_clip" if found.layout == "contracap" else "contracap")
    written = out if to == "contracap" else out / OPEN_CLIP_WEIGHTS
    if written.exists() and written.samefile(found.path):
        raise ValueError(f"{written} is the file to convert: give another name for the result")
    if to == "contracap":
        _require_safetensors(out)
        write_weights(out, model=found.model, image=found.image, state=found.state)
    else:
        if out.name.endswith(ENDINGS) or out.is_file():
            raise ValueError(f"open_clip's layout is a folder of two files, and {out} names a file: give a folder")
        save_open_clip(out, model=found.model, image=found.image, state=found.state)
        for problem in list_open_clip_problems(found.model):
            say(f"contracap: warning: open_clip 3.3.0 cannot load {problem}", to_stderr=True)
        for what, change in measure_open_clip_changes(found.model, found.state).items():
            moved = f"{what} change by {change.mean:.4f} on average (at most {change.largest:.4f})"
            say(f"contracap: warning: without that key, {moved} on sample inputs", to_stderr=True)
    say(f"{found.path} ({found.layout}) -> {out} ({to})")


def mix(
    start: Start,
    finetuned: FineTuned,
    /,
    *,
    alpha: Annotated[float, arg(metavar="X", help="Share of FINETUNED, from 0 to 1.")] = 0.5,
    out: Annotated[Path, arg(metavar="FILE.safetensors", help="File for the mixture.")],
) -> None:
    """Average the weights before and after fine-tuning, for a model that has much of both skills (WiSE-FT).

    `contracap weights sweep` shows which alpha is best.
    """
    from contracap.pretrained import find_weights, read_weights, write_weights
    from contracap.pretrained.mixing import mix_weights

    _require_safetensors(out)
    check_outputs([find_weights(start), find_weights(finetuned)], out=out)
    mixed = mix_weights(read_weights(start), read_weights(finetuned), alpha=alpha)
    write_weights(out, model=mixed.model, image=mixed.image, state=mixed.state)
    say(f"{1 - alpha:g} of {start} and {alpha:g} of {finetuned} -> {out}")


def sweep(
    start: Start,
    finetuned: FineTuned,
    /,
    *,
    tasks: Annotated[Path, arg(metavar="TASKS.toml", help="Both skills: a file with a table [tasks.NAME] for each.")],
    alphas: Annotated[tuple[float, ...], arg(metavar="X", help="Shares of FINETUNED, rising from 0 to 1.")] = tuple(
        tenths / 10 for tenths in range(11)
    ),
    new: Annotated[
        str | None, arg(metavar="TASK/FIGURE", help="The skill that was trained; the default is the first CIDEr.")
    ] = None,
    kept: Annotated[
        str | None,
        arg(metavar="TASK/FIGURE", help="The skill to keep; the default is the first text_to_image_recall@5 or acc1."),
    ] = None,
    out: Annotated[Path, arg(metavar="DIR", help="Folder for sweep.json, sweep.svg and sweep.png.")] = Path("sweep"),
    device: Annotated[str, arg(metavar="NAME", help="cpu, cuda or cuda:1; auto is the GPU if there is one.")] = "auto",
    allow_commands: AllowCommands = False,
) -> None:
    """Measure the mixtures of the weights before and after fine-tuning, and draw one skill against the other."""
    from contracap.apps.figures import require_matplotlib
    from contracap.apps.sweep import sweep as measure
    from contracap.apps.sweep import write_sweep
    from contracap.config import load_toml
    from contracap.data.patterns import require_consent
    from contracap.evaluation.config import TasksConfig
    from contracap.files import require_folder
    from contracap.pretrained import read_weights
    from contracap.pretrained.devices import find_device

    require_matplotlib()
    require_folder(out)
    wanted = load_toml(tasks, TasksConfig).tasks
    for config in wanted.values():
        require_consent(config.data, allow_commands)
    ends = read_weights(start), read_weights(finetuned)
    found = measure(*ends, wanted, alphas, device=find_device(device), new=new, kept=kept)
    write_sweep(found, out, command=command_line())
    print(f"{'alpha':>6}  {found.new:>28}  {found.kept:>28}")
    for alpha, gained, left in zip(alphas, found.values(found.new), found.values(found.kept), strict=True):
        print(f"{alpha:6g}  {gained:28.4f}  {left:28.4f}{'  <- knee' if alpha == found.knee else ''}")
    say(f"the curve: {out / 'sweep.svg'}")


def _require_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} does not end in .safetensors, as a weights file of contracap must")
