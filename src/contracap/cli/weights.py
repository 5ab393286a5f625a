"""The verbs of weights files."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from contracap.cli.options import Size, WeightsName

if TYPE_CHECKING:
    from contracap.model.coca import CoCaConfig


def inspect(
    file: WeightsName, /, *, size: Annotated[str | None, arg(metavar="NAME", help="a size to compare with")] = None
) -> None:
    """Print what a weights file holds, and how it differs from a size."""
    from contracap.model.sizes import SIZES, find_size
    from contracap.model.weights import key_differences, meta_state, shapes_of, to_open_clip
    from contracap.pretrained import METADATA_KEY, find_weights, read_tensors

    path = find_weights(file)
    tensors, metadata = read_tensors(path)
    ours = METADATA_KEY in metadata

    def differences(config: "CoCaConfig") -> list[str]:
        expected = meta_state(config)
        return key_differences(shapes_of(tensors), shapes_of(expected if ours else to_open_clip(expected, config)))

    if size is None:
        size = next((name for name, config in SIZES.items() if not differences(config)), None)
    if size is None:
        fit = f"none fits exactly; --size NAME compares with one of {', '.join(SIZES)}"
    else:
        fit = f"{size}: {'; '.join(differences(find_size(size))) or 'every name and shape fits'}"
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.split(".")[0]] += tensor.numel()
    print(f"file           {path}")
    print(f"layout         {'contracap' if ours else 'open_clip'}")
    print(f"tensors        {len(tensors)}, {', '.join(sorted({str(tensor.dtype) for tensor in tensors.values()}))}")
    print(f"parameters     {parts.total() / 1e6:.2f} million")
    for part, count in parts.most_common():
        print(f"  {part:12} {count / 1e6:.2f}")
    if ours:
        print(f"configuration  {metadata[METADATA_KEY]}")
    print(f"size           {fit}")


def convert(
    file: WeightsName,
    out: Annotated[Path, arg(metavar="OUT", help="a folder for open_clip, a .safetensors file for contracap")],
    /,
    *,
    to: Annotated[
        Literal["open_clip", "contracap"] | None,
        arg(help="the layout to write; by default the one the file does not have"),
    ] = None,
    size: Size = None,
) -> None:
    """Write weights in the other layout, bit-equal."""
    from contracap.model.weights import not_for_open_clip
    from contracap.pretrained import PICKLES, read_weights, save, save_open_clip

    found = read_weights(file, size=size)
    to = to or ("open_clip" if found.layout == "contracap" else "contracap")
    if to == "contracap":
        if out.suffix != ".safetensors":
            raise ValueError(f"{out} does not end in .safetensors, as a weights file of contracap must")
        save(out, model=found.model, image=found.image, state=found.state)
    else:
        if out.suffix in (".safetensors", *PICKLES) or out.is_file():
            raise ValueError(f"open_clip's layout is a folder of two files, and {out} names a file: give a folder")
        save_open_clip(out, model=found.model, image=found.image, state=found.state)
        for problem in not_for_open_clip(found.model):
            print(f"contracap: warning: open_clip 3.3.0 cannot follow this model: {problem}", file=sys.stderr)
    print(f"{found.path} ({found.layout}) -> {out} ({to})")
