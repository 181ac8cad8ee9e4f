"""Several methods, or seeds, trained on the same model, data and steps, each in a process of its own; one table."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refpeft import adapters, config, files, inputs, manager, outcomes, report, toml
from refpeft.config import Resolved
from refpeft.errors import RefpeftError
from refpeft.outcomes import Row

EMBEDDED = Path(__file__).parent / "embedded" / "compare.toml"  # what each method is given on the embedded model
ASKED = "asked.toml"  # in a run's directory: its configuration; its run.toml also has what was found of the rows
_OF_THE_RUN = {"lr": "train.lr", "quantizer": "quantizer"}  # keys of a method's line that are not its own options

Flags = Sequence[tuple[str, str, Any]]


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
    resolved: Mapping[str, Resolved | RefpeftError],
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    shots: Sequence[int] = (),
) -> list[Row]:
    """Trains each run in out/<its name>; the table in `out` is written anew after each.

    Before them the model without training is asked, with each of these numbers of `shots` before every prompt. With
    `resume` what is finished is not done again, and what the table has of others stays.
    """
    stored = outcomes.stored(out) if resume else {}
    done = {name for name, row in stored.items() if not row.error and (out / name / ASKED).is_file()}
    for name, run in resolved.items():
        if (
            name in done
            and isinstance(run, Resolved)
            and (out / name / ASKED).read_text("utf-8") != config.to_toml(run)
        ):
            raise RefpeftError(f"{out / name} is of a run with other options: choose another --out")
    asking = _questions(resolved, shots)
    rows: dict[str, Row] = {}
    for number, name in enumerate([*asking, *resolved], 1):
        started, run = time.monotonic(), resolved.get(name)
        if name in done:
            rows[name] = stored[name]
        elif name in asking:
            rows[name] = _ask(name, asking[name], out, resume)
        elif isinstance(run, RefpeftError):
            rows[name] = Row(name, error=" ".join(str(run).splitlines()))
        else:
            rows[name] = _train(name, run, out / name, say)
        did = rows[name].error or f"held-out loss {rows[name].losses}"
        when = "before" if name in done else f"in {report.duration(time.monotonic() - started)}"
        say(f"{number}/{len(asking) + len(resolved)} {name}, {when}: {did}")
        outcomes.write(out, [*rows.values(), *(row for other, row in stored.items() if other not in rows)])
    return list(rows.values())


def of_seeds(resolved: Resolved, count: int, out: Path) -> dict[str, Resolved]:
    """The run with its seed and the next ones, by the names of their directories in `out`."""
    seeds = range(resolved.run.seed, resolved.run.seed + count)
    return {f"seed-{seed}": _seeded(resolved, seed, out / f"seed-{seed}") for seed in seeds}


def compare_seeds(
    resolve: Callable[[Path], Mapping[str, Resolved | RefpeftError]],
    count: int,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    shots: Sequence[int] = (),
) -> list[Row]:
    """A comparison for each of `count` seeds, in out/seed-<seed>, and the means of their rows.

    `resolve` gives the runs of a directory, with the first seed.
    """
    first = next(run.run.seed for run in resolve(out).values() if isinstance(run, Resolved))
    found: list[list[Row]] = []
    for seed in range(first, first + count):
        inside = out / f"seed-{seed}"
        runs = {
            name: _seeded(run, seed, inside / name) if isinstance(run, Resolved) else run
            for name, run in resolve(inside).items()
        }
        found.append(compare(runs, inside, resume, lambda line, seed=seed: say(f"seed {seed}: {line}"), shots))
    rows = [outcomes.averaged(each[0].method, each) for each in zip(*found, strict=True)]
    outcomes.write(out, rows)
    return rows


def _seeded(resolved: Resolved, seed: int, directory: Path) -> Resolved:
    run = resolved.run.model_copy(update={"seed": seed, "out": str(directory)})
    return dataclasses.replace(resolved, run=run)


def _train(name: str, resolved: Resolved, directory: Path, say: Callable[[str], None]) -> Row:
    """Trains one method, or goes on with it."""
    lr = resolved.run.train.lr
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / ASKED, config.to_toml(resolved))
    done = _refpeft("train", str(directory / ASKED), "--resume", "--json")
    said = done.stderr.strip().splitlines()
    for line in (line for line in said if line.startswith("warning: ")):
        say(f"{name}: {line}")
    if done.returncode:
        return Row(name, lr=lr, error=said[-1] if said else f"it ended with exit code {done.returncode}")
    outcome = json.loads(done.stdout)
    records = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    scores = {key: value for key, value in (outcome["after"] or {}).items() if key != "loss"}
    earlier = outcome.get("forgetting", {}).get("after", {})
    exact = scores.pop("exact_match", None)
    return Row(
        name,
        **{key: outcome[key] for key in ("trained", "loss_before", "loss_after", "peak_bytes")},
        exact_match=exact if outcome["exact_match"] is None else outcome["exact_match"],
        step_ms=1000 * statistics.median(record["seconds"] for record in records if "seconds" in record),
        adapter_bytes=sum(path.stat().st_size for path in directory.rglob(adapters.TENSORS)),
        lr=lr,
        scores=scores | {f"{key} of the earlier task": value for key, value in earlier.items()},
    )


# ---- the model without training ----


def _questions(resolved: Mapping[str, Resolved | RefpeftError], shots: Sequence[int]) -> dict[str, list[str]]:
    """The arguments of `refpeft eval` for each number of shots, by the name of its row.

    Raises RefpeftError where the rows do not say what is to be asked, and which examples can be shown.
    """
    runs = [one.run for one in resolved.values() if isinstance(one, Resolved)]
    if not shots or not runs:
        return {}
    run, quantizers = runs[0], {(one.quantizer, one.double_quant) for one in runs}
    training, held_out = inputs.data_files(run)
    if len(training) > 1 or not held_out:
        raise RefpeftError("shots need one file to be drawn from and one to be asked: give one --data, one --eval-data")
    data, train = run.data, run.train
    names = dict.fromkeys([*train.metrics, *([train.metric] if train.metric not in (None, "loss") else [])])
    if training[0].parent == inputs.HERE:
        names["exact_match"] = None
    given = {
        "--model": run.model,
        "--data": held_out[0],
        "--shots-from": training[0],
        "--seed": run.seed,
        "--rows": data.eval_rows,
        "--format": None if data.format == "auto" else data.format,
        "--fields": ",".join(f"{ours}={its}" for ours, its in data.fields.items()) or None,
        "--length": data.length,
        "--overlong": data.overlong,
        "--batch": train.rows_at_a_time,
        "--dtype": run.dtype,
        "--device": run.device,
    }
    arguments = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    arguments += [part for name in names for part in ("--metric", name)]
    if len(quantizers) == 1 and run.quantizer:
        arguments += ["--quantizer", run.quantizer, *(["--double-quant"] if run.double_quant else [])]
    return {f"base ({count} shots)": ["--shots", str(count), *arguments] for count in shots}


def _ask(name: str, arguments: list[str], out: Path, resume: bool) -> Row:
    """What the model says without training; with `resume` what it said to the same question before."""
    file = out / f"{name.translate(str.maketrans(' ', '-', '()'))}.json"
    found = files.read_json(file) if resume and file.is_file() else {}
    if found.get("arguments") != arguments:
        done = _refpeft("eval", *arguments, "--json")
        if done.returncode:
            return Row(name, error=(done.stderr.strip().splitlines() or ["it failed"])[-1])
        found = {"arguments": arguments, "scores": json.loads(done.stdout)}
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(file, found)
    scores = dict(found["scores"])
    exact, loss = scores.pop("exact_match", None), scores.pop("eval_loss")
    for count in ("rows", "tokens", "supervised_tokens", "perplexity"):
        scores.pop(count, None)
    return Row(name, trained=0, loss_after=loss, exact_match=exact, scores=scores)


def _refpeft(*arguments: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, which finds the same modules and knows the same plugins."""
    sources = [part for source in manager.sources() for part in ("-p", source)]
    return subprocess.run(
        [sys.executable, "-P", "-m", "refpeft", *arguments, *sources],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        capture_output=True,
        text=True,
    )
