"""Other implementations under test, and golden/reports/, made by `python tests/peers/reports.py [NAME ...]`.

A peer is one file beside this one, NAME.py, with a class that `refpeft conform` takes, and NAME.toml: what it fails,
and why. What a reason begins with says whose cause it is: "defect: ", "choice: " (the paper leaves it open, or two
definitions are common), or "precision: " (it computes in another dtype than it was asked for). It may end with the flag
of its cases that is meant, " [OftDirection]"; else the one that fails most often is told.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from refpeft.conformance import Report, Verdict, cases, conform, expected_failures
from refpeft.conformance.compare import EPS
from refpeft.conformance.report import rows, summary
from refpeft.conformance.runner import NOT_IMPLEMENTED, PASSED
from refpeft.conformance.vectors import notes, root

HERE = Path(__file__).resolve().parent
REPORTS = HERE.parents[1] / "golden" / "reports"


@dataclass(frozen=True)
class Peer:
    """An implementation under test. `needs`: what must be installed, and how its version begins, ours first."""

    name: str
    file: str
    implementation: str
    needs: dict[str, str]

    @property
    def expected_failures(self) -> dict[str, str]:
        path = HERE / f"{self.file}.toml"
        return expected_failures.read(path) if path.exists() else {}

    @property
    def installed(self) -> bool:
        """Whether what it needs is there, in these versions."""
        try:
            return all(metadata.version(name).startswith(version) for name, version in self.needs.items())
        except metadata.PackageNotFoundError:
            return False

    def report(self) -> Report:
        """What the whole suite gives."""
        made = getattr(importlib.import_module(self.file), self.implementation)()
        return conform(made, cases(), expected=self.expected_failures)


PEERS = (
    Peer("refpeft-numpy", "refpeft_itself", "on_numpy", {}),
    Peer("refpeft-cupy", "refpeft_itself", "on_cupy", {"cupy-cuda13x": "14."}),
    Peer("peft-0.21.2", "peft_0_21", "Peft", {"peft": "0.21.", "torch": "2.", "transformers": "5."}),
    Peer("bitsandbytes-0.50.2", "bitsandbytes_0_50", "Bitsandbytes", {"bitsandbytes": "0.50.", "torch": "2."}),
    Peer("torch-2.13.0", "torch_optimizers", "Torch", {"torch": "2."}),
    Peer("transformers-5.23.0", "transformers_5", "Transformers", {"transformers": "5.", "torch": "2."}),
    Peer(
        "adapters-1.3.0", "adapterhub_1_3", "AdapterHub", {"adapters": "1.3.", "transformers": "4.57.", "torch": "2."}
    ),
    Peer("loralib-0.1.2", "loralib_0_1", "Loralib", {"loralib": "0.1.", "transformers": "5.", "torch": "2."}),
    # a line for each peer; its report is golden/reports/<name>.md
)

CAUSES = {
    "defect": "It is not what the paper, its own documentation or another path through it says.",
    "choice": "The paper leaves it open, or two definitions are common.",
    "precision": "It computes in another dtype than it was asked for, or does not give back every bit.",
}

NAMED_FLAG = re.compile(r" \[(\w+)\]$")  # at the end of a reason


# ---- a report --------------------------------------------------------------------------------------------------------


def markdown(peer: Peer, report: Report) -> str:
    """The report of a peer: the same in every run of the same versions."""
    suite = json.loads((root() / "MANIFEST.json").read_text("utf-8"))["suite"]
    versions = {name: metadata.version(name) for name in (*peer.needs, "numpy")} | {"Python": platform.python_version()}
    said = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items())
    lines = [f"# {peer.name.replace('-', ' ')}", ""]
    lines += [f"Vectors {suite}. {said}. Made by `python tests/peers/reports.py {peer.name}`.", ""]
    lines += [f"{summary(report)}. A run is one case in one dtype.", ""]
    lines += [*table(report), *failures(report), *not_implemented(report)]
    return "\n".join(lines).rstrip() + "\n"


def table(report: Report) -> Iterator[str]:
    """A row for each method, quantizer, optimizer or kind of which there is anything."""
    yield "| | kind | passed | failed | not implemented | causes |"
    yield "|---|---|---|---|---|---|"
    for row in rows(report):
        counts = sum(row["places"].values(), Counter())
        verdicts = [v for v in report.verdicts if v.wrong and row["name"] in (v.case.name, v.case.kind)]
        verdicts = [v for v in verdicts if v.case.kind == row["kind"]]
        causes = ", ".join(dict.fromkeys(cause(v.expected) for v in verdicts))
        cells = (counts[PASSED], len(verdicts), counts[NOT_IMPLEMENTED])
        if counts[NOT_IMPLEMENTED] < counts.total():
            yield f"| `{row['name']}` | {row['kind']} | {' | '.join(str(n or '') for n in cells)} | {causes} |"
    yield ""


def cause(reason: str | None) -> str:
    return "unknown" if reason is None else reason.partition(":")[0]


def failures(report: Report) -> Iterator[str]:
    """Every group of failures of one cause."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        if verdict.wrong:
            groups.setdefault(verdict.expected or "unknown: nobody has found out yet", []).append(verdict)
    for kind in dict.fromkeys([*CAUSES, *map(cause, groups)]):
        of_kind = {reason: verdicts for reason, verdicts in groups.items() if cause(reason) == kind}
        if of_kind:
            yield from (f"## {kind.capitalize()}", "", CAUSES.get(kind, ""), "")
        for number, (reason, verdicts) in enumerate(of_kind.items(), 1):
            yield from group(report, number, reason, verdicts)


def group(report: Report, number: int, reason: str, verdicts: list[Verdict]) -> Iterator[str]:
    """A cause: its cases, the largest error, and the flag that says best what is wrong."""
    text = NAMED_FLAG.sub("", reason.partition(":")[2].strip())
    yield from (f"{number}. {text}.", "")
    yield f"   - {', '.join(said(report, verdicts))}"
    yield f"   - {largest_error(verdicts)}"
    flag = flag_to_explain(report, reason, verdicts)
    if flag:
        yield f"   - {explained(report, verdicts, flag)}"
    yield ""


def said(report: Report, verdicts: list[Verdict]) -> list[str]:
    """`id` where the case fails in every dtype that it was run in, else `id@dtype`."""
    passing = {verdict.case.id for verdict in report.verdicts if verdict.status == PASSED}
    return list(dict.fromkeys(f"`{v.key if v.case.id in passing else v.case.id}`" for v in verdicts))


def largest_error(verdicts: list[Verdict]) -> str:
    """The output that is farthest from what it should be, and the first of its elements that is wrong."""
    found = [
        (result.error * (1 if result.limit == 0 else EPS[verdict.dtype]), verdict, result)
        for verdict in verdicts
        for result in verdict.results
        if result.problem and math.isfinite(result.error)
    ]
    if not found:
        return f"`{verdicts[0].key}`: {verdicts[0].problems[0]}"
    error, verdict, result = max(found, key=lambda one: one[0])
    first = rounded(result.problem.partition(", first ")[2])
    of = "" if result.limit == 0 else " of its largest entry"  # what must be equal is not scaled
    return f"`{verdict.key}`: {result.output} is wrong by {error:.2g}{of}, first {first}"


def rounded(line: str) -> str:
    """Numbers to two digits, of which the last may differ with the machine."""
    return re.sub(r"-?\d+\.\d+(e[+-]?\d+)?|-?\d+e[+-]?\d+", lambda m: f"{float(m[0]):.2g}", line)


def flag_to_explain(report: Report, reason: str, verdicts: list[Verdict]) -> str | None:
    """The flag that the reason names; else the likeliest of the cases' flags, and none where a dtype is the cause.

    ValueError where the reason names a flag that none of the cases has.
    """
    flags = report.flags(verdicts)  # the likeliest first
    named = NAMED_FLAG.search(reason)
    if named and named[1] not in flags:
        there = ", ".join(flags) or "none"
        raise ValueError(f"{report.name}: no case that fails for {reason!r} has the flag {named[1]}: they have {there}")
    if named:
        return named[1]
    return None if cause(reason) == "precision" else next(iter(flags), None)


def explained(report: Report, verdicts: list[Verdict], flag: str) -> str:
    """How often cases with the flag fail, and what the notes say of it."""
    failed, run = report.flags(verdicts)[flag]
    note = notes().get(flag, {})
    return f"{flag} ({failed} of {run} runs fail): {note.get('mistake', '')} {note.get('mend', '')}".rstrip()


def not_implemented(report: Report) -> Iterator[str]:
    """Why, and of what."""
    reasons: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        if verdict.status == NOT_IMPLEMENTED:
            reasons.setdefault(verdict.reason, []).append(verdict)
    yield from ("## Not implemented", "")
    for reason, verdicts in sorted(reasons.items()):
        yield f"- {reason}: {', '.join(names(report, verdicts))}"


def names(report: Report, verdicts: list[Verdict]) -> list[str]:
    """The kinds, methods and places of these verdicts: kinds and methods as a whole where it is all of them."""
    kinds, methods = (Counter(key(v) for v in report.verdicts) for key in (kind_of, method_of))
    these_kinds, these_methods = (Counter(key(v) for v in verdicts) for key in (kind_of, method_of))
    found: dict[str, dict[str, None]] = {}
    whole: dict[str, None] = {}
    for v in verdicts:
        if these_kinds[kind_of(v)] == kinds[kind_of(v)]:
            whole[f"`{v.case.kind}`"] = None
        elif these_methods[method_of(v)] == methods[method_of(v)] or not v.case.at:
            found[v.case.name] = {}
        else:
            found.setdefault(v.case.name, {})[v.case.at] = None
    parts = [f"{name} ({', '.join(places)})" if places else name for name, places in sorted(found.items())]
    return [*parts, *([f"all of the kinds {', '.join(sorted(whole))}"] if whole else [])]


def kind_of(verdict: Verdict) -> str:
    return verdict.case.kind


def method_of(verdict: Verdict) -> tuple[str, str]:
    return verdict.case.kind, verdict.case.name


# ---- all of them -----------------------------------------------------------------------------------------------------


def overview() -> str:
    """A row for each report that is there, by what it says itself."""
    head = (
        "How other implementations do, and refpeft itself. Made by `python tests/peers/reports.py`, like each report."
    )
    lines = ["# Reports", "", head, "", "| | runs | causes of failures |", "|---|---|---|"]
    for peer in PEERS:
        path = REPORTS / f"{peer.name}.md"
        if path.exists():
            text = path.read_text("utf-8")
            counts = text.split("\n\n")[2].partition(". A run")[0]
            causes = {kind: len(re.findall(r"^\d+\. ", section(text, kind), re.M)) for kind in CAUSES}
            found = ", ".join(f"{n} {kind}{'s' * (n > 1 and kind != 'precision')}" for kind, n in causes.items() if n)
            lines.append(f"| [{peer.name.replace('-', ' ')}]({path.name}) | {counts} | {found} |")
    return "\n".join(lines) + "\n"


def section(text: str, kind: str) -> str:
    """What a report says below the heading of a kind of causes."""
    return text.partition(f"\n## {kind.capitalize()}\n")[2].partition("\n## ")[0]


def main(names: list[str]) -> None:
    unknown = set(names) - {peer.name for peer in PEERS}
    if unknown:
        sys.exit(f"there is no peer {', '.join(unknown)}: expected {', '.join(peer.name for peer in PEERS)}")
    REPORTS.mkdir(exist_ok=True)
    for peer in PEERS:
        if names and peer.name not in names:
            continue
        if not peer.installed:
            print(f"{peer.name}: not installed ({', '.join(f'{n} {v}' for n, v in peer.needs.items())})")
            continue
        report = peer.report()
        (REPORTS / f"{peer.name}.md").write_text(markdown(peer, report), "utf-8")
        print(f"{peer.name}: {summary(report)}")
    (REPORTS / "README.md").write_text(overview(), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
