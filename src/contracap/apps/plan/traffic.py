"""Traffic between GPUs in a step: which collectives, over how many bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from contracap.apps.plan.parameters import EXACT, Shares
from contracap.training.recipe import Recipe

Purpose = Literal["parameters, forward", "parameters, backward", "gradients", "features", "numbers"]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
KINDS = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """The calls of a step that have one kind, purpose and group of ranks.

    Attributes:
        kind: torch's name of it.
        purpose: what travels.
        payload: bytes of the larger tensor of each call, on one rank: what an all_gather gives, what a reduce_scatter
            takes, what an all_reduce is called with.
        ranks: of the group.
        local: whether they are all in one machine.
    """

    kind: Kind
    purpose: Purpose
    payload: float
    ranks: int
    local: bool

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives, if the payload goes around a ring."""
        others = (self.ranks - 1) / self.ranks
        return self.payload * others * (2 if self.kind == "all_reduce" else 1)


def collectives_of(recipe: Recipe, shares: Shares, *, rows: float, product: int) -> Sequence[Collective]:
    """The collectives of one training step; what is between steps (logs, checkpoints) is not among them.

    Under `fsdp` and `hsdp` a part of the batch fetches each block for its forward and for its backward pass, and the
    root once; the last part's backward pass reduces the gradients. A batch in several parts runs its contrastive branch
    once more beforehand, for the features of the whole batch.

    Args:
        rows: samples of a step on each GPU.
        product: bytes in which parameters travel: 2 under bf16, else 4; gradients are reduced in float32.
    """
    gpus, shards, copies = shares.gpus, shares.shards, shares.gpus // shares.shards
    parts, contrastive, captioning = recipe.accumulation, recipe.loss.contrastive > 0, recipe.loss.captioning > 0
    first = contrastive and parts > 1
    within, together = shards <= shares.per_machine, gpus <= shares.per_machine
    found = []

    def add(kind: Kind, purpose: Purpose, payload: int | float, ranks: int, local: bool) -> None:
        if ranks > 1 and payload:
            found.append(Collective(kind=kind, purpose=purpose, payload=float(payload), ranks=ranks, local=local))

    run = [unit for unit in shares.blocks if captioning or not unit.decoder]
    again = [unit for unit in run if unit.twice and contrastive and captioning]
    forward = shares.root.whole + sum(unit.whole for unit in run + again)
    before = parts * sum(unit.whole for unit in run if not unit.decoder) + shares.root.whole
    backward = sum(unit.whole for unit in run + again if unit.backward)
    # Gradients of two passes are reduced together; those that earlier parts left are reduced with the first of the two.
    reduced = sum(unit.trained for unit in (*shares.shared, *again * (parts > 1)))
    add("all_gather", "parameters, forward", (parts * forward + first * before) * product, shards, within)
    add("all_gather", "parameters, backward", parts * backward * product, shards, within)
    add("reduce_scatter", "gradients", reduced * EXACT, shards, within)
    add("all_reduce", "gradients", reduced // shards * EXACT, copies, together)
    # The logit scale is not sharded: its gradient is averaged after each part.
    copied = shares.copied.trained * (parts if shares.blocks else 1)
    add("all_reduce", "gradients", copied * EXACT, gpus, together)
    pairs, width = rows * contrastive * EXACT, 2 * recipe.model_config.embed_dim
    # Rows of both towers, then what each pair is normalised by.
    add("all_gather", "features", gpus * pairs * (width + 2), gpus, together)
    # The number of labels, an int64, and each loss; where gradients are sharded, the norm of each.
    add("all_reduce", "numbers", 8 + EXACT * (contrastive + captioning), gpus, together)
    if shares.blocks:
        add(
            "all_reduce",
            "numbers",
            EXACT * sum(unit.tensors for unit in (shares.copied, *shares.shared)),
            shards,
            within,
        )
    return found


def bytes_by_kind(collectives: Iterable[Collective]) -> Mapping[str, float]:
    """Payloads, summed; 0 where there are none."""
    sums = dict.fromkeys(KINDS, 0.0)
    for collective in collectives:
        sums[collective.kind] += collective.payload
    return sums
