"""The losses on pairs that are not trained on."""

from collections.abc import Iterator
from itertools import islice

import torch

from contracap.data.config import DataConfig
from contracap.data.loader import evaluation_samples, validation_batches
from contracap.data.shards import list_shards
from contracap.model.coca import CoCa, evaluating
from contracap.parallel import ProcessGroup, Wrapped
from contracap.pretrained import processor_for
from contracap.training.step import StepConfig, count_labels, losses


class Validation:
    """Mean losses over the full batches of `data.validation`.

    Every rank reads all of it and scores its rows of each batch, so that the batches contrast as in one process.
    """

    def __init__(self, data: DataConfig, config: StepConfig, process_group: ProcessGroup, shared: Wrapped):
        """Raises: FileNotFoundError: if there are no such shards. ValueError: if they do not fill a batch."""
        shards = list_shards(data.validation or (), key="data.validation")
        captioned = (sample for sample in evaluation_samples(shards) if sample.captions)
        if (found := sum(1 for _ in islice(captioned, data.batch_size))) < data.batch_size:
            raise ValueError(
                f"data.validation {data.validation} holds {found} samples with captions, fewer than one batch of "
                f"{data.batch_size}: bring more, lower data.batch_size, or set validate_every = 0"
            )
        self.data, self.config, self.process_group, self.shared = data, config, process_group, shared

    @torch.no_grad()
    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each loss, under `validation_...` names. Every rank must run it to its end."""
        sums: dict[str, float] = {}
        tokenizer = processor_for(model.config, self.config.image).tokenizer
        batches = tokens = 0
        for batch in validation_batches(
            self.data.validation or (),
            batch_size=self.data.batch_size,
            image=self.config.image,
            tokenizer=tokenizer,
            lines=self.data.captions.lines,
        ):
            part = batch.split(self.process_group.world_size)[self.process_group.rank].to(model.device)
            batches += 1
            tokens += count_labels(part)
            with evaluating(model), self.shared.forward_only():
                parts = losses(model, part, self.config, tokens=1, shared=self.shared)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        # Summed over tokens the one, averaged over batches the other; then over the ranks, both of each quotient.
        counts = {"captioning_loss": tokens, "contrastive_loss": batches}
        for name, value in sums.items():
            numbers = torch.tensor([value, counts[name]], dtype=torch.float64, device=model.device)
            total, count = self.process_group.mean(numbers).tolist()
            yield f"validation_{name}", total / count
