"""The fine-tuning set: write the asked fields of a thing as JSON, a form that the pre-training text never shows.

    Record of the element iron: symbol, state      ->      {"symbol": "Fe", "state": "solid"}

The things of the held-out rows occur in no training row. Their facts are in the pre-training text, so a model that is
exactly right there has learned the task from the adapter and knows the fact from its base.
"""

import json

from refpeft.embedded.corpus import Dice
from refpeft.embedded.facts import Topic, topics

_SHARES = {"element": 0.4, "country": 0.36, "planet": 0.04, "unit": 0.08, "number": 0.12}
_HELD_OUT = 0.2  # of the things of each topic


def records(seed: int, train: int, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows and held-out rows, each {"prompt": ..., "completion": ...}; no row comes twice."""
    dice = Dice(seed, "embedded", "records")
    seen, unseen = {}, {}
    for topic in topics().values():
        names = dice.sample(list(topic.rows), len(topic.rows))
        cut = round(len(names) * _HELD_OUT)
        unseen[topic.name], seen[topic.name] = (
            Topic(topic.name, {name: topic.rows[name] for name in part}) for part in (names[:cut], names[cut:])
        )
    return _rows(seen, train, dice), _rows(unseen, held_out, dice)


def _rows(known: dict[str, Topic], count: int, dice: Dice) -> list[dict[str, str]]:
    rows: dict[str, str] = {}
    while len(rows) < count:
        topic = known[dice.weighted(_SHARES)]
        name = dice.choice(list(topic.rows))
        row = topic.rows[name]
        fields = dice.sample(list(row), min(len(row), 2 + dice.below(2)))
        prompt = f"Record of the {topic.name} {name}: {', '.join(fields)}\n"
        rows[prompt] = json.dumps({field: row[field] for field in fields}, ensure_ascii=False)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]
