"""Items: what formats make of the rows of a file, and tasks make examples of; and what can be told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SHOWN_LABELS = 20


@dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered by the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[str]:
        """What is to be learned: an assistant's message may be a call of a tool without content."""
        said = [m for m in self.messages if m["role"] == "assistant"]
        return [m.get("content") or ("tool" if m.get("tool_calls") else "") for m in said]


@dataclass(frozen=True)
class Plain:
    """A prompt, and the completion that is to be learned."""

    prompt: str
    completion: str

    @property
    def answers(self) -> list[str]:
        return [self.completion]


@dataclass(frozen=True)
class Labelled:
    """A text, or two that belong together, and what is to be told of it: a class by name or number, or a value."""

    text: str
    text_b: str | None = None
    label: str | int | float | None = None  # float: a value; None: it is to be predicted


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence, and a tag for each."""

    words: list[str]
    tags: list[str] | list[int] | None = None  # None: they are to be predicted


Item = Chat | Plain | Labelled | Tagged


def described(item: Item) -> str:
    """What kind of item one is, in a few words."""
    if isinstance(item, Labelled):
        return f"the label is {item.label!r}"
    if isinstance(item, Plain):
        return "a text without a label" if item.prompt.strip() else "an empty prompt, or a text alone"
    return "a conversation" if isinstance(item, Chat) else "tagged words"


def label_counts(items: Iterable[Item]) -> dict[str | int, int]:
    """How often each class or tag occurs; empty for values and for what is to be predicted.

    They are in the order of their numbers, then of their names.
    """
    counts: Counter[str | int] = Counter()
    for item in items:
        if isinstance(item, Tagged):
            counts.update(item.tags or ())
        elif isinstance(item, Labelled) and isinstance(item.label, str | int):
            counts[item.label] += 1
    return {label: counts[label] for label in sorted(counts, key=lambda label: (isinstance(label, str), label))}


def label_lines(items: Iterable[Item]) -> list[str]:
    """What there is to be learned, in a line for people; none for texts and conversations."""
    asked = [item for item in items if isinstance(item, Labelled | Tagged)]
    values = [item.label for item in asked if isinstance(item, Labelled) and isinstance(item.label, float)]
    if not asked:
        return []
    if values:
        return [f"values from {min(values):g} to {max(values):g}, {sum(values) / len(values):g} on average"]
    counts, what = label_counts(asked), "tags" if isinstance(asked[0], Tagged) else "labels"
    if not counts:
        pairs = any(isinstance(item, Labelled) and item.text_b is not None for item in asked)
        return [f"no {what}" if pairs else f"no {what}: they are to be predicted"]  # pairs may be learned without
    most = sorted(counts, key=lambda label: -counts[label])[:SHOWN_LABELS]
    shown = ", ".join(f"{label} {counts[label]:,}" for label in counts if label in most)
    more = f" and {len(counts) - len(most):,} rarer" if len(counts) > len(most) else ""
    return [f"{len(counts):,} {what}: {shown}{more}"]


def references(items: Iterable[Item]) -> dict[str, list[str]]:
    """The completions of each prompt in order of appearance, for measures that know several right answers."""
    found: dict[str, list[str]] = {}
    for item in items:
        if isinstance(item, Plain):
            found.setdefault(item.prompt, []).append(item.completion)
    return found
