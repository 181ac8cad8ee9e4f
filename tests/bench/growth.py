"""How the cost of a step grows: seconds and memory against tokens of a row, rows, rank and layers.

    python tests/bench/growth.py OUT.svg [--rounds 5] [--threads 2] [--tiny]

LoRA on all linear layers of a small random Llama; one of the four grows at a time. Every point is a process of its own,
and those of a line take their steps in turns. Memory is the peak above that of the loaded model. Prints all points and
the exponent of each line, the slope of a straight line through the logarithms, and draws them into OUT.svg. An exponent
is 1 where the cost is proportional, less where a fixed part counts, too, and rises towards 2 with the tokens of a row,
as attention does. Needs nothing but refpeft.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import Turns, Worker, alternate, description, median, train

WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    tokens: int = 128
    rows: int = 4
    rank: int = 8
    layers: int = 4
    width: int = 256


TINY = Shape(tokens=16, rows=2, rank=4, layers=1, width=32)
LINES = {  # what grows, by how much of the shape's own
    "tokens": (1, 2, 4, 8, 16),
    "rows": (1, 2, 4, 8, 16),
    "rank": (1, 2, 4, 8, 16),
    "layers": (1, 2, 4, 8),
}
TITLES = {"tokens": "tokens of a row", "rows": "rows of a batch", "rank": "rank", "layers": "layers"}
COSTS = {"seconds": "seconds a step", "MiB": "peak MiB above the loaded model"}


# ---- measuring -------------------------------------------------------------------------------------------------------


def step(turns: Turns, shape: Shape, threads: int) -> None:
    """A worker that trains a random model over random rows."""
    import refpeft
    from refpeft.batches import Batches
    from refpeft.config import Train
    from refpeft.examples import Example
    from refpeft.report import resident

    rng = np.random.default_rng(0)
    model = random_model(shape, rng)
    refpeft.attach(model, "lora", {"r": shape.rank, "targets": "all-linear"})
    ids = rng.integers(0, model.config.vocab, (shape.rows, shape.tokens), np.int32)
    examples = [Example(row, np.ones(shape.tokens, bool), line) for line, row in enumerate(ids)]
    batches = Batches(examples, shape.rows, shape.tokens)
    trainer = refpeft.Trainer(model, batches, None, Train(batch=shape.rows, steps=10**6, threads=threads))
    turns.ready(resident=resident())
    train(turns, trainer)


def random_model(shape: Shape, rng: np.random.Generator) -> Any:
    from refpeft.models.checkpoint import expected_tensors
    from refpeft.models.config import from_hf
    from refpeft.models.decoder import Decoder
    from refpeft.quant import Dense

    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 16 * shape.width,
            "hidden_size": shape.width,
            "intermediate_size": 3 * shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2**16,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
    )
    float32 = np.dtype("f4")
    shapes = expected_tensors(config)

    def weights(name: str, linear: bool, transposed: bool) -> Dense:
        array = rng.standard_normal(shapes[name], float32)
        array *= shapes[name][-1] ** -0.5
        return Dense(array.T if transposed else array, float32)

    return Decoder(config, weights, float32, np)


def line(grows: str, shape: Shape, rounds: int, threads: int) -> dict[str, list[float]]:
    """{"x": values of what grows, "seconds": ..., "MiB": ...}."""
    values = [getattr(shape, grows) * times for times in LINES[grows]]
    workers = {
        str(value): Worker(threads, partial(step, shape=replace(shape, **{grows: value}), threads=threads))
        for value in values
    }
    alternate(workers, rounds, WARM_UP)
    found: dict[str, list[float]] = {"x": values, "seconds": [], "MiB": []}
    for worker in workers.values():
        worker.stop()
        found["seconds"].append(median([said["sample"] for said in worker.said[WARM_UP:]]))
        found["MiB"].append((worker.said[-1]["peak"] - worker.loaded["resident"]) / 2**20)
    return found


def fit(x: list[float], y: list[float]) -> tuple[float, float]:
    """(exponent, factor) of y = factor x^exponent, by least squares of the logarithms."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(np.exp(offset))


# ---- drawing ---------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 190, 150, 50, 40, 70  # of a panel, in pixels, and around it


def drawn(lines: dict[str, dict[str, list[float]]], caption: str) -> str:
    """An SVG: a column for each line, a row for each cost, all axes logarithmic."""
    width = _LEFT + len(lines) * (_WIDTH + _GAP)
    height = _TOP + len(COSTS) * (_HEIGHT + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, cost in enumerate(COSTS):
        for column, (grows, found) in enumerate(lines.items()):
            left, top = _LEFT + column * (_WIDTH + _GAP), _TOP + row * (_HEIGHT + _GAP)
            parts.append(f'<g transform="translate({left} {top})">')
            parts += _panel(found["x"], found[cost], TITLES[grows], COSTS[cost])
            parts.append("</g>")
    parts.append(f'<text x="{_LEFT}" y="{height - 8}" fill="#777">{caption}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(x: list[float], y: list[float], x_title: str, y_title: str) -> list[str]:
    exponent, factor = fit(x, y)
    x_low, x_high = min(x) / 1.2, max(x) * 1.2
    y_low, y_high = min(y) / 1.5, max(y) * 1.5

    def across(value: float) -> float:
        return _WIDTH * np.log(value / x_low) / np.log(x_high / x_low)

    def up(value: float) -> float:
        return _HEIGHT * (1 - np.log(value / y_low) / np.log(y_high / y_low))

    ends = [f"{across(value):.1f} {up(factor * value**exponent):.1f}" for value in (min(x), max(x))]
    parts = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<text x="0" y="-8">{y_title}: exponent {exponent:.2f}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 32}" text-anchor="middle">{x_title}</text>',
        f'<path d="M {ends[0]} L {ends[1]}" stroke="#9bbcdc" stroke-width="2"/>',
    ]
    parts += [f'<text x="{across(v):.1f}" y="{_HEIGHT + 15}" text-anchor="middle">{v}</text>' for v in x]
    parts += [
        f'<text x="-5" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        f'<path d="M 0 {up(tick):.1f} H {_WIDTH}" stroke="#eee"/>'
        for tick in _ticks(y_low, y_high)
    ]
    points = zip(x, y, strict=True)
    return parts + [f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" fill="#1f5f9e"/>' for a, b in points]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that lie between."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--tiny", action="store_true", help="a model of no size")
    given = arguments.parse_args()
    shape = TINY if given.tiny else Shape()
    machine = description("numpy")
    print(f"{machine}\n\n| | | {' | '.join(COSTS)} |\n|{' --- |' * (2 + len(COSTS))}", flush=True)
    lines = {}
    for grows in LINES:
        found = lines[grows] = line(grows, shape, given.rounds, given.threads)
        for i, value in enumerate(found["x"]):
            print(f"| {TITLES[grows]} | {value} | " + " | ".join(f"{found[cost][i]:.4g}" for cost in COSTS) + " |")
        exponents = " | ".join(f"{fit(found['x'], found[cost])[0]:.2f}" for cost in COSTS)
        print(f"| {TITLES[grows]} | exponent | {exponents} |", flush=True)
    caption = f"{machine}; {given.threads} threads. Elsewhere: " + ", ".join(f"{k} {v}" for k, v in vars(shape).items())
    given.out.write_text(drawn(lines, caption))


if __name__ == "__main__":
    main()
