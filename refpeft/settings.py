"""What a run can be told: the tables of run.toml and their keys, with defaults."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from refpeft.choices import Device, Dtype, Optimizer, Overlong, Supervise, Task
from refpeft.models.hub import EMBEDDED

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]


def listed(files: str | list[str] | None) -> list[str]:
    """What may be one file, several, or none, as a list."""
    return [files] if isinstance(files, str) else files or []


class Data(BaseModel):
    """[data]: what is read and how rows become tokens."""

    model_config = STRICT

    file: str | list[str] | None = None  # JSONL, JSON, CSV or TSV; of several every step has rows
    mix: tuple[Weight, ...] | None = None  # how much of the rows each of several files has; none: as many as it holds
    replay: str | None = None  # rows of an earlier task, mixed in; this and the next are read by their own columns
    replay_share: Annotated[float, Field(gt=0, lt=1)] | None = None  # of all rows; none: 0.1
    earlier: str | None = None  # held-out rows of an earlier task, to tell what is forgotten of it
    eval_file: str | list[str] | None = None  # held-out rows; of several files one for each
    eval_share: Share = 0.0  # held-out share of `file` where there is no eval_file
    eval_rows: Count | None = None  # the most held-out rows that are used; none: all
    format: Literal[
        "auto", "messages", "conversations", "instruction", "prompt", "source", "tags", "pair", "label", "text"
    ] = "auto"  # of refpeft.formats.FORMATS
    fields: dict[str, str] = {}  # what the file calls a format's columns: {text = "review", label = "stars"}
    length: Count | None = None  # tokens of a row; none: 1024, or the model's limit where that is less
    overlong: Overlong = "error"
    pack: bool = False
    supervise: Supervise = "response"
    highest_score: Weight | None = None  # of pairs to embed: that of the same meaning; none: the training rows', or 1

    @property
    def files(self) -> list[str]:
        """The training files, none where they are refpeft's own."""
        return [] if self.file in (None, EMBEDDED) else listed(self.file)


class Train(BaseModel):
    """[train]: how it is trained. `steps` wins over `epochs` where it is given."""

    model_config = STRICT

    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Count | None = None
    lr: Annotated[float, Field(gt=0)] = 2e-4
    batch: Count = 8  # rows of an optimizer step
    micro_batch: Count | None = None  # rows computed at a time; none: the whole batch
    group_by_length: bool = False  # rows of a step are about equally long: less padding, and a less random order
    threads: Count | None = None  # of the processor; none: all, or as many as OMP_NUM_THREADS says
    optimizer: Optimizer = "adamw"
    paged: bool = False  # the optimizer's state lies outside of the memory that is computed in
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] | None = None  # this and the next three: none is the optimizer's own default
    eps: Annotated[float, Field(gt=0)] | None = None
    momentum: Share | None = None
    relative_step: bool | None = None  # steps as a share of what is updated, as in Adafactor's paper
    l2_sp: Annotated[float, Field(ge=0)] = 0.0  # half of it times (trained value - its first value)^2, without the head
    kl: Annotated[float, Field(ge=0)] = 0.0  # times KL(base || model), the mean of all targets
    clip: Annotated[float, Field(ge=0)] = 1.0  # largest gradient norm; 0: no clipping
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] | Share = 0.03  # steps, or a share of all steps
    checkpoint_activations: bool = False  # of each layer only its input is kept, and it is computed again
    offload_activations: bool = False  # on a GPU, these inputs lie in the host's memory meanwhile
    capture: bool = True  # on a GPU a step is one CUDA graph, where methods allow it
    eval_every: Count | None = None  # steps; none: only before and after
    save_every: Count | None = None  # steps; none: only at the end and on Ctrl-C
    keep: Count = 2  # checkpoints kept
    metric: str | None = None  # tells the best evaluation, as refpeft.metrics has it, or "loss"; none: the task's own
    metrics: tuple[str, ...] = ()  # further ones that evaluations give
    best: bool = False  # the adapter of the best evaluation is the one written
    early_stop: Count | None = None  # evaluations in a row that are no better
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None  # how much each label's rows count
    log_every: Count = 10

    def no_offload(self, device: str) -> str | None:
        """Why activations cannot be offloaded, if they cannot."""
        what = "train.offload_activations moves what checkpoints keep from a GPU's memory to the host's"
        if device == "cpu":
            return f"{what}: choose device 'cuda', or leave it out"
        return None if self.checkpoint_activations else f"{what}: set train.checkpoint_activations, too"

    @property
    def rows_at_a_time(self) -> int:
        """The rows of one forward and backward pass."""
        return self.micro_batch or self.batch

    def total_steps(self, steps_per_epoch: int) -> int:
        """The optimizer steps of the whole run."""
        return self.steps if self.steps is not None else math.ceil(self.epochs * steps_per_epoch)


class RunConfig(BaseModel):
    """The top level of run.toml. Tables named after a method or the quantizer hold that plugin's own options."""

    model_config = STRICT

    model: str = EMBEDDED  # a directory, a GGUF file or a hub id
    method: str | list[str] = "lora"
    quantizer: str | None = None
    double_quant: bool = False  # quantize the quantizer's constants, too
    adapter_quantizer: str | None = None  # the trained adapter is saved in this quantizer's format
    out: str | None = None  # the run directory; none: runs/<model>-<method>
    device: Device = "cpu"
    dtype: Dtype = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: Task | None = None  # none: what the rows' columns and the model say
    labels: tuple[str, ...] = ()  # of a task that has some, in the order of their numbers; (): those of the rows
    data: Data = Data()
    train: Train = Train()

    @property
    def methods(self) -> list[str]:
        return [self.method] if isinstance(self.method, str) else self.method
