"""The command line. Nothing heavy is imported here: a verb imports what it needs when it runs, so that help is instant.

A mistake is its message on stderr and exit code 2, never a traceback; Ctrl-C is 130.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import click

from refpeft import __version__
from refpeft.commands import check, conform, doctor, generate, inspect, plan, predict, quantize, train, use
from refpeft.errors import RefpeftError, RefpeftWarning, nearest


class Verbs(click.Group):
    """The verbs in the order in which they were added; mistakes as messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            hint = nearest(args[0], self.commands) or f"; there are {', '.join(self.commands)}"
            raise click.UsageError(f"no verb is named {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except RefpeftError as error:
            message = str(error)
        except BrokenPipeError:
            raise  # click ends quietly: whoever read the output has had enough
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        except MemoryError as error:
            what = f": {error}" if str(error) else ""
            message = f"out of memory{what}; `refpeft train --dry-run` shows what takes how much"
        except KeyboardInterrupt:
            ctx.exit(130)
        click.echo(message, err=True)
        ctx.exit(2)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Within it a RefpeftWarning is one line on stderr, once for each text."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", RefpeftWarning)
        other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, RefpeftWarning):
                click.echo(f"warning: {message}", err=True)
            else:
                other(message, category, *rest)

        warnings.showwarning = show
        yield


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def main() -> None:
    """Fine-tunes language models with few trained parameters, on NumPy or CuPy alone.

    Start with `refpeft train`: without arguments it trains LoRA on a small model and a task that ship with it.
    """


for verb in (
    train.train,
    plan.plan,
    train.compare,
    use.evaluate,
    predict.predict,
    generate.generate,
    use.merge,
    use.export,
    quantize.quantize,
    conform.conform,
    inspect.data,
    inspect.sites,
    inspect.methods,
    inspect.quantizers,
    check.check,
    check.new_method,
    doctor.doctor,
):
    main.add_command(verb)
