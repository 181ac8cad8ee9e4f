"""Tries the seeded mistakes: `python tests/mutations [--write] [WORD ...]`.

Prints the table of golden/README.md, or its rows with one of the words, and what a mistake that is not caught led to.
With --write the table is put into golden/README.md, at its end. Exit code 1 where a mistake is not caught, or a case
that is to catch one fails without any.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from seeded import ROOT, Mistake, Outcome, mistakes, outcome, outcome_without

README = ROOT / "golden" / "README.md"
HEAD = "| mistake | in | flag | caught by |\n|---|---|---|---|\n"


def row(mistake: Mistake, found: Outcome) -> str:
    """A line of the table."""
    return f"| {mistake.what.replace('|', chr(92) + '|')} | `{mistake.file}` | {mistake.flag} | {found.caught_by} |\n"


def main() -> int:
    parser = argparse.ArgumentParser("python tests/mutations")
    parser.add_argument("words", nargs="*", help="only mistakes with one of these in their file, flag or description")
    parser.add_argument("--write", action="store_true", help="put the table into golden/README.md")
    arguments = parser.parse_args()
    chosen = [
        one
        for one in mistakes()
        if not arguments.words or any(word in f"{one.file} {one.flag} {one.what}" for word in arguments.words)
    ]
    as_it_is, rows, survivors = outcome_without(chosen), [], 0
    for mistake in chosen:
        found = outcome(mistake)
        rows.append(row(mistake, found))
        print(rows[-1], end="", flush=True)
        if not found.wrong:
            survivors += 1
            print(*(f"    {line}" for line in found.broken), sep="\n")
    print(
        f"{len(chosen)} mistakes of {len({one.flag for one in chosen})} flags, {survivors} not caught", file=sys.stderr
    )
    failing = [*as_it_is.wrong, *as_it_is.broken]
    if failing:
        print(f"fails without a mistake: {', '.join(failing)}", file=sys.stderr)
    if arguments.write:
        README.write_text(README.read_text("utf-8").partition(HEAD)[0] + HEAD + "".join(rows), "utf-8")
    return bool(survivors or failing)


if __name__ == "__main__":
    sys.exit(main())
