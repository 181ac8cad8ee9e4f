"""The verb that runs an implementation through the golden vectors."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from refpeft import choices
from refpeft.commands import options


def _words(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(word for word in (text or "").split(",") if word)


@click.command("conform")
@click.argument("implementation", metavar="IMPL")
@click.argument("folder", required=False)
@click.option("--methods", "names", metavar="A,B,...", callback=_words, help="Methods, quantizers, operations; globs.")
@click.option("--kinds", metavar="A,B,...", callback=_words, help="Kinds of cases, such as method, fused, quantizer.")
@click.option("--flags", metavar="A,B,...", callback=_words, help="Cases for these mistakes, such as Scaling.")
@click.option("--cases", "ids", metavar="A,B,...", callback=_words, help="Cases by id; globs.")
@click.option("--dtype", "dtypes", multiple=True, help="Of those that IMPL says that it has. Repeatable.")
@click.option("--xfails", metavar="FILE", help='TOML: "glob over ids, or id@dtype" = "reason"; strict.')
@click.option("--write-xfails", metavar="FILE", help="Write such a list of what fails now, for a start.")
@click.option("--json", "as_json", metavar="FILE", help="Write the report as JSON; - for standard output.")
@click.option("--junit", metavar="FILE", help="Write it as JUnit XML.")
@click.option("--html", metavar="FILE", help="Write it as a page.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, metavar="S",
    help="Seconds that a program has for an answer.",
)  # fmt: skip
@click.option("--device", type=click.Choice(choices.DEVICES), default="cpu", show_default=True, help="For refpeft.")
@click.option("--vectors", metavar="DIR", help="Other cases than refpeft's own.")
@options.plugins
@click.pass_context
def conform(
    ctx: click.Context, implementation: str, folder: str | None, names: tuple[str, ...], kinds: tuple[str, ...],
    flags: tuple[str, ...], ids: tuple[str, ...], dtypes: tuple[str, ...], xfails: str | None, write_xfails: str | None,
    as_json: str | None, junit: str | None, html: str | None, timeout: float, device: str, vectors: str | None,
) -> None:  # fmt: skip
    """Runs an implementation through the golden vectors, and says what is wrong and why.

    IMPL is `refpeft` itself; FILE.py:NAME or package.module:NAME, a class or object in Python; or the command line of a
    program in any language ("node harness.mjs"), which speaks JSON lines. golden/README.md says what each has to do.

    \b
    refpeft conform copy DIR          writes the vectors to a new folder
    refpeft conform compare FOLDER    answers in files, FOLDER/<id>.<dtype>.safetensors

    Exit code 1 where anything is not as expected.
    """
    from refpeft.conformance import expected_failures, report, results, runner, selection
    from refpeft.conformance.vectors import collect
    from refpeft.errors import RefpeftError
    from refpeft.files import write_json, write_text

    if implementation in ("copy", "compare") and not folder:
        raise click.UsageError(f"`refpeft conform {implementation}` needs a folder", ctx)
    if implementation not in ("copy", "compare") and folder:
        raise click.UsageError(f"{folder!r} is one word too many: a command line is one, in quotation marks", ctx)
    if implementation == "copy":
        click.echo(f"{len(collect()[0]):,} cases in {results.copy(folder)}; README.md there says how to use them")
        return
    if "-" in (junit, html, write_xfails):
        raise click.UsageError("only --json writes to standard output, with -: name a file", ctx)
    for path in (as_json, junit, html, write_xfails):  # said before the run, which may take long
        if path and path != "-" and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
            raise RefpeftError(f"{path}: cannot be written: expected a file in a folder that is there and writable")
    whole, problems = collect(Path(vectors) if vectors else None)
    cases = selection.chosen(whole, names=names, kinds=kinds, flags=flags, ids=ids)
    patterns = expected_failures.read(xfails) if xfails else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # what an implementation prints is no report
        mine = _implementation(implementation, folder, timeout, device, stack)
        if isinstance(mine, results.Results):
            problems = [*problems, *mine.strangers({case.id for case in whole})]
        told = _progress(len(cases))
        every = [case.id for case in whole]
        done = runner.conform(mine, cases, dtypes or None, patterns, all_ids=every, problems=problems, told=told)
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)
    if not done.verdicts:
        raise RefpeftError(f"none of these cases is for {', '.join(dtypes or mine.dtypes)}")
    if as_json == "-":
        options.echo_json(report.as_json(done))
    else:
        click.echo(report.text(done), nl=False)
    if as_json and as_json != "-":
        write_json(as_json, report.as_json(done))
    for path, made in ((junit, report.as_junit), (html, report.as_html)):
        if path:
            write_text(path, made(done))
    if write_xfails:
        write_text(write_xfails, expected_failures.text(report.starter(done, patterns, every)))
    ctx.exit(0 if done.ok else 1)


def _implementation(text: str, folder: str | None, timeout: float, device: str, stack: contextlib.ExitStack) -> Any:
    from refpeft.conformance import programs, results, selection

    if text == "compare":
        return results.Results(folder)
    if text == "refpeft":
        from refpeft.conformance.drivers import Refpeft

        return Refpeft(device)
    return selection.in_python(text) or stack.enter_context(programs.Program(text, timeout))


def _progress(cases: int) -> Any:
    """What tells, on a terminal, how far a run is."""
    if not sys.stderr.isatty():
        return lambda verdict: None
    done: set[str] = set()

    def told(verdict: Any) -> None:
        done.add(verdict.case.id)
        click.echo(f"\r\033[K{len(done):,} of {cases:,} cases: {verdict.case.id}", err=True, nl=False)

    return told
