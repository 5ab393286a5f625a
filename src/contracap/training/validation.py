"""The losses on pairs that are not trained on."""

from collections.abc import Iterator

import torch

from contracap.data.loader import DataConfig, validation_batches
from contracap.data.shards import list_shards
from contracap.model.coca import CoCa, evaluating
from contracap.pretrained import processor_for
from contracap.training.step import StepConfig, count_labels, losses


class Validation:
    """Mean losses over the full batches of `data.validation`."""

    def __init__(self, data: DataConfig, config: StepConfig):
        """Raises: FileNotFoundError: if there are no such shards."""
        list_shards(data.validation or ())
        self.data, self.config = data, config

    @torch.inference_mode()
    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each loss, under `validation_...` names."""
        sums: dict[str, float] = {}
        tokenizer = processor_for(model.config, self.config.image).tokenizer
        batches = tokens = 0
        for batch in validation_batches(
            self.data.validation or (),
            batch_size=self.data.batch_size,
            image=self.config.image,
            tokenizer=tokenizer,
        ):
            batch = batch.to(model.device)
            batches += 1
            tokens += int(count_labels(batch.ids, tokenizer.end))
            with evaluating(model):
                parts = losses(model, batch, self.config, tokens=1)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        # Summed over tokens the one, averaged over batches the other.
        counts = {"captioning_loss": tokens, "contrastive_loss": batches}
        yield from ((f"validation_{name}", value / counts[name]) for name, value in sums.items())
