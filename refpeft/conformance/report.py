"""A run's report as text, JSON, JUnit XML and HTML."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from .expected_failures import idle, names
from .runner import ERROR, FAILED, NOT_IMPLEMENTED, PASSED, Report, Verdict
from .vectors import notes

_ONE_ROW = ("method", "quantizer", "optimizer")
"""Kinds that have a row for each name; the others have one together."""


def rows(report: Report) -> list[dict[str, Any]]:
    """The table: a row for each method, quantizer and optimizer, and for each other kind.

    name, kind, places ({where: Counter of statuses}) and share, the largest of a limit that was used, or -1.
    """
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for verdict in report.verdicts:
        case = verdict.case
        name = case.name if case.kind in _ONE_ROW else case.kind
        row = table.setdefault((case.kind, name), {"name": name, "kind": case.kind, "places": {}, "share": -1.0})
        row["places"].setdefault(case.at or case.kind, Counter())[_word(verdict)] += 1
        if verdict.results:
            row["share"] = max(row["share"], verdict.share)
    return list(table.values())


def _word(verdict: Verdict) -> str:
    """What the table counts a run as."""
    return "expected" if verdict.wrong and verdict.expected is not None else verdict.status


# ---- text ------------------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The whole report for people."""
    lines = [f"{report.name} {report.version}", ""]
    lines += _table(report)
    lines += [f"! {problem}" for problem in report.problems]
    failures = [verdict for verdict in report.unexpected if verdict.wrong]
    for verdicts in _by_case(report.unexpected):
        lines += ["", *_told(verdicts)]
    if failures:
        lines += ["", "what the flags of these cases mean, the likeliest first"]
        lines += [f"  {line}" for line in _flags(report, failures)]
    expected = Counter(v.expected for v in report.verdicts if v.wrong and v.expected is not None)
    if expected:
        lines += ["", "failures that are expected"]
        lines += [f"  {count:5}  {reason}" for reason, count in expected.items()]
    return "\n".join([*lines, "", summary(report)]) + "\n"


def summary(report: Report) -> str:
    """One line."""
    expected = sum(verdict.wrong and verdict.expected is not None for verdict in report.verdicts)
    wrong = Counter(verdict.status for verdict in report.unexpected)
    counts = {
        "passed": report.count(PASSED) - wrong[PASSED],
        "failed": wrong[FAILED],
        "gave no answer": wrong[ERROR],
        "failed as expected": expected,
        "passed though expected to fail": wrong[PASSED],
        "not implemented": report.count(NOT_IMPLEMENTED),
        "problems with the vectors or the list": len(report.problems),
    }
    said = [f"{count:,} {what}" for what, count in counts.items() if count or what in ("passed", "failed")]
    return ", ".join(said) + f"; {len({v.case.id for v in report.verdicts}):,} cases"


def _table(report: Report) -> list[str]:
    lines = []
    for row in rows(report):
        places = ", ".join(_cell(place, counts) for place, counts in row["places"].items())
        if all(set(counts) == {NOT_IMPLEMENTED} for counts in row["places"].values()):
            places = "not implemented"
        lines.append((row["name"], row["kind"], _share(row), places))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
    return ["  ".join([*(part.ljust(w) for part, w in zip(line[:3], widths, strict=True)), line[3]]) for line in lines]


def _cell(place: str, counts: Counter) -> str:
    """Such as `linear 11/12 !`: of the runs that are implemented, how many pass."""
    run = counts.total() - counts[NOT_IMPLEMENTED]
    if not run:
        return f"{place} -"
    marks = ("!" if counts[FAILED] or counts[ERROR] else "") + ("x" if counts["expected"] else "")
    return f"{place} {counts[PASSED]}/{run}" + (f" {marks}" if marks else "")


def _share(row: dict[str, Any]) -> str:
    share = row["share"]
    if share < 0:
        return ""
    return "worst: not a number" if math.isinf(share) else f"worst {share:.2g} of the limit"


def _by_case(verdicts: Iterable[Verdict]) -> list[list[Verdict]]:
    """Verdicts of one case that say the same in several dtypes, together."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.case.id, verdict.status), []).append(verdict)
    return list(groups.values())


def _told(verdicts: list[Verdict]) -> list[str]:
    """Unexpected verdicts of one case in lines, the numbers those of the first."""
    first, case = verdicts[0], verdicts[0].case
    what = f"{case.id} in {' and '.join(v.dtype for v in verdicts)}"
    if not first.wrong:
        return [f"PASSES {what}, expected to fail: {first.expected}"]
    head = f"{'FAILS' if first.status == FAILED else 'NO ANSWER'} {what} ({case.level})"
    about = [part for part in (case.comment, *first.problems, " ".join(case.flags)) if part]
    return [head, *(f"    {line}" for line in about)]


def _flags(report: Report, verdicts: Iterable[Verdict]) -> list[str]:
    explained = notes()
    lines = []
    for flag, (failed, run) in report.flags(verdicts).items():
        note = explained.get(flag, {})
        lines.append(
            f"{flag}: {failed} of {run} with it fail. {note.get('mistake', '')} {note.get('mend', '')}".rstrip()
        )
    return lines


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as JSON."""
    return {
        "name": report.name,
        "version": report.version,
        "ok": report.ok,
        "summary": summary(report),
        "problems": report.problems,
        "flags": {
            flag: {"failed": failed, "run": run}
            for flag, (failed, run) in report.flags(v for v in report.verdicts if v.wrong).items()
        },
        "runs": [
            {
                "id": verdict.case.id,
                "dtype": verdict.dtype,
                "status": verdict.status,
                "unexpected": verdict.unexpected,
                "expected_failure": verdict.expected,
                "problems": verdict.problems,
                "flags": verdict.case.flags,
                "outputs": {
                    r.output: {"error": None if math.isinf(r.error) else r.error, "limit": r.limit}
                    for r in verdict.results
                },
            }
            for verdict in report.verdicts
        ],
    }


def as_junit(report: Report) -> str:
    """JUnit XML, as CI systems read it."""
    count = len(report.verdicts) + len(report.problems)
    suite = ElementTree.Element("testsuite", name=f"{report.name} {report.version}", tests=str(count))
    failures = sum(v.unexpected and v.status != ERROR for v in report.verdicts) + len(report.problems)
    skipped = sum(not v.unexpected and v.status != PASSED for v in report.verdicts)
    errors = sum(v.unexpected and v.status == ERROR for v in report.verdicts)
    suite.attrib |= {"failures": str(failures), "errors": str(errors), "skipped": str(skipped)}
    for verdict in report.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=verdict.case.name, name=verdict.key)
        if verdict.unexpected:
            kind, lines = ("error" if verdict.status == ERROR else "failure"), _told([verdict])
            ElementTree.SubElement(case, kind, message=_xml(lines[0])).text = _xml("\n".join(lines))
        elif verdict.status != PASSED:
            why = verdict.reason if verdict.status == NOT_IMPLEMENTED else f"expected to fail: {verdict.expected}"
            ElementTree.SubElement(case, "skipped", message=_xml(why))
    for problem in report.problems:
        case = ElementTree.SubElement(suite, "testcase", classname="vectors", name=_xml(problem))
        ElementTree.SubElement(case, "failure", message=_xml(problem))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _xml(line: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff") else "?" for c in line)


# ---- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f5f5f2 } code { font-size: .93em } .bad { color: #b00020 } .soft { color: #777 }
"""


def as_html(report: Report) -> str:
    """One page that needs nothing else."""
    escape = html.escape
    title = escape(f"{report.name} {report.version}")
    parts = [
        f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}: conformance</title>\n<style>{_STYLE}</style>',
        f'<h1>{title}</h1>\n<p class="{"" if report.ok else "bad"}">{escape(summary(report))}</p>',
        *(f'<p class="bad">{escape(problem)}</p>' for problem in report.problems),
        "<table>\n<tr><th>name<th>kind<th>passed / run<th>largest share of a limit",
    ]
    for row in rows(report):
        cells = ", ".join(_cell(place, counts) for place, counts in row["places"].items())
        bad = any(counts[FAILED] or counts[ERROR] for counts in row["places"].values())
        style = ' class="bad"' if bad else ""
        parts.append(f"<tr{style}><td>{escape(row['name'])}<td>{row['kind']}<td>{escape(cells)}<td>{_share(row)}")
    parts.append("</table>")
    if report.unexpected:
        parts.append("<h2>Not as expected</h2>")
        for verdicts in _by_case(report.unexpected):
            head, *rest = _told(verdicts)
            parts.append(f"<p><b>{escape(head)}</b><br>" + "<br>".join(escape(line.strip()) for line in rest))
    wrong = [verdict for verdict in report.verdicts if verdict.wrong]
    if wrong:
        parts.append("<h2>What the flags mean</h2>\n<ul>")
        parts += [f"<li>{escape(line)}" for line in _flags(report, wrong)]
        parts.append("</ul>")
    expected = [verdict for verdict in wrong if verdict.expected is not None]
    if expected:
        parts.append("<h2>Failures that are expected</h2>\n<table>")
        for v in expected:
            problem = escape(v.problems[0])
            parts.append(f'<tr><td>{escape(v.key)}<td>{escape(v.expected or "")}<td class="soft">{problem}')
        parts.append("</table>")
    return "\n".join(parts) + "\n"


# ---- expected failures -----------------------------------------------------------------------------------------------


def starter(report: Report, patterns: dict[str, str], all_ids: Iterable[str] = ()) -> dict[str, str]:
    """Expected failures that make this run as it should be: what of `patterns` still holds, and every other failure.

    A case that fails in all dtypes that it was run in is named once. Patterns that name other cases of `all_ids`, of
    the whole suite, alone stay as they are: this run says nothing about them.
    """
    all_ids = list(all_ids)

    def holds(pattern: str) -> bool:
        named = [v for v in report.verdicts if names(pattern, v.case.id, v.dtype)]
        if not named:
            return not idle([pattern], all_ids)
        return any(v.wrong for v in named) and not any(v.status == PASSED for v in named)

    kept = {pattern: why for pattern, why in patterns.items() if holds(pattern)}
    by_id: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        if verdict.status != NOT_IMPLEMENTED:
            by_id.setdefault(verdict.case.id, []).append(verdict)
    for id, verdicts in by_id.items():
        wrong = [v for v in verdicts if v.wrong and not any(names(p, id, v.dtype) for p in kept)]
        whole = len(wrong) == len(verdicts)
        for verdict in wrong[:1] if whole else wrong:
            kept[id if whole else verdict.key] = verdict.problems[0]
    return kept
