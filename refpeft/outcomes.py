"""What runs came to, a row each: tables for people and for READMEs, and means over seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refpeft import files, report

JSON, MARKDOWN = "compare.json", "compare.md"


@dataclass(frozen=True)
class Row:
    """How one method did; with an `error` the rest is None."""

    method: str
    trained: int | None = None  # numbers
    loss_before: float | None = None  # of the held-out rows
    loss_after: float | None = None
    exact_match: float | None = None  # share of held-out answers, on the embedded task
    step_ms: float | None = None  # median
    adapter_bytes: int | None = None
    peak_bytes: int | None = None
    lr: float | None = None
    scores: dict[str, float] = field(default_factory=dict)  # metrics of the held-out rows, after
    deviations: dict[str, float] = field(default_factory=dict)  # of a mean over seeds, by what it is of
    error: str | None = None

    def cell(self, name: str, unit: float = 1, form: str = ".4f") -> str:
        """One of its values as text, "-" for none, with the deviation of a mean."""
        value = self.scores.get(name, getattr(self, name, None))
        if value is None:
            return "-"
        spread = self.deviations.get(name)
        return format(value / unit, form) + (f" ± {spread / unit:{form}}" if spread is not None else "")

    @property
    def losses(self) -> str:
        """The held-out loss before and after."""
        return f"{self.cell('loss_before')} -> {self.cell('loss_after')}"


_BEFORE = (  # heading, name of the value, its unit, how it is written; between the two come metrics
    ("trained", "trained", 1, ",.0f"),
    ("learning rate", "lr", 1, "g"),
    ("loss before", "loss_before", 1, ".4f"),
    ("after", "loss_after", 1, ".4f"),
)
_EXACT = ("exact match", "exact_match", 1, ".1%")
_BEHIND = (
    ("ms a step", "step_ms", 1, ".0f"),
    ("adapter KiB", "adapter_bytes", 2**10, ",.1f"),
    ("peak MiB", "peak_bytes", 2**20, ",.0f"),
)
_SPREAD = ("loss_before", "loss_after", "exact_match")  # that have a deviation, beside metrics


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The heading and the rows as texts, with a column for each metric that some of them have."""
    exact = [_EXACT] if any(row.exact_match is not None for row in rows) else []
    metrics = [(name, name, 1, ".4f") for name in dict.fromkeys(name for row in rows for name in row.scores)]
    columns = [*_BEFORE, *exact, *metrics, *_BEHIND]
    head = ["run", *(heading for heading, *_ in columns)]
    return [head, *([row.method, *(row.cell(*column) for _, *column in columns)] for row in rows)]


def text(rows: Sequence[Row]) -> str:
    """The table for people, with what failed below it."""
    failed = [f"{row.method}: {row.error}" for row in rows if row.error]
    return "".join(f"{line}\n" for line in [*report.table(_cells(rows)), *([""] if failed else []), *failed])


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README."""
    head, *rest = _cells(rows)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def averaged(name: str, rows: Sequence[Row]) -> Row:
    """The means of runs that differ by their seeds, with the standard deviations (n - 1) of losses and metrics."""
    failed = [row.error for row in rows if row.error]
    if failed:
        return Row(name, error=f"{len(failed)} of {len(rows)} seeds failed: {failed[0]}")
    values = {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(Row)}
    numbers = {key: found for key, found in values.items() if all(isinstance(one, int | float) for one in found)}
    common = [key for key in rows[0].scores if all(key in row.scores for row in rows)]
    scores = {key: [row.scores[key] for row in rows] for key in common}
    spread = {key: statistics.stdev(found) for key, found in (numbers | scores).items() if key in (*_SPREAD, *scores)}
    means = {key: found[0] if len(set(found)) == 1 else statistics.fmean(found) for key, found in numbers.items()}
    return Row(name, **means, scores={key: statistics.fmean(found) for key, found in scores.items()}, deviations=spread)


def write(out: Path, rows: Sequence[Row], mean: Row | None = None) -> None:
    """Writes the table into a directory, as JSON and as Markdown."""
    last = {} if mean is None else {"mean": dataclasses.asdict(mean)}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / JSON, {"rows": [dataclasses.asdict(row) for row in rows]} | last)
    files.write_text(out / MARKDOWN, markdown([*rows, mean] if mean else rows))


def stored(out: Path) -> dict[str, Row]:
    """The rows that `write` left in a directory, by name."""
    found = files.read_json(out / JSON)["rows"] if (out / JSON).is_file() else []
    return {row["method"]: Row(**row) for row in found}
