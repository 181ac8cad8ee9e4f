"""The verbs that only look: methods, quantizers, sites, data."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

from refpeft import choices
from refpeft.commands import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refpeft.formats import Items


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print a table with what each trains of Llama-3-8B, as in the README.")
@options.as_json
@options.plugins
def methods(name: str | None, markdown: bool, as_json: bool) -> None:
    """Lists the methods by family, or one with its options."""
    if markdown:
        from refpeft import overview

        click.echo(overview.markdown(_chosen("method", name)), nl=False)
    else:
        _list("method", name, as_json)


@click.command()
@click.argument("name", required=False)
@options.as_json
@options.plugins
def quantizers(name: str | None, as_json: bool) -> None:
    """Lists the quantizers, or one with its options."""
    _list("quantizer", name, as_json)


def _chosen(kind: str, name: str | None) -> list[Any]:
    from refpeft import manager

    if name:
        manager.path_of(name, kind)
    return [
        listing for listing in manager.catalogue().values() if listing.kind == kind and name in (None, listing.name)
    ]


def _list(kind: str, name: str | None, as_json: bool) -> None:
    from refpeft import manager

    chosen = _chosen(kind, name)
    if as_json:
        options.echo_json([dataclasses.asdict(listing) for listing in chosen])
    elif name:
        click.echo("\n".join(_details(chosen[0])))
    else:
        width = max((len(listing.name) for listing in chosen), default=0)
        room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else math.inf
        for number, (family, listings) in enumerate(manager.by_family(chosen).items()):
            if kind == "method":
                click.echo("\n" * (number > 0) + f"# {family or 'of no family'}")
            for listing in listings:
                text = listing.summary if len(listing.summary) <= room else listing.summary[: int(room) - 3] + "..."
                click.echo(f"{listing.name:<{width}}  {text}")


def _details(listing: Any) -> list[str]:
    """A plugin in full: where it acts, and its options as they would stand in run.toml."""
    kinds = [h.removeprefix("peft_") for h in listing.hooks if h.removeprefix("peft_") in _SITE_KINDS]
    lines = [listing.summary, ""]
    if kinds:
        lines.append(
            f"acts on  {', '.join(kinds)}; {'merges' if 'peft_merge' in listing.hooks else 'cannot be merged'}"
        )
    lines += [f"file     {listing.path}", "", f"[{listing.name}]"]
    rows = [(f"{option.name} = {_as_toml(option.default)}", option.type, option.note) for option in listing.options]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return lines + [f"{value:<{widths[0]}}  # {kind:<{widths[1]}}  {note}".rstrip() for value, kind, note in rows]


def _as_toml(source: str) -> str:
    """A default's source text as it would stand in run.toml; unchanged where it is not a literal."""
    from refpeft import toml

    try:
        return toml.text(ast.literal_eval("{}" if source == "field(default_factory=dict)" else source))
    except (ValueError, SyntaxError):
        return source


_SITE_KINDS = ("linear", "embedding", "norm", "attention", "block")


@click.command()
@click.argument("model")
@click.option("--all", "every", is_flag=True, help="Every site on a line of its own; else layers are folded.")
@options.as_json
def sites(model: str, every: bool, as_json: bool) -> None:
    """Lists the sites of MODEL, the places where methods act."""
    from refpeft import memory, report
    from refpeft.models.checkpoint import open_checkpoint
    from refpeft.models.hub import resolve

    found = list(memory.skeleton(open_checkpoint(resolve(model))).sites.values())
    if as_json:
        keys = ("name", "kind", "shape", "roles", "tied")
        options.echo_json([{key: getattr(site, key) for key in keys} for site in found])
        return
    rows = [
        (site.name, site.kind, " x ".join(map(str, site.shape)), " ".join("@" + role for role in site.roles))
        for site in found
    ]
    if not every:
        rows = _folded(rows)
    click.echo("\n".join(report.table([("site", "kind", "shape", "roles"), *rows], right=False)))


def _folded(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows whose names differ in the layer's number alone, as one with the numbers: layers.{0-29}.mlp."""
    folded: dict[tuple[str, ...], list[int]] = {}
    for name, *rest in rows:
        layer = re.search(r"\.(\d+)\.", name)
        key = (name.replace(layer[0], ".{}.", 1) if layer else name, *rest)
        folded.setdefault(key, []).extend([int(layer[1])] if layer else [])
    return [(name.replace("{}", _spans(numbers)), *rest) for (name, *rest), numbers in folded.items()]


def _spans(numbers: list[int]) -> str:
    """Sorted numbers as "{0-3,5}"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return "{" + ",".join("-".join(map(str, span)) for span in spans) + "}"


@click.command()
@click.argument("file")
@click.option("--model", default="embedded", metavar="PATH|ID", help="Whose tokenizer and chat template read the rows.")
@click.option("--format", "kind", metavar="NAME", help="The format of the rows; else it is told from their columns.")
@options.fields
@click.option("--length", type=click.IntRange(min=2), metavar="N", help="The most tokens of a row.")
@click.option("--overlong", type=click.Choice(choices.OVERLONG), default="error")
@click.option("--supervise", type=click.Choice(choices.SUPERVISE), default="response")
@click.option(
    "--row", type=click.IntRange(min=1), default=1, metavar="N", help="Which example is shown. Default: the first."
)
@options.as_json
def data(
    file: str, model: str, kind: str | None, fields: dict[str, str], length: int | None, overlong: str, supervise: str,
    row: int, as_json: bool,
) -> None:  # fmt: skip
    """Shows what would be trained on in FILE: counts, and one example with what is learned in it in green.

    Of labelled texts and tagged words: the labels or tags with their counts, and one row.
    """
    from refpeft import tasks
    from refpeft.data import examples_of, load_data, runs, view
    from refpeft.errors import RefpeftError
    from refpeft.formats import FORMATS, read_items
    from refpeft.models.checkpoint import open_checkpoint
    from refpeft.models.hub import resolve

    read = read_items(file, kind, fields)
    if "causal-lm" not in FORMATS[read.format].tasks:
        _show_items(file, read, row, as_json)
        return
    checkpoint = open_checkpoint(resolve(model))
    tokenizer = checkpoint.tokenizer()
    if tasks.kind_of(checkpoint.config) != tasks.DECODER:
        task = tasks.make(tasks.name_of(None, read, checkpoint.config), tokenizer, checkpoint.config, read.items)
        lines = examples_of(read, task, file, length, overlong).summary.lines()
        _show_items(file, read, row, as_json, lines[1:])
        return
    how = {"length": length, "overlong": overlong, "supervise": supervise}
    rows = load_data(file, tokenizer, format=kind, fields=fields, **how)
    if row > len(rows.examples):
        raise RefpeftError(f"--row is {row}, but there are {len(rows.examples):,} examples")
    example = rows.examples[row - 1]
    if as_json:
        options.echo_json(
            rows.summary.as_dict() | {"example": {"line": example.line, "runs": runs(example, tokenizer)}}
        )
        return
    click.echo("\n".join(rows.summary.lines()))
    click.echo(f"\nexample {row}, line {example.line}, {len(example):,} tokens, {example.targets:,} learned")
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(view(example, tokenizer))
    else:
        click.echo(
            "".join(f"[learned]{r['text']}[/learned]" if r["learned"] else r["text"] for r in runs(example, tokenizer))
        )


def _show_items(file: str, read: Items, row: int, as_json: bool, more: Sequence[str] = ()) -> None:
    """Rows of which no single text is learned: what there is to be learned, `more` of it, and one of them."""
    from refpeft.errors import RefpeftError
    from refpeft.formats import FORMATS
    from refpeft.items import label_counts, label_lines

    if row > len(read.rows):
        raise RefpeftError(f"--row is {row}, but there are {len(read.rows):,} rows")
    line, item, tasks = read.rows[row - 1].line, dataclasses.asdict(read.items[row - 1]), FORMATS[read.format].tasks
    if as_json:
        found = {"file": file, "format": read.format, "tasks": tasks, "rows": len(read.rows)}
        found |= {"labels": label_counts(read.items), "ignored_columns": read.unused, "notes": read.notes}
        options.echo_json(found | {"example": {"line": line} | item})
        return
    click.echo(f"{file}: {len(read.rows):,} rows, format {read.format}, for {', '.join(tasks)}")
    unused = [f"columns that are not used: {', '.join(read.unused)}"] if read.unused else []
    told = more or [*label_lines(read.items), *unused, *read.notes]
    click.echo("\n".join([*told, f"\nrow {row}, line {line}"]))
    for name, value in item.items():
        if value is not None:
            click.echo(f"{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}")
