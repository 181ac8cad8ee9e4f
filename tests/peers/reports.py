"""Other implementations under test: which there are, and golden/reports/, made by `python tests/peers/reports.py [NAME ...]`.

A peer is one file beside this one, NAME.py, with a class that `refpeft conform` takes, and NAME.toml: what it fails,
and why. What a reason begins with says whose cause it is: "defect: ", "choice: " (the paper leaves it open, or two
definitions are common), or "precision: " (it computes in another dtype than it was asked for).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """An implementation under test. `needs`: what must be installed, and how its version begins, ours first."""

    name: str
    file: str
    implementation: str
    needs: dict[str, str]

    @property
    def path(self) -> Path:
        return HERE / f"{self.file}.py"

    @property
    def expected_failures(self) -> Path:
        return HERE / f"{self.file}.toml"

    @property
    def installed(self) -> bool:
        """Whether what it needs is there, in these versions."""
        try:
            return all(metadata.version(name).startswith(version) for name, version in self.needs.items())
        except metadata.PackageNotFoundError:
            return False


PEERS = (
    Peer("peft-0.21.2", "peft_0_21", "Peft", {"peft": "0.21.", "torch": "2.", "transformers": "5."}),
    # a line for each peer; its report is golden/reports/<name>.md
)
