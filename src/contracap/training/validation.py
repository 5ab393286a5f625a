"""The losses on data that the model is not trained on."""

import torch

from contracap.data.loader import DataConfig, validation_batches
from contracap.model.coca import evaluating
from contracap.parallel import Wrapped
from contracap.pretrained import processor_for
from contracap.training.step import StepConfig, TrainingState, count_labels, losses


@torch.no_grad()
def validate(state: TrainingState, data: DataConfig, config: StepConfig) -> dict[str, float]:
    """Mean losses over the full batches of `data.validation`, under `validation_...` names.

    Every rank reads all of it and scores its rows of each batch, so that the batches contrast as in one process.
    """
    model, ranks, shared = state.model, state.ranks, state.wrapped or Wrapped(state.model.features)
    sums: dict[str, float] = {}
    tokenizer = processor_for(model.config, config.image).tokenizer
    batches = tokens = 0
    with evaluating(model), shared.forward_only():
        for batch in validation_batches(
            data.validation or (), batch_size=data.batch_size, image=config.image, tokenizer=tokenizer
        ):
            part = batch.split(ranks.count)[ranks.rank].to(model.device)
            batches += 1
            tokens += int(count_labels(part.ids, tokenizer.end))
            parts = losses(model, part, config, tokens=1, shared=shared)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item()
    # Summed over tokens the one, averaged over batches the other; and then over the ranks, both of each quotient.
    counts = {"captioning_loss": tokens, "contrastive_loss": batches}
    return {
        f"validation_{name}": (numbers[0] / numbers[1]).item()
        for name, value in sums.items()
        for numbers in [ranks.mean(torch.tensor([value, counts[name]], dtype=torch.float64, device=ranks.device))]
    }
