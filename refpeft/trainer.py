"""Training: optimizer steps over batches, evaluation, checkpoints, and resuming from them bit for bit.

Every random choice is a function of (seed, purpose, step), so a checkpoint is the trained values, the optimizer's
state and the number of the step.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from . import backend, files, learning, memory, report, schedule, survey, towards_base
from .backend import Array, to_host
from .batches import Batch, Batches, split
from .config import Train as Settings
from .errors import RefpeftError
from .evaluation import Evaluation, Several, better
from .models.base import Model
from .optim import OPTIMIZERS, OPTIONS, Flat
from .placing import Placed
from .quant import Quantized
from .rng import Step
from .shards import Shards

Listener = Callable[[dict[str, Any]], None]

_COPIED = 2**22  # elements of a checkpoint that are copied to the device at a time


@dataclass
class Summary:
    """How a run went. Evaluations are {"loss": mean loss of the held-out rows, metric: value}, None without such rows.

    The best one is that of the best value of `settings.metric`.
    """

    steps: int = 0
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    best: dict[str, float] | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    stopped_early: bool = False
    train_losses: list[float] = field(default_factory=list)


class Trainer:
    """Trains what is attached to `model`.

    `settings` is config.Train; `out` the run directory, for checkpoints (none without it); each of `listeners` is
    called with a dict for every step ({"step", "loss", "lr", "grad_norm", "tokens", "supervised", "seconds"}) and every
    evaluation ({"step", "eval_loss", metric: value}). The loss of a step has all penalties in it, that of an evaluation
    none. `metric` says which evaluation is the best: the loss, or one of those that `evaluation` gives.
    """

    def __init__(
        self,
        model: Model,
        train: Batches,
        evaluation: Batches | Evaluation | Several | None = None,
        settings: Settings | None = None,
        out: str | Path | None = None,
        listeners: Sequence[Listener] = (),
        seed: int = 0,
        metric: str = "loss",
    ):
        if model.task is None:
            raise RefpeftError(f"this {model.config.family} model has no head: load it for a task, such as 'classify'")
        evaluation = Evaluation(model, evaluation) if isinstance(evaluation, Batches) else evaluation
        self.model, self.train, self.evaluation, self.metric = model, train, evaluation, metric
        self._on_gpu, self._stream = hasattr(model.xp, "cuda"), None
        self.settings = settings or Settings()
        self.checkpoints = Path(out) / "checkpoints" if out is not None else None
        self.listeners, self.seed = listeners, seed
        s = self.settings
        self.total = s.total_steps(train.steps_per_epoch)
        self.warmup = schedule.warmup_steps(s.warmup, self.total)
        longest = max(batches.longest for batches in (train, evaluation) if batches is not None)
        if longest > model.room:
            raise RefpeftError(
                f"the longest row has {longest:,} tokens, but beside what is attached the model has room for "
                f"{model.room:,}: set a smaller length"
            )
        if s.checkpoint_activations:
            learning.refuse_recomputation(model)
        if s.offload_activations and (why := s.no_offload("cuda" if self._on_gpu else "cpu")):
            raise RefpeftError(why)
        if s.rows_at_a_time < s.batch and train.of_pairs_alone:
            raise RefpeftError("a batch's texts are compared with one another: leave micro_batch out, or give scores")
        if s.batch == 1 and train.of_pairs_alone:
            raise RefpeftError("a batch's texts are compared with one another: set a larger batch, or give scores")
        if s.kl:
            towards_base.check_kl(model)
        options = {name: value for name in OPTIONS if (value := getattr(s, name)) is not None}
        with self._at_work():
            self._settle()
            self.flat = Flat(model.trained(), learning.rates(model))
            self.first = towards_base.FirstValues(model, s.l2_sp) if s.l2_sp else None
            self.kept, self.constants = learning.states(model), learning.constants(model)
            self.optimizer = OPTIMIZERS[s.optimizer](self.flat, weight_decay=s.weight_decay, paged=s.paged, **options)
            model.checkpointing = s.checkpoint_activations
            self.shards = Shards(model, self.flat)
            self.device = self._device_steps()
        self.summary = Summary()
        if s.best and (evaluation is None or out is None):
            raise RefpeftError(
                "'best' keeps the adapter of the best evaluation: it needs held-out rows and a run directory"
            )

    # ---- the run ----

    def run(self, resume: bool = False) -> Summary:
        """Trains to the last step. With `resume` it goes on from the newest checkpoint, if there is one.

        Raises RefpeftError where the loss is not finite, memory does not suffice, or a checkpoint belongs to another
        run; KeyboardInterrupt, after saving a checkpoint, on Ctrl-C.
        """
        with self._at_work():
            return self._run(resume)

    def _run(self, resume: bool) -> Summary:
        if resume:
            self._restore()
        elif self._newest():
            raise RefpeftError(
                f"{self.checkpoints} holds another run's checkpoints: resume it, or choose another --out"
            )
        if self.evaluation is not None and self.summary.before is None:
            self.summary.before = self._evaluate()
        with _interruptible() as interrupted:
            while self.summary.steps < self.total and not self.summary.stopped_early:
                self._step()
                done = self.summary.steps
                if self._due(self.settings.eval_every) and done < self.total:
                    self._judge(self._evaluate())
                if interrupted.is_set():
                    self._save()
                    raise KeyboardInterrupt
                if self._due(self.settings.save_every):
                    self._save()
        self._save()
        self.shards.rest()
        if self.device:
            self.device.rest()
        return self._finish()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Within it the host, or the device, computes as a run does, and too little memory is told as such."""
        with contextlib.ExitStack() as stack:
            if self._on_gpu:
                from .cuda import blas, graph

                blas.use_tf32(self.model.tf32)  # another model may have been loaded since
                self._stream = self._stream or graph.own_stream()
                stack.enter_context(graph.on(self._stream))
            stack.enter_context(backend.blas_threads(self.model.parameters(), self.settings.threads))
            stack.enter_context(self._room())
            yield

    def _device_steps(self) -> Any:
        """What takes the steps on a GPU; None elsewhere."""
        if not self._on_gpu:
            return None
        from .cuda.steps import Steps

        s = self.settings
        return Steps(self.model, self.flat, self.train, s.rows_at_a_time, self.total, s.capture, s.offload_activations)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.summary.steps % every == 0

    def _finish(self) -> Summary:
        if self.evaluation is not None:
            self.summary.after = self._evaluate()
            if not self.summary.stopped_early:
                self._judge(self.summary.after)
            if self.settings.best and self.summary.best_step != self.summary.steps and self.checkpoints:
                self._load_arrays(self.checkpoints / "best", ["values", *self.constants])
                self.summary.after = self.summary.best
        return self.summary

    def _step(self) -> None:
        started, step = time.perf_counter(), self.summary.steps
        lr = self.settings.lr * schedule.factor(self.settings.schedule, step, self.total, self.warmup)
        self.optimizer.prepare(lr)
        update = partial(learning.step, self.model, self.optimizer.apply, step, self.total)
        if self.device:
            taken = self.device.take(step, partial(self._gradients, step), update)
            loss, norm, batch = taken.loss, taken.norm, taken
            self._refuse_what_is_not_finite(loss, norm)  # and was not learned from
        else:
            batch = self.train.at(step)
            # the whole batch's denominator: exact. It is 0 where all of its labels weigh nothing
            loss, norm = self._gradients(step, split(batch, self.settings.rows_at_a_time), batch.denominator or 1)
            loss, norm = float(loss), float(norm)
            self._refuse_what_is_not_finite(loss, norm)
            update()
        self.summary.steps = step + 1
        self.summary.train_losses.append(loss)
        self._tell(
            step=step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=batch.tokens,
            supervised=batch.supervised,
            seconds=time.perf_counter() - started,
        )

    def _gradients(self, step: int, parts: Sequence[Batch], denominator: Any) -> tuple[Any, Any]:
        """Adds up and clips the gradients of a step's batch, given in parts: its loss, and their norm before."""
        loss = 0.0
        self.shards.next_step()
        for i, part in enumerate(parts):
            at = partial(self._backward, denominator, step, i)
            loss = loss + sum(self.shards.run(at, learning.shares(self.model, part, len(self.shards))))
        with self._training(self.model, step):
            for penalty in chain(learning.penalties(self.model), self.first.penalties() if self.first else ()):
                penalty.backward()
                loss = loss + penalty.data
        return loss, self.flat.clip(self.settings.clip)

    def _refuse_what_is_not_finite(self, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "the gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
            raise RefpeftError(self._not_finite(f"{what} at step {self.summary.steps + 1}"))

    def _backward(self, denominator: Any, step: int, number: int, model: Model, part: Batch) -> Array:
        """Adds the gradient of a part of a step's batch, the `number`-th, to that of `model`; returns its loss."""
        with self._training(model, step, number, part):
            if self.settings.kl:
                loss = towards_base.objective(model, part, denominator, self.settings.kl)
            else:
                loss = learning.objective(model, part, denominator)
            loss.backward()
            return loss.data

    @contextlib.contextmanager
    def _training(self, model: Model, step: int, number: int = 0, part: Batch | None = None) -> Iterator[None]:
        """Within it, the sites of `model` know that they train, and what."""
        mode = model.mode
        mode.training, mode.seed, mode.step, mode.part = True, self.seed, Step(step), number
        if part:
            mode.task, mode.share = part.task, part.share
            mode.placed = part if isinstance(part, Placed) else None
        try:
            yield
        finally:
            mode.training, mode.task, mode.share, mode.placed = False, None, None, None

    def _not_finite(self, what: str) -> str:
        if not self.summary.steps:
            return (
                f"{what}, before anything was learned: weights of the model, or of an adapter, are not finite numbers"
            )
        saved = self._newest()
        kept = f"the last good checkpoint is {saved}" if saved else "no checkpoint had been saved yet"
        return f"{what} (learning rate {self.settings.lr:g}); {kept}; lower the learning rate"

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Within it, too little memory is told with what is free, what takes how much, and what helps."""
        try:
            yield
        except Exception as error:
            if not memory.is_short(error):
                raise
            what = f": {str(error).rstrip('.')}" if str(error) else ""
            device = "cuda" if self._on_gpu else "cpu"
            free = memory.free_memory(device)
            left = f"; {free:,} bytes are free" if free is not None else ""
            parts = self._held(device)
            took = ", ".join(f"{part} {report.size(nbytes)}" for part, nbytes in parts.items())
            remedies = memory.lighter(self.settings, device, next(iter(parts)), self.model.bits is not None)
            helps = "; ".join([*remedies, "a smaller rank, or fewer targets, train less"])
            raise RefpeftError(f"out of memory{what}{left}. Taken were: {took}. What helps: {helps}") from None

    def _held(self, device: str) -> dict[str, int]:
        """Bytes that were held at most, by what they are of, the largest part first."""
        parts = {"weights": self.model.nbytes}
        if hasattr(self, "optimizer"):  # there was room for what stays
            state = 0 if self.settings.paged else sum(array.nbytes for array in self.optimizer.state.values())
            parts["optimizer, values and gradients"] = state + 2 * self.flat.values.nbytes
            step = "activations and working arrays" + (", with Python and its libraries" if device == "cpu" else "")
            parts[step] = max(0, report.peak(device) - sum(parts.values()))
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def _tell(self, **record: Any) -> None:
        for listener in self.listeners:
            listener(record)

    # ---- evaluation ----

    def _evaluate(self) -> dict[str, float]:
        self.shards.rest()
        scores = self.device.beside(self.evaluation) if self.device else self.evaluation()
        if not math.isfinite(scores["loss"]):
            raise RefpeftError(self._not_finite(f"held-out loss is {scores['loss']} after step {self.summary.steps}"))
        told = {"eval_loss" if name == "loss" else name: value for name, value in scores.items()}
        self._tell(step=self.summary.steps, **told)
        return scores

    def _judge(self, scores: dict[str, float]) -> None:
        """Notes whether this is the best evaluation so far, and whether to stop."""
        summary = self.summary
        if summary.best is None or better(self.metric, scores, summary.best):
            summary.best, summary.best_step, summary.worse = scores, summary.steps, 0
            if self.settings.best and self.checkpoints:
                self._save("best")
        else:
            summary.worse += 1
            patience = self.settings.early_stop
            summary.stopped_early = patience is not None and summary.worse >= patience

    # ---- checkpoints ----

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        s = self.settings
        options = {f"{a.name}.{name}": value for a in self.model.adapters for name, value in vars(a.cfg).items()}
        same = ("optimizer", "lr", "batch", "micro_batch", "group_by_length", "weight_decay", *OPTIONS, "clip")
        same += ("schedule", "l2_sp", "kl")
        formats = {str(w.quantizer) for w in self.model.frozen.values() if isinstance(w, Quantized)}
        crc = 0
        for row in self.train.rows:
            for example in row:
                for value in vars(example).values():
                    if isinstance(value, np.ndarray | float):
                        crc = zlib.crc32(np.ascontiguousarray(value).tobytes(), crc)
        found = {
            "seed": self.seed,
            "methods": [adapter.name for adapter in self.model.adapters],
            "task": self.model.task,
            "labels": list(self.model.labels),
            "total steps": self.total,
            "warm-up steps": self.warmup,
            "rows": len(self.train.rows),
            "shares of data sets": list(self.train.shares),
            "metric": self.metric,
            "rows' checksum": crc,
            "dtype": "tf32" if self.model.tf32 else self.model.dtype.name,
            "bytes of frozen weights": self.model.nbytes,
            "quantizers of frozen weights": sorted(formats),
        }
        found |= {name: getattr(s, name) for name in same}
        return json.loads(json.dumps(found | options, default=str))  # as it will be read: tuples are lists then

    def _of_a_step(self) -> dict[str, Any]:
        """The same, with what is known once there are values to train."""
        return self._fingerprint() | {"parameters": self.flat.shapes}

    def _settle(self) -> None:
        """Lets the data decide what methods leave to them; a run that goes on takes what was decided at its start."""
        waiting = survey.waiting(self.model)
        if not waiting:
            return
        directory = self.checkpoints / "survey" if self.checkpoints else None
        now = self._fingerprint()
        if directory and directory.is_dir() and files.read_json(directory / "state.json").get("run") == now:
            survey.restore(self.model, waiting, files.read_safetensors(directory / "state.safetensors"))
            return
        if newest := self._newest():
            self._refuse_another_run(newest, now)  # before what it was settled on is lost
        survey.settle(self.model, self.train, self.settings, self.seed)
        if directory:
            with files.replace_directory(directory) as new:
                arrays = {name: to_host(array) for name, array in survey.values(waiting).items()}
                files.write_safetensors(new / "state.safetensors", arrays)
                files.write_json(new / "state.json", {"run": now})

    @property
    def _arrays(self) -> dict[str, Array]:
        """What a checkpoint holds."""
        return {"values": self.flat.values} | self.optimizer.state | self.kept | self.constants

    def _save(self, name: str | None = None) -> None:
        if self.checkpoints is None:
            return
        target = self.checkpoints / (name or f"step-{self.summary.steps:08d}")
        state = {"run": self._of_a_step(), "summary": asdict(self.summary)}
        with files.replace_directory(target) as directory:
            arrays = {key: to_host(array) for key, array in self._arrays.items()}
            files.write_safetensors(directory / "state.safetensors", arrays)
            files.write_json(directory / "state.json", state)
        for old in self._all()[: -self.settings.keep]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        """The checkpoints of steps, oldest first."""
        return sorted(self.checkpoints.glob("step-????????")) if self.checkpoints else []

    def _newest(self) -> Path | None:
        return next(reversed(self._all()), None)

    def _restore(self) -> None:
        newest = self._newest()
        if newest is None:
            return
        summary = self._refuse_another_run(newest, self._of_a_step())
        self._load_arrays(newest, self._arrays)
        self.summary, self.optimizer.step_count = summary, summary.steps

    def _refuse_another_run(self, newest: Path, now: dict[str, Any]) -> Summary:
        """Raises RefpeftError where a checkpoint cannot be read, or differs from `now`; gives its summary otherwise."""
        try:
            state = json.loads((newest / "state.json").read_text())
            saved, summary = state["run"], Summary(**state["summary"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RefpeftError(
                f"checkpoint {newest} cannot be read: {error}; remove it to go on from an older one"
            ) from None
        if other := [key for key in now if saved.get(key) != now[key]]:
            told = [f"{key} was {saved.get(key, 'not known')}, now {now[key]}" for key in other if key != "parameters"]
            what = "; ".join(told)[:500] or "what it trains has other shapes"
            raise RefpeftError(f"checkpoint {newest} is of another run: {what}; use another --out")
        return summary

    def _load_arrays(self, directory: Path, names: Iterable[str]) -> None:
        stored = files.read_safetensors(directory / "state.safetensors")
        for name in names:
            array = self._arrays[name]
            if name not in stored or stored[name].shape != array.shape or stored[name].dtype != array.dtype:
                raise RefpeftError(f"checkpoint {directory}: '{name}' is missing or has another shape or dtype")
            for at in range(0, array.size, _COPIED):  # of paged state the GPU may not have room for all
                array[at : at + _COPIED] = self.model.xp.asarray(stored[name][at : at + _COPIED])


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is finished before it counts; the second raises at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
