"""GPUs to plan with: what their makers state."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: in bytes, about what torch finds there.
        bf16, fp32: dense multiplications and additions a second, on tensor cores and without them.
        bandwidth: of its memory, in bytes a second.
        link: bytes a second that it sends to another machine's GPU: an assumption, since clusters differ.
        local_link: the same, to a GPU of its own machine.
    """

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    local_link: float


# Rates and bandwidths: NVIDIA's data sheets of the A100 (SXM4), H100 (SXM5), H200 (SXM5) and L40S, and its white
# paper on the Ada architecture for the RTX 4090, all without sparsity. Links: 400 Gbit/s for each A100, H100 and
# H200, though many clusters of A100s have half of that; 200 Gbit/s for an L40S, 100 Gbit/s for an RTX 4090. Within a
# machine: NVLink, one direction, for A100, H100 and H200; PCIe 4.0 with 16 lanes for the others.
GPUS: dict[str, Gpu] = {
    "a100-40g": Gpu(memory=39.4 * 2**30, bf16=312e12, fp32=19.5e12, bandwidth=1.555e12, link=50e9, local_link=300e9),
    "a100-80g": Gpu(memory=79.2 * 2**30, bf16=312e12, fp32=19.5e12, bandwidth=2.039e12, link=50e9, local_link=300e9),
    "h100-80g": Gpu(memory=79.1 * 2**30, bf16=989e12, fp32=67e12, bandwidth=3.35e12, link=50e9, local_link=450e9),
    "h200-141g": Gpu(memory=139.8 * 2**30, bf16=989e12, fp32=67e12, bandwidth=4.8e12, link=50e9, local_link=450e9),
    "l40s": Gpu(memory=44.4 * 2**30, bf16=362e12, fp32=91.6e12, bandwidth=0.864e12, link=25e9, local_link=32e9),
    "rtx-4090": Gpu(memory=23.6 * 2**30, bf16=165e12, fp32=82.6e12, bandwidth=1.008e12, link=12.5e9, local_link=32e9),
}


def find_gpu(name: str) -> Gpu:
    """The row `name` of the table.

    Raises: ValueError: if there is none.
    """
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; the GPUs are {', '.join(GPUS)}")
    return GPUS[name]
