"""The verb doctor: what works on this machine, and what would bring the rest."""

from __future__ import annotations

import click

from refpeft.commands import options


@click.command()
@options.as_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Prints what is there for refpeft on this machine: libraries, CuPy, driver, GPU, kernels.

    What is missing comes with the line for pip that brings it. Exit code 1 where something that is there, or needed,
    does not work.
    """
    import dataclasses

    from refpeft import doctor as looking

    found = looking.examine()
    if as_json:
        options.echo_json([dataclasses.asdict(finding) for finding in found])
    else:
        click.echo(looking.text(found), nl=False)
    ctx.exit(int(any(finding.state == looking.BROKEN for finding in found)))
