"""A trace of a few steps, for Perfetto."""

import gzip
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from contracap.files import replace_file

PROFILE_FOLDER = "profile"
WAIT, WARM_UP, ACTIVE = 10, 2, 3  # steps: not traced, traced but thrown away, and written
logger = logging.getLogger(__name__)


class Profile:
    """A trace of one rank's steps 13 to 15, or of the last three of a shorter run, in `profile/rank-N.json.gz`.

    Other steps are not slowed down.
    """

    def __init__(self, folder: Path, *, rank: int, steps: int):
        """
        Args:
            steps: steps that are left to do.
        """
        self._path = folder / PROFILE_FOLDER / f"rank-{rank}.json.gz"
        self._left = 0
        if steps <= WARM_UP:
            logger.warning("profile: with %d steps left there is nothing to trace; it takes %d", steps, WARM_UP + 1)
            return
        wait = max(0, min(WAIT, steps - WARM_UP - ACTIVE))
        self._left = min(wait + WARM_UP + ACTIVE, steps)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities, schedule=schedule(wait=wait, warmup=WARM_UP, active=ACTIVE, repeat=1)
        )
        self._profiler.start()

    def step(self) -> None:
        """Note that a step is done."""
        if not self._left:
            return
        self._left -= 1
        if self._left:
            self._profiler.step()
        else:
            self._profiler.stop()
            self._write()

    def _write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            with (
                replace_file(self._path) as partial,
                trace.open("rb") as source,
                gzip.open(partial, "wb") as file,
            ):
                shutil.copyfileobj(source, file)
        logger.info("profile written: %s opens in https://ui.perfetto.dev", self._path)

    def close(self) -> None:
        """Stop tracing. A run that ended too early has no trace."""
        if self._left:
            self._left = 0
            self._profiler.stop()
