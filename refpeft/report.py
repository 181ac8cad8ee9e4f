"""What a run says: a progress line, metrics.jsonl, and the report at its end.

The trainer calls its listeners with records:
    {"event": "start", "step": steps already done, "steps": steps in all}
    {"event": "step", "step", "loss", "lr", "grad_norm", "tokens", "supervised", "seconds"}   tokens without padding
    {"event": "evaluation", "step", "eval_loss"}
    {"event": "checkpoint", "step", "path"}
"""

from __future__ import annotations

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
    """A listener that appends steps and evaluations to metrics.jsonl; a resumed run first drops what came after."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __call__(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "start":
            self._keep(record["step"])
        elif event == "step":
            seconds = max(record["seconds"], 1e-9)
            self._append(
                {
                    "step": record["step"],
                    "loss": record["loss"],
                    "lr": record["lr"],
                    "grad_norm": record["grad_norm"],
                    "tokens_per_second": round(record["tokens"] / seconds, 1),
                    "supervised_per_second": round(record["supervised"] / seconds, 1),
                }
            )
        elif event == "evaluation":
            self._append({"step": record["step"], "eval_loss": record["eval_loss"]})

    def _keep(self, step: int) -> None:
        """Rewrites the file with the records of steps up to `step`; a line cut short by a kill is dropped."""
        kept = []
        if self.path.exists() and step:
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        files.write_text(self.path, "".join(line + "\n" for line in kept))

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """A listener that shows a run as it goes: one live line on a terminal, else plain lines, each `log_every` steps."""

    def __init__(self, log_every: int = 10, stream: IO[str] | None = None):
        self.log_every = log_every
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._steps = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._drawn = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        event, step = record["event"], record["step"]
        if event == "start":
            self._steps = record["steps"]
            if step:
                self._say(f"resumed after step {step}")
        elif event == "step":
            self._recent.append(record)
            if self._console.is_terminal:
                self._draw(last=step == self._steps)
            elif step % self.log_every == 0 or step in (1, self._steps):
                self._say(self._line())
        elif event == "evaluation":
            self._say(f"step {step}: held-out loss {record['eval_loss']:.4f}")
        elif event == "checkpoint":
            self._say(f"step {step}: saved {record['path']}")

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
        left = (self._steps - record["step"]) * seconds / len(self._recent)
        return (
            f"step {record['step']}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"grad {record['grad_norm']:.3g}  {speed['tokens']:,.0f} tokens/s ({speed['supervised']:,.0f} supervised)  "
            f"{size(resident())}  {duration(left)} left"
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
            written = sorted(path for path in self.directory.iterdir() if path.is_file())
            rows = [(f"  {path.name}", size(path.stat().st_size)) for path in written]
            parts.append([f"files in {self.directory}", *table(rows)])
        if self.next_commands:
            parts.append(["next", *(f"  {command}" for command in self.next_commands)])
        return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _quoted(name: str, value: str) -> list[str]:
    first, *rest = value.splitlines() or [""]
    return [f"  {name:<7} {first}", *(f"          {line}" for line in rest)]


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns: the first to the left, the others to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


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
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
