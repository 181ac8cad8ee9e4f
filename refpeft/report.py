"""What a run says: a progress line, metrics.jsonl, and the report at its end.

The trainer calls a listener with a dict for every step ({"step", "loss", "lr", "grad_norm", "tokens", "supervised",
"seconds"}, tokens without padding) and every evaluation ({"step", "eval_loss"}).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from refpeft import files

_REDRAW = 0.25  # seconds between redraws of the live line
_WINDOW = 20  # steps over which speed is averaged


class Metrics:
    """A listener that writes steps and evaluations to metrics.jsonl; a resumed run replaces what it computes again."""

    def __init__(self, path: str | Path, resume: bool = False, device: str = "cpu"):
        self.path, self.device, self._begun = Path(path), device, False
        if not resume:
            self.path.unlink(missing_ok=True)

    def __call__(self, record: dict[str, Any]) -> None:
        if not self._begun:
            self._begun = True
            self._drop_from(record)
        if "loss" in record:
            seconds = max(record["seconds"], 1e-9)
            record = {key: record[key] for key in ("step", "loss", "lr", "grad_norm", "seconds")} | {
                f"{key}_per_second": round(record[key] / seconds, 1) for key in ("tokens", "supervised")
            }
            record["peak_bytes"] = peak(self.device)
        with files.named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _drop_from(self, record: dict[str, Any]) -> None:
        """Drops the records from this one on, and a line that a kill cut short."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            files.write_text(self.path, "".join(line + "\n" for line in lines if _order(line) < _order(record)))


def _order(record: str | dict[str, Any]) -> tuple[float, bool]:
    """The place of a record (or of its line) in its file: a step's evaluation comes after the step."""
    try:
        found = json.loads(record) if isinstance(record, str) else record
        return found["step"], "eval_loss" in found
    except (ValueError, KeyError, TypeError):
        return math.inf, True


class Progress:
    """A listener that shows a run as it goes: one live line on a terminal, else plain lines, each `log_every` steps."""

    def __init__(self, log_every: int = 10, stream: IO[str] | None = None):
        self.log_every = log_every
        self.steps = 0  # in all; to be set before the first record
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._drawn = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if "eval_loss" in record:
            named = ("held-out loss" if name == "eval_loss" else name for name in record if name != "step")
            values = (value for name, value in record.items() if name != "step")
            self._say(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in zip(named, values, strict=True)))
            return
        if not self._recent and step > 1:
            self._say(f"goes on after step {step - 1}")
        self._recent.append(record)
        if self._console.is_terminal:
            self._draw(last=step == self.steps)
        elif step % self.log_every == 0 or step in (1, self.steps):
            self._say(self._line())

    def close(self) -> None:
        """Leaves the last state of the line on the screen."""
        if self._live:
            self._live.stop()
            self._live = None

    def _say(self, line: str) -> None:
        self._console.print(Text(line))  # above the live line, where there is one

    def _draw(self, last: bool) -> None:
        now = time.monotonic()
        if not self._live:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        if last or now - self._drawn >= _REDRAW:
            self._drawn = now
            self._live.update(Text(self._line(), no_wrap=True, overflow="ellipsis"), refresh=True)

    def _line(self) -> str:
        record, seconds = self._recent[-1], max(sum(r["seconds"] for r in self._recent), 1e-9)
        speed = {key: sum(r[key] for r in self._recent) / seconds for key in ("tokens", "supervised")}
        left = (self.steps - record["step"]) * seconds / len(self._recent)
        return (
            f"step {record['step']}/{self.steps}  {duration(left)} left  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  grad {record['grad_norm']:.3g}  "
            f"{speed['tokens']:,.0f} tokens/s ({speed['supervised']:,.0f} supervised)  {size(resident())}"
        )


@dataclass
class Sample:
    """One held-out row: its prompt, the wanted answer, and what the model said before and after."""

    prompt: str
    wanted: str
    before: str
    after: str


@dataclass
class Report:
    """What stands at the end of a run. `scores` are rows of the table: name, before, after; each value as text."""

    title: str
    scores: list[tuple[str, str, str]] = field(default_factory=list)
    sample: Sample | None = None
    directory: Path | None = None
    notes: Sequence[str] = ()
    next_commands: Sequence[str] = ()

    def text(self) -> str:
        """The report as plain text that ends in a line break."""
        parts = [[self.title, *self.notes]]
        if self.scores:
            parts.append(table([("", "before", "after"), *self.scores]))
        if self.sample:
            named = ("prompt", self.sample.prompt), ("wanted", self.sample.wanted)
            said = ("before", self.sample.before), ("after", self.sample.after)
            parts.append(
                ["one held-out row", *(line for name, value in (*named, *said) for line in _quoted(name, value))]
            )
        if self.directory:
            written = sorted(path for path in self.directory.rglob("*") if path.is_file())
            names = {path: path.relative_to(self.directory) for path in written}
            rows = [(f"  {n}", size(p.stat().st_size)) for p, n in names.items() if n.parts[0] != "checkpoints"]
            parts.append([f"files in {self.directory}", *table(rows)])
        if self.next_commands:
            parts.append(["next", *(f"  {command}" for command in self.next_commands)])
        return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _quoted(name: str, value: str) -> list[str]:
    first, *rest = value.splitlines() or [""]
    return [f"  {name:<7} {first}", *(f"          {line}" for line in rest)]


def table(rows: Iterable[Sequence[str]], right: bool = True) -> list[str]:
    """Rows as lines with aligned columns: the first to the left, the others to the right (or to the left, too)."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = "<" + (">" if right else "<") * (len(widths) - 1)
    line = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    return [line.format(*row).rstrip() for row in rows]


def size(count: float) -> str:
    """Bytes for people: "3.2 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: "41 s", "3:12", "2:03:04"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def resident() -> int:
    """Bytes of memory that this process holds now (on Linux), or its largest so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return peak()


def peak(device: str = "cpu") -> int:
    """The most bytes that this process has held so far: of memory, or of the GPU's, without what CUDA itself takes."""
    if device == "cuda":
        from refpeft.cuda import stretch

        return stretch.most_held()
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def forget_peak(device: str = "cpu") -> None:
    """From now on `peak` tells of what comes, beside what is held now; where the system cannot do that, nothing is."""
    if device == "cuda":
        from refpeft.cuda import stretch

        return stretch.forget_most()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
