"""The plan of a run, as a table for a terminal and as a file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from contracap.apps.plan.traffic import Collective
from contracap.evaluation.result import Result

NAMES, CELLS = 48, 17  # characters of a column
NEGLIGIBLE = 1e-6  # share of the total
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cost of a run.

    Attributes:
        title: run, GPUs and batch in a line.
        assumptions: what the plan takes for granted, a line each.
        warnings: why the run cannot be started like this, a line each.
        samples: of the whole run.
        parameters: by part.
        flops: operations of a sample's forward pass by part, at the mean length of the texts.
        training_flops: the same, of forward and backward pass.
        padded_flops, padded_training_flops: the same with texts that fill the context.
        memory: bytes on each GPU by part.
        seconds: of a step by what they go to.
        collectives: of a step.
        figures: the numbers for the whole run, by name; the unit is part of the name.
    """

    title: str
    assumptions: Sequence[str]
    warnings: Sequence[str]
    samples: int
    parameters: Mapping[str, int]
    flops: Mapping[str, float]
    training_flops: Mapping[str, float]
    padded_flops: Mapping[str, float]
    padded_training_flops: Mapping[str, float]
    memory: Mapping[str, float]
    seconds: Mapping[str, float]
    collectives: Sequence[Collective]
    figures: Mapping[str, float]

    @property
    def summary(self) -> str:
        """Time and memory in one line."""
        used, usable = (self.figures[f"{name}_gib_per_gpu"] for name in ("memory", "usable"))
        fits = "" if used <= usable else ", too much"
        seconds = 3600 * self.figures["hours"]
        return f"{_duration(seconds)}; {used:,.3g} of {usable:,.3g} GiB on each GPU{fits}"

    def table(self) -> str:
        """The plan for a terminal."""
        columns = (self.flops, self.training_flops, self.padded_flops, self.padded_training_flops)
        flops = {name: [column[name] for column in columns] for name in self.flops}
        heads = ["forward", "training", "padded forward", "padded training"]
        collectives = {
            f"{each.kind}, {each.purpose}, {each.ranks} GPUs": [each.payload, each.sent] for each in self.collectives
        }
        lines = [
            self.summary,
            "",
            self.title,
            *_section("parameters", ["million"], _columns(self.parameters), unit=1e6),
            *_section("GFLOP per sample (training: forward + backward)", heads, flops, unit=1e9),
            *_section("memory of a GPU", ["GiB"], _columns(self.memory), unit=GIB),
            *_section("time of a step", ["ms"], _columns(self.seconds), unit=1e-3),
            *_section("collectives of a step, MB", ["payload", "sent by a GPU"], collectives, unit=1e6),
            "",
            *(_line(name.replace("_", " "), [_number(value)]) for name, value in self.figures.items()),
            "",
            *(f"assumed: {assumption}" for assumption in self.assumptions),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def result(self, command: str) -> Result:
        """Return the content of the plan's file: its figures, and what they were computed from."""
        parts = asdict(self)
        for part, each in zip(parts["collectives"], self.collectives, strict=True):
            part["sent"] = each.sent
        figures, samples = parts.pop("figures"), parts.pop("samples")
        return Result(command=command, seed=None, samples=samples, figures=figures, details={"plan": parts})


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"about {seconds / unit:,.3g} {name}"
    return f"about {seconds:,.3g} seconds"


def _columns(numbers: Mapping[str, float] | Mapping[str, int]) -> dict[str, list[float]]:
    return {name: [float(number)] for name, number in numbers.items()}


def _section(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[float]], *, unit: float) -> list[str]:
    """Return aligned lines, the total last. Rows that are a millionth of it or less are left out."""
    if not rows:
        return []
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = ["", _line(title, heads)]
    shown = {name: numbers for name, numbers in rows.items() if max(numbers) > max(total) * NEGLIGIBLE}
    for name, numbers in [*shown.items(), ("total", total)]:
        lines.append(_line(f"  {name}", [_number(number / unit) for number in numbers]))
    return lines


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:{NAMES}}" + "".join(f"{cell:>{CELLS}}" for cell in cells)


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.0e}"
