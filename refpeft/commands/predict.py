"""The verb that writes what a model says of the rows of a file: predict."""

from __future__ import annotations

from typing import Any

import click

from refpeft.commands import options


@click.command()
@click.argument("data", metavar="FILE")
@options.model
@options.task
@options.labels
@click.option("--out", metavar="FILE", help="Where the predictions go, a JSON object a line. Default: standard output.")
@click.option("--format", "kind", metavar="NAME", help="The format of the rows; else it is told from their columns.")
@options.fields
@click.option("--length", type=click.IntRange(min=2), metavar="N", help="The most tokens of a row; the rest is cut.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N")
@options.plugins
def predict(
    data: str, model: str | None, adapter: str | None, task: str | None, out: str | None, kind: str | None,
    fields: dict[str, str], length: int | None, batch: int, **how: Any,
) -> None:  # fmt: skip
    """Predicts labels, numbers, tags, texts or vectors for the rows of FILE, with probabilities.

    Each row is written as it is, in its order, with "line" (where it stands in FILE) and "predicted"; of a
    classification also "probability" and the "probabilities" of all labels. What would be learned may be missing.
    """
    import json

    from refpeft import config, files, inputs, tasks
    from refpeft.batches import Batches
    from refpeft.errors import RefpeftError

    if out:
        refuse(out, data)  # now, not after everything was predicted
    loaded = options.load(model, adapter, task=task, **how)
    if loaded.task is None:
        raise RefpeftError(f"this {loaded.config.family} model has no head: give --adapter, or --task embed")
    doing = tasks.make(loaded.task, loaded.tokenizer, loaded.config, labels=loaded.labels)
    configured = config.run_of(adapter)
    fields = fields or (configured.data.fields if configured else {})
    items, rows = inputs.to_predict(data, doing, loaded.config, kind, fields, length)
    for note in items.notes:
        click.echo(note, err=True)
    if rows.summary.overlong:
        click.echo(
            f"{rows.summary.overlong:,} rows have more than {rows.summary.length:,} tokens: the rest is cut", err=True
        )
    longest = max(map(len, rows.examples))
    found = dict(doing.predict(loaded, Batches(rows.examples, batch, longest, shuffle=False)))
    others = ({key: value for key, value in row.fields.items() if key != "line"} for row in items.rows)
    told = ({"line": row.line, **rest, **found[row.line]} for row, rest in zip(items.rows, others, strict=True))
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in told)
    if out:
        files.write_text(files.expanded(out), text)
        click.echo(f"{len(items.rows):,} predictions in {out}", err=True)
    else:
        click.echo(text, nl=False)


def refuse(out: str, data: str) -> None:
    """Raises RefpeftError where predictions cannot be written into a file, or would be over the rows."""
    import os

    from refpeft.errors import RefpeftError
    from refpeft.files import expanded

    path = expanded(out)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"cannot be written: there is no directory {path.parent}"
        raise RefpeftError(f"--out {out} {what}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RefpeftError(f"--out {out} cannot be written: no permission in {path.parent}")
    if path.exists() and expanded(data).exists() and path.samefile(expanded(data)):
        raise RefpeftError(f"--out {out} is the file of the rows: give another one")
