"""The losses on pairs that are not trained on."""

from itertools import islice

import torch

from contracap.data.config import DataConfig
from contracap.data.loader import evaluation_samples, validation_batches
from contracap.data.shards import list_shards
from contracap.model.coca import evaluating
from contracap.pretrained import processor_for
from contracap.training.step import StepConfig, TrainingState, compute_losses, count_labels
from contracap.wording import counted


def require_validation(data: DataConfig) -> None:
    """Check that `data.validation` fills a batch.

    Raises: FileNotFoundError: if there are no such shards. ValueError: if they do not fill a batch.
    """
    shards = list_shards(data.validation or (), key="data.validation")
    captioned = (sample for sample in evaluation_samples(shards) if sample.captions)
    if (found := sum(1 for _ in islice(captioned, data.batch_size))) < data.batch_size:
        held = counted(found, "sample(s)")
        raise ValueError(
            f"data.validation {data.validation} holds {held} with captions, fewer than one batch of "
            f"{data.batch_size}: bring more, lower data.batch_size, or set validate_every = 0"
        )


@torch.no_grad()
def validation_losses(state: TrainingState, config: StepConfig, data: DataConfig) -> dict[str, float]:
    """Return the mean losses over the full batches of `data.validation`, under `validation_...` names.

    Every rank must call it. Each reads all of the data and scores its rows of each batch, so that the batches contrast
    as in one process.
    """
    model, process_group, parallel = state.model, state.process_group, state.parallel
    sums: dict[str, float] = {}
    tokenizer = processor_for(model.config, config.image).tokenizer
    num_batches = num_labels = 0
    for batch in validation_batches(
        data.validation or (),
        batch_size=data.batch_size,
        image=config.image,
        tokenizer=tokenizer,
        lines=data.captions.lines,
    ):
        rank_batch = batch.split(process_group.world_size)[process_group.rank].to(model.device)
        num_batches += 1
        num_labels += count_labels(rank_batch)
        with evaluating(model), parallel.forward_only():
            losses = compute_losses(model, rank_batch, config, num_labels=1, parallel=parallel)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    # One loss is a mean over labels, the other over batches. Sums and counts are averaged over the ranks separately.
    counts = {"captioning_loss": num_labels, "contrastive_loss": num_batches}
    means = dict[str, float]()
    for name, value in sums.items():
        numbers = torch.tensor([value, counts[name]], dtype=torch.float64, device=model.device)
        total, count = process_group.mean(numbers).tolist()
        means[f"validation_{name}"] = total / count
    return means
