"""Models and their processors: loaded from weights, made with random weights, saved."""

from pathlib import Path

import torch

from contracap.images import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.onednn import use_onednn
from contracap.model.sizes import SIZES, find_size
from contracap.precision import Precision
from contracap.pretrained.devices import find_device, place
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.find import size_is_not_weights
from contracap.pretrained.weights import Weights, name_errors, read_weights, write_weights
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer


def load(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    seed: int | None = None,
    size: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> tuple[CoCa, Processor]:
    """Return a model in evaluation mode and its processor.

    Args:
        name: a size of the table, which then needs `weights`; or what holds weights: a file (safetensors, or a
            pickle, whose tensors alone are read), a folder, a run or one of its checkpoints,
            `hf-hub:organisation/repository`, or a release such as `coca_ViT-L-14/laion2b`.
        weights: for a size: the same choice, or "random".
        seed: for random weights; 0 when left out.
        size: for a file that does not say its size and fits none of the table's.
        device: a device of torch, such as `cpu` or `cuda:1`; `auto` is the GPU if there is one.
        precision: `fp32`, `bf16` or `fp16`; `auto` is bf16 or fp16 on a GPU, and fp32 on a CPU. To train, take `fp32`.

    Raises:
        WeightsError: nothing there, another kind of file, or keys that are missing, extra or misshapen, by name.
        ValueError: if this machine does not have the device, or the device does not compute in this precision.
    """
    chosen = find_device(device)
    if str(name) in SIZES:
        if size is not None:
            raise WeightsError(f"size= is for weights that do not tell their size, and {name} is a size: remove size=")
        if weights is None:
            raise WeightsError(f"{size_is_not_weights(str(name))} (in Python also: weights=FILE or weights='random')")
        if weights == "random":
            model, processor = random_model(find_size(str(name)), seed=seed or 0)
            return place(model, device=chosen, precision=precision), processor
        name, size = weights, str(name)
    elif weights is not None:
        raise WeightsError(f"weights= goes with a size, and {str(name)!r} is none; the sizes are {', '.join(SIZES)}")
    if seed is not None:
        raise WeightsError("seed= is for weights='random'")
    return build_model(read_weights(name, size=size), device=chosen, precision=precision)


def build_model(weights: Weights, *, device: torch.device, precision: Precision) -> tuple[CoCa, Processor]:
    """Return the model of weights, in evaluation mode, and its processor. The model may share their memory.

    Raises: WeightsError, ValueError: as `load` does.
    """
    with name_errors(weights.path):
        processor = processor_for(weights.model, weights.image)
    with torch.device("meta"):
        model = CoCa(weights.model)
    model.load_state_dict(weights.state, assign=True)
    model.float()
    use_onednn(model)
    return place(model.eval().requires_grad_(True), device=device, precision=precision), processor


def random_model(config: CoCaConfig, *, seed: int) -> tuple[CoCa, Processor]:
    """Return a model with initial weights, in evaluation mode. The global random generator is not changed."""
    with torch.device("meta"):
        model = CoCa(config)
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialise()
    use_onednn(model)
    return model.eval(), processor_for(config, ImageConfig(size=config.vision.image_size))


def processor_for(model: CoCaConfig, image: ImageConfig) -> Processor:
    """Return the processor whose images and texts fit the model."""
    return Processor(image, Tokenizer(context=model.text.context, vocab_size=model.text.vocab_size))


def save(path: str | Path, model: CoCa, processor: Processor) -> None:
    """Write a model to a `.safetensors` file that `load` reads back, with its configuration. A whole file is
    written, or none.

    Raises:
        WeightsError: if the name ends otherwise, or the model was loaded in bf16 or fp16 on a GPU.
        OSError: if the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"{path} must end in .safetensors")
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        raise WeightsError(f"the weights are rounded to {model.precision}: to save them, load with precision='fp32'")
    write_weights(Path(path), model=model.config, image=processor.image_config, state=model.state_dict())
