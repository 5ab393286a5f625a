"""Ray, started or joined for one run: quiet, and closed to other machines where it starts here."""

import io
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import ModuleType
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

from contracap.apps.bulk.cluster_config import ClusterConfig

try:
    import fcntl
except ImportError:  # not on Windows, where folders of runs that were killed stay
    fcntl = None

PATIENCE = 5.0  # seconds for a cluster to answer in; Ray itself would wait for minutes, deaf to signals
SESSION_PREFIX = "contracap-ray-"
SETTLED = 60.0  # seconds after which a folder without a lock has lost its run: a younger one may be about to take it
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray tells its makers of each cluster it starts
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its C++ part warns of how its Python part starts workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as it will be in later versions, of which Ray warns otherwise
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray listens at the machine's address, open to others


class BulkError(RuntimeError):
    """A run that cannot start, or cannot continue; the message says why."""


@contextmanager
def ray_session(cluster: ClusterConfig) -> Generator[ModuleType, None, None]:
    """Join Ray at the cluster's address, or start it here, quietly, until the context ends."""
    if cluster.address is not None:
        _require_answer(cluster.address)
    for name, value in (ENVIRONMENT | (LOOPBACK if cluster.address is None else {})).items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    ending = ExitStack()
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        cores = max(cluster.workers or 1, os.cpu_count() or 1)
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        options["_temp_dir"] = ending.enter_context(session_folder())
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _no_stderr(), _parts_left_out(on_sigterm):  # stderr: its C++ part says there how much it will say
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except KeyboardInterrupt:
        ray.shutdown()
        ending.close()
        raise
    except (OSError, RuntimeError, ValueError) as error:
        where = f"join the cluster at {cluster.address}" if cluster.address else "start Ray"
        ending.close()
        raise BulkError(f"cannot {where}: {error}") from None
    if callable(on_sigterm):
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's C++ part may have replaced it since
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is said once, by us
    said = io.StringIO()  # that workers died; not worth a word where the run ends with an error of its own
    with ending, redirect_stdout(said):
        try:
            yield ray
        except (BulkError, KeyboardInterrupt):
            ray.shutdown()
            said.truncate(0)
            raise
        finally:
            ray.shutdown()
            sys.stderr.write(said.getvalue())


def _require_answer(address: str) -> None:
    """Raises: BulkError: if nothing listens at an address that names a machine and a port."""
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        if place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        raise BulkError(f"cannot join the cluster at {address}: {error}") from None


@contextmanager
def session_folder() -> Generator[str, None, None]:
    """Make a temporary folder for Ray's sockets and logs. Those of runs that were killed are removed, too."""
    if fcntl is not None:
        for left in Path(gettempdir()).glob(f"{SESSION_PREFIX}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > SETTLED:
                    with (left / "lock").open("ab") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its run has ended
                        shutil.rmtree(left, ignore_errors=True)
    with (
        TemporaryDirectory(prefix=SESSION_PREFIX, ignore_cleanup_errors=True) as folder,
        Path(folder, "lock").open("ab") as lock,
    ):
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@contextmanager
def _parts_left_out(on_sigterm: Any) -> Generator[None, None, None]:
    """Start Ray without the process of its dashboard, and with a handler of SIGTERM that is not its own.

    Without any dashboard it would still ask the metadata servers of AWS, Azure and Google where it runs, though its
    usage statistics are off. Its handler ends the process without a word.
    """
    from ray._private import services, utils

    # A handler must be set: where Ray sets its own, its C++ part has set another, which aborts.
    def set_handler(handler: Any) -> None:
        signal.signal(signal.SIGTERM, on_sigterm if callable(on_sigterm) else handler)

    with (
        patch.object(services, "start_api_server", lambda *arguments, **named: ("", None)),
        patch.object(utils, "set_sigterm_handler", set_handler),
    ):
        yield


@contextmanager
def _no_stderr() -> Generator[None, None, None]:
    """Silence stderr, for every library that writes to it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
