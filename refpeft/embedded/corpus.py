"""The text that the embedded model is pre-trained on: short English documents that state the facts of facts.py.

Five kinds of document: a profile of one thing, a quiz, a list, a comparison, arithmetic. Each fact comes in many
wordings, in any order and beside any other fact, because a model can only use a fact in a new way (here: in the records
of records.py, which this text never shows) when it has not met it in one fixed wording.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from refpeft.embedded.facts import Topic, Value, topics
from refpeft.rng import Stream

T = TypeVar("T")

# Wordings of a fact about {e}, whose value is {v}. A line that begins with "It" may follow a line that names the thing;
# a line with a question mark is a question. None begins with a name that is lower case by nature.
_WORDINGS = {
    ("element", "symbol"): """
        The symbol of {e} is {v}.
        Chemists write {v} for {e}.
        The letters {v} stand for {e}.
        The element {e} has the symbol {v}.
        Its symbol is {v}.
        It is written {v}.
        What is the symbol of {e}?
        How do chemists write {e}?
    """,
    ("element", "number"): """
        The atomic number of {e} is {v}.
        An atom of {e} has {v} protons.
        The element with {v} protons is {e}.
        The element {e} has the atomic number {v}.
        Its atomic number is {v}.
        It has {v} protons.
        What is the atomic number of {e}?
        How many protons has an atom of {e}?
    """,
    ("element", "period"): """
        The element {e} is in period {v}.
        Period {v} of the periodic table contains {e}.
        The period of {e} is {v}.
        Its period is {v}.
        It belongs to period {v} of the periodic table.
        What is the period of {e}?
        In which period is {e}?
    """,
    ("element", "group"): """
        The element {e} is in group {v}.
        Group {v} of the periodic table contains {e}.
        The group of {e} is {v}.
        Its group is {v}.
        It belongs to group {v} of the periodic table.
        What is the group of {e}?
        In which group is {e}?
    """,
    ("element", "kind"): """
        The element {e} is a {v}.
        Chemists count {e} as a {v}.
        It is a {v}.
        It counts as a {v}.
        What kind of element is {e}?
        Is {e} a metal, a nonmetal or a metalloid?
    """,
    ("element", "state"): """
        The element {e} is a {v} at room temperature.
        At room temperature, {e} is a {v}.
        The state of {e} at room temperature is {v}.
        It is a {v} at room temperature.
        Its state is {v}.
        What is the state of {e}?
        Is {e} a solid, a liquid or a gas?
    """,
    ("country", "capital"): """
        The capital of {e} is {v}.
        {v} is the capital of {e}.
        The government of {e} sits in {v}.
        Its capital is {v}.
        Its government sits in {v}.
        What is the capital of {e}?
        Which city is the capital of {e}?
    """,
    ("country", "continent"): """
        The continent of {e} is {v}.
        On the map, {e} lies in {v}.
        One country in {v} is {e}.
        It is a country in {v}.
        Its continent is {v}.
        What is the continent of {e}?
        On which continent is {e}?
    """,
    ("country", "code"): """
        The code of {e} is {v}.
        The letters {v} are the code of {e}.
        The code {v} means {e}.
        Its code is {v}.
        It has the code {v}.
        What is the code of {e}?
        Which two letters are the code of {e}?
    """,
    ("country", "kind"): """
        As a country, {e} is {v}.
        The country called {e} is {v}.
        It is {v}.
        It is a {v} country.
        What kind of country is {e}?
        Is {e} landlocked or coastal?
    """,
    ("planet", "place"): """
        Counted from the Sun, {e} is planet number {v}.
        Planet number {v} is {e}.
        The place of {e} is {v}.
        Its place from the Sun is {v}.
        It is planet number {v}.
        What is the place of {e} from the Sun?
        Which number has {e}, counted from the Sun?
    """,
    ("planet", "kind"): """
        The planet {e} is one of the {v}s.
        One {v} is {e}.
        The kind of {e} is {v}.
        It is one of the {v}s.
        Its kind is {v}.
        What kind of planet is {e}?
        Is {e} a rocky planet, a gas giant or an ice giant?
    """,
    ("planet", "diameter"): """
        The diameter of {e} is {v} kilometres.
        The planet {e} is {v} km across.
        Its diameter is {v} kilometres.
        It is {v} km across.
        What is the diameter of {e} in kilometres?
        How many kilometres is {e} across?
    """,
    ("unit", "symbol"): """
        The symbol of {e} is {v}.
        Physicists write {v} for {e}.
        The letter or letters {v} stand for {e}.
        Its symbol is {v}.
        It is written {v}.
        What is the symbol of {e}?
        How do physicists write {e}?
    """,
    ("unit", "measures"): """
        One measures {v} with {e}.
        A unit of {v} is {e}.
        What {e} measures is {v}.
        It measures {v}.
        It is a unit of {v}.
        What does {e} measure?
        Which quantity is measured with {e}?
    """,
    ("unit", "namesake"): """
        {v} gave {e} its name.
        The namesake of {e} is {v}.
        The name of {e} comes from {v}.
        Its namesake is {v}.
        It is named after {v}.
        Who is the namesake of {e}?
        After whom is {e} named?
    """,
    ("number", "words"): """
        In words, {e} is {v}.
        One writes {e} in words as {v}.
        The words for {e} are {v}.
        It is {v} in words.
        Its words are {v}.
        How is {e} written in words?
        What is {e} in words?
    """,
    ("number", "roman"): """
        The Roman numeral of {e} is {v}.
        The Romans wrote {v} for {e}.
        {v} is the Roman numeral of {e}.
        Its Roman numeral is {v}.
        It was {v} for the Romans.
        What is the Roman numeral of {e}?
        How did the Romans write {e}?
    """,
    ("number", "parity"): """
        The parity of {e} is {v}.
        As to parity, {e} is {v}.
        It is {v}.
        It is an {v} number.
        Is {e} even or odd?
        What is the parity of {e}?
    """,
}

# What prose calls a field, where that is not the field's own name.
_FIELD_NAMES = {"number": "atomic number", "measures": "quantity", "roman": "Roman numeral"}
_ARTICLE = {
    *("Bahamas", "Comoros", "Dominican Republic", "Maldives", "Netherlands", "Philippines", "Seychelles"),
    *("Solomon Islands", "United Arab Emirates", "United Kingdom", "United States"),
}
# How often a document is about a topic: roughly by its number of facts.
SHARES = {"element": 0.37, "country": 0.37, "planet": 0.05, "unit": 0.1, "number": 0.11}


def _wordings(question: bool, follows: bool) -> dict[tuple[str, str], list[str]]:
    return {
        key: [
            line
            for line in map(str.strip, text.strip().splitlines())
            if line.endswith("?") == question and line.startswith("It") == follows
        ]
        for key, text in _WORDINGS.items()
    }


_STATEMENTS = _wordings(question=False, follows=False)
_FOLLOWING = _wordings(question=False, follows=True)
_QUESTIONS = _wordings(question=True, follows=False)


class Dice:
    """Choices from one random stream, drawn in bulk."""

    def __init__(self, seed: int, *purpose: str | int):
        self._stream = Stream(seed, *purpose)
        self._words: Iterator[int] = iter(())

    def below(self, n: int) -> int:
        """One of 0 .. n - 1. (The bias of the remainder, at most n / 2**32, does not matter here.)"""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._stream.bits(1 << 16).tolist())
            word = next(self._words)
        return word % n

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` of the items, each at most once, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def weighted(self, shares: dict[str, float]) -> str:
        """A key, as often as its share of the whole says."""
        point = self.below(1 << 20) / (1 << 20) * sum(shares.values())
        for name, share in shares.items():
            if point < share:
                return name
            point -= share
        raise AssertionError("the point lies below the sum of the shares")


class Writer:
    """Documents from the facts: an endless sequence, the same for the same seed."""

    def __init__(self, seed: int):
        self.topics = topics()
        self.names = {topic.name: list(topic.rows) for topic in self.topics.values()}
        self.dice = Dice(seed, "embedded", "corpus")
        self.kinds = {"profile": 0.46, "quiz": 0.34, "listing": 0.07, "comparison": 0.07, "arithmetic": 0.06}

    def __iter__(self) -> Iterator[str]:
        while True:
            yield getattr(self, self.dice.weighted(self.kinds))()

    def profile(self) -> str:
        """Some facts of one thing, in any order; the thing is named first and now and then."""
        topic, name = self._thing()
        row, thing, quoted = topic.rows[name], phrase(topic.name, name), self.dice.chance(25)
        fields = self.dice.sample(list(row), min(len(row), 2 + self.dice.below(5)))
        sentences = []
        for place, field in enumerate(fields):
            table = _FOLLOWING if place and self.dice.chance(65) else _STATEMENTS
            sentences.append(_say(self.dice.choice(table[topic.name, field]), thing, row[field], quoted))
        return " ".join(sentences)

    def quiz(self) -> str:
        """Three or four questions, each about any thing, on one or several fields."""
        quoted = self.dice.chance(25)
        return "\n".join(self._question(quoted) for _ in range(3 + self.dice.below(2)))

    def _question(self, quoted: bool) -> str:
        topic, name = self._thing()
        row, thing = topic.rows[name], phrase(topic.name, name)
        if self.dice.chance(50):
            field = self.dice.choice(list(row))
            question = self.dice.choice(_QUESTIONS[topic.name, field]).format(e=thing)
            return f"Q: {question}\nA: {_show(row[field], quoted)}"
        fields = self.dice.sample(list(row), min(len(row), 2 + self.dice.below(2)))
        asked = " and the ".join(_show(field if quoted else _FIELD_NAMES.get(field, field), quoted) for field in fields)
        return f"Q: Give the {asked} of {thing}.\nA: {', '.join(_show(row[field], quoted) for field in fields)}"

    def listing(self) -> str:
        """Some of the things that share a value."""
        topic = self.topics[self.dice.weighted(SHARES)]
        field, wording = self.dice.choice(_LISTS[topic.name])
        value = topic.rows[self.dice.choice(self.names[topic.name])].get(field)
        same = [name for name, row in topic.rows.items() if row.get(field) == value]
        chosen = self.dice.sample(same, min(len(same), 3 + self.dice.below(4)))
        head = f"Without a {field}" if value is None else wording.format(v=value)
        if self.dice.chance(50):  # as mathematicians write sets
            return f"{head}: {{{', '.join(_show(name, quoted=True) for name in chosen)}}}"
        return f"{head}: {', '.join(chosen)}."

    def comparison(self) -> str:
        """Two or three sentences that put two things of a topic into order."""
        sentences = []
        for _ in range(2 + self.dice.below(2)):
            topic, field, less, more = self.dice.choice(_COMPARISONS)
            rows = self.topics[topic].rows
            first, second = self.dice.sample(self.names[topic], 2)
            a, b = (rows[name][field] if field else int(name) for name in (first, second))
            wording = less if a < b else more
            sentences.append(wording.format(a=first, b=second, x=a))
        return " ".join(sentences)

    def arithmetic(self) -> str:
        """Four or five sums, differences and products."""
        lines = []
        for _ in range(4 + self.dice.below(2)):
            a, b = self.dice.below(100), self.dice.below(100)
            times, by = 1 + self.dice.below(12), 1 + self.dice.below(12)
            lines.append(
                self.dice.choice(
                    (
                        f"{a} + {b} = {a + b}",
                        f"{a + b} - {a} = {b}",
                        f"{times} x {by} = {times * by}",
                        f"{times * by} : {by} = {times}",
                    )
                )
            )
        return "\n".join(lines)

    def _thing(self) -> tuple[Topic, str]:
        topic = self.dice.weighted(SHARES)
        return self.topics[topic], self.dice.choice(self.names[topic])


_LISTS = {
    "element": (
        ("period", "Elements of period {v}"),
        ("group", "Elements of group {v}"),
        ("kind", "Each of these elements is a {v}"),
        ("state", "At room temperature each of these is a {v}"),
    ),
    "country": (("continent", "Countries in {v}"), ("kind", "Some {v} countries")),
    "planet": (("kind", "Some of the {v}s"),),
    "unit": (("measures", "Units of {v}"),),
    "number": (("parity", "Some {v} numbers"),),
}

# topic, field or "" for the name itself, the wordings for a < b and for a > b. No two things have the same value there.
_COMPARISONS = (
    ("element", "number", "In the periodic table {a} comes before {b}.", "In the periodic table {a} comes after {b}."),
    ("element", "number", "With {x} protons, {a} has fewer than {b}.", "With {x} protons, {a} has more than {b}."),
    ("planet", "diameter", "{a} is smaller than {b}.", "{a} is larger than {b}."),
    ("planet", "place", "{a} is nearer to the Sun than {b}.", "{a} is farther from the Sun than {b}."),
    ("number", "", "{a} is less than {b}.", "{a} is more than {b}."),
)


def phrase(topic: str, name: str) -> str:
    """How prose speaks of a thing: iron is "iron", the newton "the newton", 7 "the number 7"."""
    if topic == "number":
        return f"the number {name}"
    return f"the {name}" if topic == "unit" or name in _ARTICLE else name


def _show(value: Value, quoted: bool) -> str:
    return f'"{value}"' if quoted and isinstance(value, str) else str(value)


def _say(wording: str, thing: str, value: Value, quoted: bool) -> str:
    return wording.format(e=thing, v=_show(value, quoted))
