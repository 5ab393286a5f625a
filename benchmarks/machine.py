"""The machine: its memory, its speed in matrix products, and its name."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch


def this_machine(device: torch.device) -> dict[str, Any]:
    """Facts of the machine that speed depends on; `load` is the average of the last 1, 5 and 15 minutes."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "device": device.type,
    }
    return machine | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch's threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release_memory(device: torch.device) -> None:
    """Give memory that nothing uses back to the system and to the device."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed, up to 18 GB here
        libc.malloc_trim(0)
    if device.type == "cuda":  # where steps are compiled, too
        torch.compiler.reset()
        torch.cuda.empty_cache()


def peak_mib(device: torch.device) -> float:
    """Most memory, in MiB, held at any time on the device; on the CPU resident memory of this process.

    Raises:
        FileNotFoundError: outside of Linux.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _resident_mib("VmHWM")  # not getrusage, whose peak a child process inherits from its parent


def peak_growth(work: Callable[[], object], device: torch.device) -> float:
    """MiB that `work` adds at its peak to what is held before. On a CPU it must go beyond every earlier peak of this
    process, which never falls.

    Raises:
        FileNotFoundError: outside of Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) / 2**20
    else:
        held = _resident_mib("VmRSS")
    work()
    return peak_mib(device) - held


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int = 2048, repeats: int = 7) -> float:
    """Operations a second in products of two square matrices, the median of `repeats`."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products, seconds = 100 if device.type == "cuda" else 1, list[float]()  # one takes a GPU some microseconds
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(products):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return products * 2 * side**3 / statistics.median(seconds[1:])
