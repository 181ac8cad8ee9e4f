"""The verbs for authors of plugins: check, new-method."""

from __future__ import annotations

import contextlib
import sys

import click

from refpeft.commands import options


@click.command()
@click.argument("plugin")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="An option of the plugin, such as r=4.")
@options.as_json
@options.plugins
@click.pass_context
def check(ctx: click.Context, plugin: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Holds PLUGIN, a file or a name, to what is promised of a method or a quantizer: one line for each property.

    It is tried on tiny models that are made for this. The exit code is 1 where something failed.
    """
    from refpeft import config
    from refpeft.conformance.check import check as checked

    problems = config.Problems()
    given = config.read_sets(sets, problems)
    problems.finish()
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is no report
        report = checked(plugin, {key: value.value for key, value in given.items()})
    if as_json:
        options.echo_json(report.as_dict())
    else:
        click.echo(report.text(), nl=False)
    ctx.exit(1 if report.having("FAILED") else 0)


@click.command("new-method")
@click.argument("name")
@click.option("--dir", "directory", metavar="DIR", default=".", help="Where to write. Default: here.")
def new_method(name: str, directory: str) -> None:
    """Writes NAME.py, a small working method to start from, with a test and a make script beside it."""
    from refpeft.conformance import new_method as template

    for path in template.write(name, directory):
        click.echo(path)
