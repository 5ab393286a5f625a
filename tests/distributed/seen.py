"""A run of which rank 1 stops to think before its seventh batch, and the fourth step is not finite: seen.py RECIPE."""

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator

from contracap.data.batch import Batch
from contracap.data.loader import TrainingBatches
from contracap.training import step
from contracap.training.recipe import load_recipe
from contracap.training.trainer import train

PAUSE = 8.0  # seconds
batches, loss, calls = TrainingBatches.__iter__, step.contrastive_loss, itertools.count(1)


def pausing(self: TrainingBatches) -> Iterator[Batch]:
    for number, batch in enumerate(batches(self), start=1):
        if number == 7 and os.environ["RANK"] == "1":
            time.sleep(PAUSE)
        yield batch


if __name__ == "__main__":
    TrainingBatches.__iter__ = pausing
    step.contrastive_loss = lambda *args, **kwargs: loss(*args, **kwargs) * (float("nan") if next(calls) == 4 else 1.0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(load_recipe(sys.argv[1]))
