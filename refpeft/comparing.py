"""Several methods trained on the same model, data and steps, each in a process of its own, and one table of them."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refpeft import adapters, config, files, manager, report, toml
from refpeft.config import Resolved
from refpeft.errors import RefpeftError

EMBEDDED = Path(__file__).parent / "embedded" / "compare.toml"  # what each method is given on the embedded model
JSON, MARKDOWN = "compare.json", "compare.md"
_OF_THE_RUN = {"lr": "train.lr", "quantizer": "quantizer"}  # keys of a method's line that are not its own options

Flags = Sequence[tuple[str, str, Any]]


@dataclass(frozen=True)
class Row:
    """How one method did; with an `error` the rest is None."""

    method: str
    trained: int | None = None  # numbers
    loss_before: float | None = None  # of the held-out rows
    loss_after: float | None = None
    exact_match: float | None = None  # share of held-out answers, on the embedded task
    step_ms: float | None = None  # median
    adapter_bytes: int | None = None
    peak_bytes: int | None = None
    lr: float | None = None
    error: str | None = None

    def cells(self) -> list[str]:
        """As texts, in the order of HEAD."""
        values = [(getattr(self, field), unit, form) for _, field, unit, form in _COLUMNS]
        return [self.method, *("-" if value is None else format(value / unit, form) for value, unit, form in values)]


_COLUMNS = (  # heading, field, its unit, how it is written
    ("trained", "trained", 1, ",.0f"),
    ("learning rate", "lr", 1, "g"),
    ("loss before", "loss_before", 1, ".4f"),
    ("after", "loss_after", 1, ".4f"),
    ("exact match", "exact_match", 1, ".1%"),
    ("ms a step", "step_ms", 1, ".0f"),
    ("adapter KiB", "adapter_bytes", 2**10, ",.1f"),
    ("peak MiB", "peak_bytes", 2**20, ",.0f"),
)
HEAD = ["method", *(heading for heading, *_ in _COLUMNS)]


def text(rows: Sequence[Row]) -> str:
    """The table for people, with what failed below it."""
    table = report.table([HEAD, *(row.cells() for row in rows)])
    failed = [f"{row.method}: {row.error}" for row in rows if row.error]
    return "".join(f"{line}\n" for line in [*table, *([""] if failed else []), *failed])


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README."""
    lines = [HEAD, ["---"] + ["---:"] * len(_COLUMNS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- what each method is run with ----


def resolve(
    asked: str | None, file: str | Path | None, flags: Flags, sets: Sequence[str], out: Path
) -> dict[str, Resolved | RefpeftError]:
    """The configuration of each method, or what is wrong with it.

    `asked` is "all", names with commas, or None for those that `file` names. `file` is a run.toml with a table
    [methods] besides: a line for each, such as `dora = {lr = 5e-3, r = 4}`. The embedded run has its own.
    A method that starts from others' adapters finds them in "{out}/lora", ..., and comes after those that do not.
    Raises RefpeftError where there is nothing to compare.
    """
    given = {key for _, key, _ in flags} | {_key(one) for one in sets}
    file = file or (None if given & {"model", "data.file"} else EMBEDDED)
    common, own = _read(file, out) if file else ([], {})
    names = _names(asked, own, out)
    found: dict[str, Resolved | RefpeftError] = {}
    for name in names:
        fixed = [("--methods", "method", name), ("--out", "out", str(out / name))]
        mine = [*common, *own.get(name, []), *flags, *fixed]
        try:
            found[name] = config.resolve(
                None,
                [flag for flag in mine if _table(flag[1]) not in {*names, *own} - {name}],  # others' tables
                [one for one in sets if _table(_key(one)) not in {*names} - {name}],
            )
        except RefpeftError as error:
            found[name] = error
    errors = [error for error in found.values() if isinstance(error, RefpeftError)]
    if len(errors) == len(found):
        raise errors[0]
    return found


def _key(text: str) -> str:
    """The key of a `--set key=value`."""
    return text.partition("=")[0].strip()


def _table(key: str) -> str:
    return key.rpartition(".")[0]


def _read(file: str | Path, out: Path) -> tuple[Flags, dict[str, Flags]]:
    """(what all methods are given, what each is given besides), as flags."""
    common, own = [], {}
    for key, given in config.read_layer(file).items():
        name = key.removeprefix("methods.")
        if name == key:
            common.append((given.origin, key, given.value))
        elif isinstance(given.value, dict):
            own[name] = [
                (given.origin, _OF_THE_RUN.get(key, f"{name}.{key}"), _placed(value, out))
                for key, value in given.value.items()
            ]
        else:
            raise RefpeftError(
                f"{given.origin}: {name} is {toml.text(given.value)}: expected {{lr = 1e-3}} or the like"
            )
    return common, own


def _placed(value: Any, out: Path) -> Any:
    """An option's value with `out` in place of "{out}"."""
    if isinstance(value, list):
        return [_placed(one, out) for one in value]
    return value.replace("{out}", str(out)) if isinstance(value, str) else value


def _names(asked: str | None, own: Mapping[str, Flags], out: Path) -> list[str]:
    if asked == "all":
        known = [listing for listing in manager.catalogue().values() if listing.kind == "method"]
        names = [listing.name for group in manager.by_family(known).values() for listing in group]
    else:
        names = list(own) if asked is None else [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise RefpeftError("name the methods: --methods lora,dora, or --methods all")
    for name in names:
        manager.path_of(name, "method")
    return sorted(dict.fromkeys(names), key=lambda name: f"{out}/" in str(own.get(name)))


# ---- running them ----


def compare(
    resolved: Mapping[str, Resolved | RefpeftError], out: Path, resume: bool, say: Callable[[str], None]
) -> list[Row]:
    """Trains each method in out/<method>; the table in `out` is written anew after each.

    With `resume` a method that is finished is not trained again, and what the table has of others stays.
    """
    stored = _stored(out) if resume else {}
    done = {name for name, row in stored.items() if not row.error and (out / name / config.FILE).is_file()}
    for name, run in resolved.items():
        if (
            name in done
            and isinstance(run, Resolved)
            and (out / name / config.FILE).read_text("utf-8") != config.to_toml(run)
        ):
            raise RefpeftError(f"{out / name} is of a run with other options: choose another --out")
    rows: dict[str, Row] = {}
    for number, (name, run) in enumerate(resolved.items(), 1):
        started = time.monotonic()
        if name in done:
            rows[name] = stored[name]
        elif isinstance(run, RefpeftError):
            rows[name] = Row(name, error=" ".join(str(run).splitlines()))
        else:
            rows[name] = _train(name, run, out / name, say)
        did = rows[name].error or f"held-out loss {' -> '.join(rows[name].cells()[3:5])}"
        when = "before" if name in done else f"in {report.duration(time.monotonic() - started)}"
        say(f"{number}/{len(resolved)} {name}, {when}: {did}")
        table = [*rows.values(), *(row for other, row in stored.items() if other not in rows)]
        files.write_json(out / JSON, {"rows": [dataclasses.asdict(row) for row in table]})
        files.write_text(out / MARKDOWN, markdown(table))
    return list(rows.values())


def _stored(out: Path) -> dict[str, Row]:
    """The rows of an earlier comparison, by method."""
    found = files.read_json(out / JSON)["rows"] if (out / JSON).is_file() else []
    return {row["method"]: Row(**row) for row in found}


def _train(name: str, resolved: Resolved, directory: Path, say: Callable[[str], None]) -> Row:
    """Trains one method, or goes on with it."""
    lr = resolved.run.train.lr
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / config.FILE, config.to_toml(resolved))
    done = _refpeft("train", str(directory / config.FILE), "--resume", "--json")
    said = done.stderr.strip().splitlines()
    for line in (line for line in said if line.startswith("warning: ")):
        say(f"{name}: {line}")
    if done.returncode:
        return Row(name, lr=lr, error=said[-1] if said else f"it ended with exit code {done.returncode}")
    outcome = json.loads(done.stdout)
    records = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    return Row(
        name,
        **{key: outcome[key] for key in ("trained", "loss_before", "loss_after", "exact_match", "peak_bytes")},
        step_ms=1000 * statistics.median(record["seconds"] for record in records if "seconds" in record),
        adapter_bytes=sum(path.stat().st_size for path in directory.rglob(adapters.TENSORS)),
        lr=lr,
    )


def _refpeft(*arguments: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, which finds the same modules and knows the same plugins."""
    sources = [part for source in manager.sources() for part in ("-p", source)]
    return subprocess.run(
        [sys.executable, "-P", "-m", "refpeft", *arguments, *sources],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        capture_output=True,
        text=True,
    )
