"""Options that several verbs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from refpeft import choices


def plugins(command: Callable) -> Callable:
    """`-p` and `--plugins-dir`: plugins beside the shipped ones, known before the verb runs."""
    one = click.option(
        "-p", "plugin_sources", metavar="FILE|MODULE", multiple=True, is_eager=True, expose_value=False, callback=_add,
        help="Also know the plugin in this file or module. Repeatable.",
    )  # fmt: skip
    folder = click.option(
        "--plugins-dir", metavar="DIR", multiple=True, is_eager=True, expose_value=False, callback=_add,
        help="Also know every plugin in this folder. Repeatable; REFPEFT_PLUGINS adds more.",
    )  # fmt: skip
    return one(folder(command))


def _add(ctx: click.Context, option: click.Parameter, sources: tuple[str, ...]) -> None:
    if sources:
        from refpeft import manager

        manager.add(*sources)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def model(command: Callable) -> Callable:
    """How a model is loaded."""
    for option in (
        click.option("--dtype", type=click.Choice(choices.DTYPES), help="Default: the adapter's run's."),
        click.option("--device", type=click.Choice(choices.DEVICES), default="cpu", show_default=True),
        click.option(
            "--quantizer", metavar="NAME|none", help="Quantize frozen weights. Default: as in the adapter's run."
        ),
        click.option("--double-quant", is_flag=True, help="Quantize the quantizer's constants, too."),
        click.option("--adapter", metavar="DIR", help="An adapter directory, such as a run's."),
        click.option(
            "--model", metavar="PATH|ID", help="A directory, a GGUF file or a hub id. Default: the adapter's own."
        ),
    ):
        command = option(command)
    return command


task = click.option("--task", type=click.Choice(choices.TASKS), help="Default: what the adapter or model was made for.")

labels = click.option(
    "--labels", metavar="A,B,...", callback=lambda ctx, option, text: tuple(text.split(",")) if text else (),
    help="The labels' names in the order of their numbers, where adapter and model do not say them.",
)  # fmt: skip

fields = click.option(
    "--fields", metavar="text=COLUMN,label=COLUMN", callback=lambda ctx, option, text: columns(text) if text else {},
    help="What the file calls the columns of a format, where that does not tell itself.",
)  # fmt: skip


def columns(text: str) -> dict[str, str]:
    """`--fields` as data.fields: {column of a format: column of the file}."""
    from refpeft.errors import RefpeftError

    pairs = [part.partition("=") for part in text.split(",")]
    found = {ours.strip(): its.strip() for ours, _, its in pairs}
    if not all(map(all, pairs)) or len(found) < len(pairs):
        raise RefpeftError(f"--fields is {text!r}: expected text=COLUMN,label=COLUMN, each of a format's columns once")
    return found


def echo_json(value: Any) -> None:
    """Prints `value` as JSON."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show(plan: Any, json: bool) -> None:
    """Prints a plan, for people or as JSON."""
    if json:
        echo_json(plan.as_dict())
    else:
        click.echo(plan.text(), nl=False)


def load(
    model: str | None, adapter: str | None, quantizer: str | None, double_quant: bool, dtype: str | None, device: str,
    task: str | None = None, labels: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """The model that the options name, kept as the adapter's run had it where they do not say how."""
    from refpeft import api, config, run
    from refpeft.errors import RefpeftError
    from refpeft.models import hub

    if not (model or adapter):
        raise RefpeftError("there is no model: give --model, or --adapter with a run's directory")
    trained_for = config.written(adapter).get("task")
    if task and trained_for in ("classify", "regress", "tag") and task != trained_for:
        raise RefpeftError(f"{adapter} was trained, with its head, for the task {trained_for!r}: leave --task out")
    if not model:
        model = run.base_model(adapter)
        try:
            hub.resolve(model)
        except RefpeftError as error:
            raise RefpeftError(f"{error}; it is the model of {adapter}: give --model if it has moved") from None
    how = run.how_kept(adapter, quantizer, device)
    how["double_quant"] |= double_quant
    how["dtype"] = dtype or how["dtype"]
    return api.load(model, adapter, device=device, task=task, labels=labels, **how)
