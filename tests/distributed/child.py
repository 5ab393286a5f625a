"""ProcessGroup that do all that the tests ask of them, and write what came out: child.py FOLDER COUNT."""

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.parallel import (
    Agreement,
    ParallelConfig,
    ParallelModel,
    ProcessGroup,
    full_tensor,
    gather_rows,
    parallelize,
    start_process_group,
)
from contracap.tokenizer import text_lengths
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from tests.distributed.forks import run_ranks
from tests.model.tiny_models import tiny_mammut

PAIRS = 8
SCALES = (1.0, 100.0)
CHUNKS = (3, 4096)
DTYPES = (torch.float32, torch.float64)
CASES = list(itertools.product(DTYPES, (False, True), SCALES, CHUNKS))  # the second: whether all ranks' rows are equal
KINDS = {2: ("ddp", "fsdp"), 4: ("hsdp",)}  # by the number of ranks: two cannot share a model by halves
MAMMUT = tiny_mammut(feed_forward_before_cross=False)
WIDE = dict(rows=64, width=4, chunk=8)  # each rank's pairs where memory and traffic are counted


def pairs(dtype: torch.dtype, *, equal: bool = False) -> tuple[Tensor, Tensor]:
    """Features of the global batch; with `equal`, every rank gets the same ones."""
    generator = torch.Generator().manual_seed(0)
    rows = PAIRS // 4 if equal else PAIRS
    images, texts = (normalize(torch.randn(rows, 16, dtype=dtype, generator=generator), dim=1) for _ in range(2))
    return (images.repeat(4, 1), texts.repeat(4, 1)) if equal else (images, texts)


def loss_and_gradients(
    images: Tensor, texts: Tensor, scale: float, **how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    logit_scale = torch.tensor(scale, dtype=images.dtype, requires_grad=True)
    loss = contrastive_loss(images, texts, logit_scale=logit_scale, **how)
    return loss.detach(), *torch.autograd.grad(loss, (images, texts, logit_scale))


def tiny(dtype: torch.dtype, config: CoCaConfig = SIZES["tiny"]) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(config)
    model.initialise()
    return model.to(dtype)


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pixels and ids of the global batch, captions of 3 to 10 tokens, the longer ones last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(PAIRS, 12, dtype=torch.int64)
    for row, length in enumerate(range(3, 3 + PAIRS)):
        ids[row, :length] = torch.randint(1, 1000, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 1022, 1023
    return torch.randn(PAIRS, 3, 32, 32, dtype=dtype, generator=generator), ids


def both_losses(
    model: CoCa, parallel: ParallelModel, pixels: Tensor, ids: Tensor, *, tokens: Tensor, bf16: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = parallel.model(pixels, ids)
        vocabulary, captions = model.require_decoder().vocabulary.weight, output.caption_states
        captioning = captioning_loss(captions.states, vocabulary, labels=captions.labels, num_labels=tokens)
    return captioning, contrastive_loss(
        output.image_features, output.text_features, logit_scale=output.logit_scale, gather=parallel.gather
    )


def backward(
    kind: str,
    dtype: torch.dtype,
    *,
    process_group: ProcessGroup | None = None,
    parts: int = 1,
    order: Tensor | slice = slice(None),
    bf16: bool = False,
    config: CoCaConfig = SIZES["tiny"],
) -> tuple[CoCa, dict[str, Any]]:
    """A tiny model after the backward pass on the global batch in this order, which it takes in parts: each is made
    of a part of every rank's rows. Its mean loss and, from rank 0, its gradients."""
    process_group = process_group or ProcessGroup()
    model = tiny(dtype, config)
    parallel = parallelize(model, ParallelConfig(kind=kind), process_group, bf16=bf16)
    pixels, ids = (
        tensor[order].chunk(process_group.world_size)[process_group.rank].chunk(parts) for tensor in samples(dtype)
    )
    tokens = process_group.mean(torch.tensor((text_lengths(torch.cat(ids), 1023) - 1).sum()))
    loss = torch.zeros((), dtype=dtype)
    for index in range(parts):
        with parallel.accumulating() if index < parts - 1 else nullcontext():
            captioning, contrastive = both_losses(model, parallel, pixels[index], ids[index], tokens=tokens, bf16=bf16)
            part = 2 * captioning + contrastive / parts
            part.backward()
        loss += part.detach()
    gradients = {name: full_tensor(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return model, {"loss": process_group.mean(loss)} | ({"gradients": gradients} if process_group.rank == 0 else {})


def update(kind: str, process_group: ProcessGroup | None = None) -> dict[str, Any]:
    """`backward` in float64, then clipping and AdamW; from rank 0 the weights, and this rank's image embeddings."""
    process_group = process_group or ProcessGroup()
    model, found = backward(kind, torch.float64, process_group=process_group)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    build_optimizer(model, OptimizerConfig()).step()
    with torch.no_grad():
        embedding = model.encode_image(samples(torch.float64)[0].chunk(process_group.world_size)[process_group.rank])
    weights = {name: full_tensor(tensor).clone() for name, tensor in model.state_dict().items()}
    return found | {"norm": norm, "embedding": embedding} | ({"weights": weights} if process_group.rank == 0 else {})


class Watch(TorchDispatchMode):
    """Counts the numbers in the largest tensor made, and the bytes received from other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "c10d::_allgather_base_":
            self.received += args[0].nbytes - args[1].nbytes
        elif isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


def main(out: Path) -> None:
    """What one rank does."""
    found: dict[Any, Any] = {}
    with start_process_group(torch.device("cpu")) as process_group:
        found["helpers"] = {
            "broadcast": process_group.broadcast(f"from {process_group.rank}"),
            "all_gather": process_group.all_gather({"position": process_group.rank}),
            "sum": process_group.sum(torch.tensor([process_group.rank, 1])),
            "any": process_group.any(process_group.rank == 1, False),
            "mean": process_group.mean(torch.tensor(process_group.rank)),
        }
        agreement = Agreement(process_group)
        found["agreement"] = [agreement.ask(process_group.rank == 1 and step == 1, False) for step in range(3)]
        process_group.barrier()
        for dtype, equal, scale, chunk in CASES:
            images, texts = (
                tensor.chunk(process_group.world_size)[process_group.rank] for tensor in pairs(dtype, equal=equal)
            )
            how = dict(gather=gather_rows, chunk=chunk)
            found[dtype, equal, scale, chunk] = loss_and_gradients(images, texts, scale, **how)
        images = normalize(torch.randn(WIDE["rows"], WIDE["width"]), dim=1)
        with Watch() as watch:
            loss_and_gradients(images, images, 10.0, gather=gather_rows, chunk=WIDE["chunk"])
        with torch.no_grad(), Watch() as unlearning:
            contrastive_loss(images, images, logit_scale=torch.tensor(10.0), gather=gather_rows)
        found["watch"] = (watch.largest, watch.received, unlearning.received)
        for kind in KINDS[process_group.world_size]:
            found[kind, "update"] = update(kind, process_group)
            how = dict(process_group=process_group, parts=2, config=MAMMUT)
            found[kind, "parts"] = backward(kind, torch.float64, **how)[1]
        found["bf16"] = backward("fsdp", torch.float32, process_group=process_group, bf16=True)[1]
        torch.save(found, out / f"{process_group.rank}.pt")


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    run_ranks(count, lambda *_: main(folder))
