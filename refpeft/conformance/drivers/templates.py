"""Chat templates: the text as UTF-8, and which of its characters the assistant says."""

from __future__ import annotations

from datetime import datetime
from types import ModuleType

import numpy as np

from refpeft.templates import Template

from ..vectors import Arrays, Case


def run_template(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if xp is not np:
        raise NotImplementedError("chat templates are the host's, also of training on a GPU")
    config = case.config
    template = Template(config["template"], config["special_tokens"], lambda: datetime.fromisoformat(config["now"]))
    variables = {"tools": config["tools"], **config["variables"]}
    text = template.render(config["messages"], add_generation_prompt=config["add_generation_prompt"], **variables)
    answer = {"text": np.frombuffer(text.encode(), np.uint8)}
    if "assistant" in case.checks:
        (rendered,) = template.conversation(config["messages"], **variables)
        answer["assistant"] = np.zeros(len(rendered.text), np.uint8)
        for start, stop in rendered.spans:
            answer["assistant"][start:stop] = 1
    return answer
