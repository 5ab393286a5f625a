"""Results to compare."""

from collections.abc import Mapping, Sequence

from contracap.evaluation.result import PerSample, Result


def result(
    values: Mapping[str, Sequence[float]],
    plain: Mapping[str, float | None] | None = None,
    *,
    keys: Sequence[str] | None = None,
    samples: int = 4,
) -> Result:
    """A result with these values of single samples, and further figures without; missing ones have a reason."""
    plain = plain or {}
    return Result(
        command="contracap evaluate",
        seed=None,
        samples=samples,
        figures={name: sum(found) / len(found) for name, found in values.items()} | dict(plain),
        reasons={name: "SPICE needs a jar" for name, value in plain.items() if value is None},
        per_sample={
            name: PerSample.of(keys or [f"{name.split('/')[0]}{row}" for row in range(len(found))], found)
            for name, found in values.items()
        },
    )
