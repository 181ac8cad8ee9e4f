"""What models end in for a task: each family's own pooler and head, by the names of its checkpoints.

A head is made of the checkpoint's tensors where it has them, else of first values from a seed: weights from
N(0, 0.02^2) (0.02 is config.json's initializer_range), biases 0, as transformers makes them. A classifier, and what
the checkpoint lacks of a head, must be trained with any method: `model.trained_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from refpeft import ops
from refpeft.backend import Array, to_host
from refpeft.errors import RefpeftError
from refpeft.models import objectives
from refpeft.models.base import Model
from refpeft.models.config import AnyConfig, ModelConfig
from refpeft.models.decoder import unit
from refpeft.models.t5_config import T5Config
from refpeft.quant import Dense
from refpeft.rng import Stream
from refpeft.sites import Site

DECODER, ENCODER, BOTH = "decoder", "encoder", "encoder-decoder"
POSSIBLE = {
    DECODER: ("causal-lm", "classify", "regress"),
    ENCODER: ("classify", "regress", "tag", "mlm", "embed"),
    BOTH: ("seq2seq",),
}
"""The tasks of each kind of model."""


def kind_of(config: AnyConfig) -> str:
    """Whether a model is a decoder, an encoder, or both."""
    return BOTH if isinstance(config, T5Config) else DECODER if isinstance(config, ModelConfig) else ENCODER


def check_possible(task: str, config: AnyConfig) -> None:
    """Raises RefpeftError for a task that models of this kind do not do."""
    possible = POSSIBLE[kind_of(config)]
    if task not in possible:
        raise RefpeftError(f"task {task!r} is none for {config.family}, which is made for {', '.join(possible)}")


@dataclass(frozen=True)
class Head:
    """The modules of a head: dense -> activation -> norm -> last, each but `last` perhaps missing.

    `bias` is where the last layer's bias is, if that is not beside its weight.
    """

    last: str
    dense: str = ""
    activation: str = ""  # "": config.json's hidden_act
    norm: str = ""
    bias: str = ""


_BERT = Head("classifier", "bert.pooler.dense", "tanh")
_ROBERTA = Head("classifier.out_proj", "classifier.dense", "tanh")
_SEQUENCE = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Head("classifier", "pre_classifier", "relu"),
    "deberta-v2": Head("classifier", "pooler.dense", "gelu"),
    "albert": Head("classifier", "albert.pooler", "tanh"),
}
"""For sequence classification and regression, by family."""

_CLS = Head(
    "cls.predictions.decoder",
    "cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.bias",
)
_LM_HEAD = Head("lm_head.decoder", "lm_head.dense", "gelu", "lm_head.layer_norm", "lm_head.bias")
_MASKED = {
    "bert": _CLS,
    "roberta": _LM_HEAD,
    "xlm-roberta": _LM_HEAD,
    "distilbert": Head("vocab_projector", "vocab_transform", "", "vocab_layer_norm"),
    "deberta-v2": _CLS,
    "albert": Head("predictions.decoder", "predictions.dense", "", "predictions.LayerNorm", "predictions.bias"),
}
"""For masked language models, by family; the last layer's weight is the embedding table."""

_CLASSIFIERS = ("classifier", "pre_classifier", "score")
"""How names begin of what is trained with any method: what PEFT saves where it is told of a classification."""

_TOKENS = Head("classifier")  # for token classification, of all encoders
_SCORE = Head("score")  # for sequence classification, of decoders; without a bias

_ENDS = {
    "classify": "ForSequenceClassification",
    "regress": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "mlm": "ForMaskedLM",
}
_FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "deberta-v2": "DebertaV2",
    "albert": "Albert",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gpt2": "GPT2",
}
"""What the classes of transformers are called: a family and a task."""


def put_on(
    model: Model,
    task: str | None,
    labels: Sequence[str] = (),
    seed: int = 0,
    stored: Callable[[str], Array | None] = lambda name: None,
) -> None:
    """Gives a model what `task` ends in: `model.task`, `.head`, `.read`, `.objective`, `.trained_head`, `.new_head`.

    task    "causal-lm", "seq2seq", "classify", "regress" (labels = 1), "tag", "mlm", "embed"; None: hidden states
    labels  the names of what classify and tag tell apart, in the order of their numbers
    stored  a tensor of the checkpoint that the model itself does not take, by its name; None where there is none

    Raises RefpeftError where such a model cannot do the task.
    """
    if task in (None, model.task):
        return
    kind = kind_of(model.config)
    check_possible(task, model.config)
    if task in ("classify", "tag") and len(labels) < 2:
        raise RefpeftError(
            f"task {task!r} tells labels apart, and there are {len(labels)}: name at least two, or take an adapter "
            "that was trained for it, or a model whose config.json names them (id2label)"
        )
    model.task, model.labels = task, tuple(labels) if task in ("classify", "tag") else ()
    if task == "embed":
        model.read, model.objective = "mean", partial(objectives.similarity, model)
        return
    family = model.config.family
    made = _Maker(model, stored, seed)
    if task == "mlm":
        made.masked(_MASKED[family])
        return
    if kind == DECODER:
        model.sites.pop(model.head.name)
        model.frozen.pop("lm_head.weight", None)
    model.read = "all" if task == "tag" else "last" if kind == DECODER else "first"
    made.classifier(_TOKENS if task == "tag" else _SEQUENCE.get(family, _SCORE), len(labels) or 1)
    if task == "regress":
        model.objective = partial(objectives.squared_error, model)


class _Maker:
    """Makes a head's sites on a model."""

    def __init__(self, model: Model, stored: Callable[[str], Array | None], seed: int):
        self.model, self.stored, self.seed = model, stored, seed
        self.files: dict[str, str] = {}
        self.fresh: list[str] = []
        self.scale = model.config.raw.get("initializer_range") or 0.02

    def classifier(self, head: Head, labels: int) -> None:
        model, dim = self.model, self.model.config.dim
        if head.dense:
            activate = ops.tanh if head.activation == "tanh" else unit(head.activation)
            dense = self.linear(head.dense, (dim, dim), "pooler")
            model.transform = lambda hidden: activate(dense(hidden))
        model.head = self.linear(head.last, (labels, dim), "head", bias=head is not _SCORE)
        self._tell(*(site for site in model.sites.values() if site.name.startswith(_CLASSIFIERS)))

    def masked(self, head: Head) -> None:
        model, config = self.model, self.model.config
        width, last = model.embed.shape[1], f"{head.last}.weight"
        own = self.stored(last)
        if own is not None and not self._is_table(own):
            raise RefpeftError(f"tensor {last!r} is not the embedding table: refpeft has heads that share it only")
        activate = unit(head.activation or config.activation)
        dense = self.linear(head.dense, (width, config.dim), "pooler")
        self.fill(f"{head.norm}.weight", np.ones(width))
        self.fill(f"{head.norm}.bias", np.zeros(width))
        norm = model.norm(head.norm, config.norm_eps, "norm", bias=True)
        model.transform = lambda hidden: norm(activate(dense(hidden)))
        self.fill(f"{head.last}.bias", np.zeros(config.vocab), head.bias)
        model.head = model.linear(head.last, "head", bias=True, tied=model.embed.name)
        model.read = "all"
        self._tell()

    def _is_table(self, array: np.ndarray) -> bool:
        table = to_host(self.model.embed.weight())
        return array.shape == table.shape and np.allclose(array.astype(table.dtype), table, rtol=1e-2, atol=1e-5)

    def linear(self, name: str, shape: tuple[int, int], role: str, bias: bool = True) -> Site:
        first = Stream(self.seed, "init", "head", name).standard_normal(shape) * self.scale
        self.fill(f"{name}.weight", first)
        if bias:
            self.fill(f"{name}.bias", np.zeros(shape[0]))
        return self.model.linear(name, role, bias=bias)

    def fill(self, name: str, first: np.ndarray, other: str = "") -> None:
        """The frozen array of this name: the checkpoint's where it has one of the shape, `first` otherwise.

        A last layer of other labels is made anew, as it is where a model is fine-tuned for another task.
        """
        found = self.stored(name)
        found = self.stored(other) if found is None and other else found
        self.files[name] = other or name
        if found is None or found.shape != first.shape:
            self.fresh.append(name)
            found = first
        self.model.frozen[name] = Dense(self.model.place(found), self.model.dtype)

    def _tell(self, *always: Site) -> None:
        """Says what is the head's, what of it has first values from the seed, what must be trained: that and these."""
        self.model.head_tensors, self.model.new_head = self.files, tuple(self.fresh)
        fresh = {name.rpartition(".")[0] for name in self.fresh}
        names = [site.name for site in self.model.sites.values() if site in always or site.name in fresh]
        self.model.trained_head = tuple(name for name in names if not self.model.sites[name].tied)


def described(model: Model) -> dict[str, object]:
    """What config.json says of a model's head, for `read_from` and transformers; empty where it has none."""
    if model.task not in _ENDS:
        return {}
    says: dict[str, object] = {"architectures": [_FAMILIES[model.config.family] + _ENDS[model.task]]}
    if model.task == "mlm":
        return says
    labels = model.labels or unnamed(1)
    says |= {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_labels": len(labels),
        "problem_type": {"classify": "single_label_classification", "regress": "regression"}.get(model.task),
    }
    if model.read == "last" and model.config.pad_id is None and model.tokenizer:
        says["pad_token_id"] = model.tokenizer.pad_id  # transformers finds a text's last token by it
    return says


def read_from(config: Mapping) -> tuple[str | None, tuple[str, ...]]:
    """(task, labels) that a model's config.json says; (None, ()) where its model has no head for one."""
    names = config.get("architectures") or []
    name = (names if isinstance(names, str) else names[0]) if names else ""
    labels = _labels(config)
    if name.endswith("ForSequenceClassification"):
        kind = config.get("problem_type")
        if kind == "multi_label_classification" or (kind == "regression" and len(labels) > 1):
            raise RefpeftError(
                f"config key problem_type is {kind!r} with {len(labels)} labels: refpeft has one label, or one number, "
                "of a text; to train the model for another task, remove the key from config.json"
            )
        return ("regress", ()) if len(labels) == 1 else ("classify", labels)
    if name.endswith("ForTokenClassification"):
        return "tag", labels
    if name.endswith("ForMaskedLM"):
        return "mlm", ()
    return None, ()


def unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls labels that have no names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _labels(config: Mapping) -> tuple[str, ...]:
    """The labels' names in the order of their numbers; transformers' own default is two of them."""
    found = config.get("id2label")
    if not isinstance(found, Mapping) or not found:
        count = config.get("num_labels", 2)
        return unnamed(count if type(count) is int and 0 < count < 2**20 else 2)
    try:
        by_number = {int(key): str(value) for key, value in found.items()}
    except ValueError:
        raise RefpeftError("config key id2label: expected names by number") from None
    if sorted(by_number) != list(range(len(by_number))):
        raise RefpeftError(f"config key id2label names the numbers {sorted(by_number)}: expected 0, 1, 2, ...")
    return tuple(by_number[i] for i in range(len(by_number)))
