"""The verb that lets a model speak."""

from __future__ import annotations

import sys
from typing import Any

import click

from refpeft.commands import options


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@options.model
@click.option("--chat", is_flag=True, help="Talk with the model, line by line.")
@click.option("--system", metavar="TEXT", help="The system message of a conversation.")
@click.option("--raw", is_flag=True, help="Give the prompt as it stands, without the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, metavar="X", help="0, the default: greedy.")
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Draw among so many tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="X", help="Draw among tokens of this probability."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N")
@click.option("--beams", type=click.IntRange(min=1), default=1, metavar="N", help="Beam search that keeps so many.")
@click.option("--length-penalty", type=float, default=1.0, metavar="X", help="Of beams; above 0 favours long answers.")
@click.option(
    "--no-repeat-ngram", type=click.IntRange(min=0), default=0, metavar="N", help="Never so many tokens in a row again."
)
@options.as_json
@options.plugins
def generate(
    prompts: tuple[str, ...], model: str | None, adapter: str | None, quantizer: str | None, double_quant: bool,
    dtype: str, device: str, chat: bool, system: str | None, raw: bool, as_json: bool, **decoding: Any,
) -> None:  # fmt: skip
    """Writes what the model says to each PROMPT; without one, to standard input as it stands."""
    import dataclasses

    from refpeft import config, dialogue
    from refpeft.errors import RefpeftError

    loaded = options.load(model, adapter, quantizer, double_quant, dtype, device)
    form = "text" if raw else config.written(adapter).get("data", {}).get("format")
    speaker = dialogue.Speaker(loaded, form, system, **decoding)
    if chat:
        if prompts:
            raise RefpeftError("--chat asks for what you say line by line: leave the prompts out")
        speaker.need_template()
        _talk(speaker)
        return
    texts = list(prompts) or [sys.stdin.read()]
    answers = speaker.answer(texts)
    if as_json:
        options.echo_json(
            [{"prompt": text, **dataclasses.asdict(said)} for text, said in zip(texts, answers, strict=True)]
        )
    else:
        click.echo("\n".join(said.text for said in answers))


def _talk(speaker: Any) -> None:
    """A conversation on the terminal; an empty line or the end of input ends it."""
    history: list[dict[str, str]] = []
    while True:
        try:
            said = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:
            said = ""
        if not said.strip():
            return
        history.append({"role": "user", "content": said})
        history.append({"role": "assistant", "content": speaker.reply(history)})
        click.echo(history[-1]["content"])
