"""Chat templates: conversations as text, rendered by transformers.

The templates are written for this purpose, in the manner of families of models; none is a copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from unittest import mock

import torch
import transformers
from common import Case, Compute, Tensors
from transformers.utils import chat_template_utils

TALK = [
    {"role": "user", "content": "Where is Łódź?"},
    {"role": "assistant", "content": "In Poland."},
    {"role": "user", "content": "And 東京?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERED = [*TALK, {"role": "assistant", "content": "In Japan. 🗾"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)
GENERATION = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
GENERATION_MACRO = (
    "{% macro turn(m) %}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ m.role }}: {{ turn(m) if m.role == 'assistant' else m.content }}\n\n{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and system is not false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA_3_DATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "01 Jan 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today: " + date_string + "\\n" }}
{%- for m in messages %}
    {{- m.role + "> " + m.content + "\\n" }}
{%- endfor %}
"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
WHITESPACE = """\
  {% if true %}
    indented
\t{%- set a = 1 %}  kept
  {%+ if true %}plus{% endif %}

  {{ a }}
  {{- ' joined ' -}}
  end {# a comment #}
  {#- and another -#}
  .
{% raw %}{{ raw }} {% endraw %}
  {% endif %}
  tail
"""
MISTRAL = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools is not none and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- tool | tojson }}{{ ', ' if not loop.last }}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[TOOL_CALLS] ' }}
        {%- for call in m.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
HERMES = """\
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ call.arguments | tojson ~ '}' }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
THOUGHTS = """\
{%- set ns = namespace(query=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' %}
        {%- set ns.open = false %}
        {%- set ns.query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.query %}{%- set content = '<think>' + thought + '</think>' + content %}{%- endif %}
    {%- endif %}
    {{- m.role + ': ' + content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant: ' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
PARTS = """\
{%- for m in messages -%}
{{ m.role | upper }}{% if m.name is defined %}({{ m.name }}){% endif %}:{{ m.missing }}
{%- if m.content is string %} {{ m.content | replace('ß', 'ss') | capitalize }}
{%- elif m.content is mapping %} {% for key, value in m.content.items() | sort %}{{ key }}={{ value }};{% endfor %}
{%- else %} {{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' | ') }}
{%- for part in m.content if part.type == 'image' %} <image {{ loop.index }} of {{ loop.length }}>{% endfor %}
{%- endif %}
{% endfor -%}
{{ messages | map(attribute='role') | unique | list | length }} {{ (messages | last).role[:4] }} {{ true }} {{ none }}
"""
SCOPE = """\
{%- set found = 'before' %}{%- set ns = namespace(found='before', n=0) %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{%- continue %}{%- endif %}
    {%- if m.role == 'stop' %}{%- break %}{%- endif %}
    {%- set found = m.content %}{%- set ns.found = m.content %}{%- set ns.n = ns.n + 1 %}
    {{- found + ' ' }}
{%- else %}{{- 'no messages' }}
{%- endfor %}
{{- found }} {{ ns.found }} {{ ns.n // 2 }} {{ ns.n / 2 }} {{ -7 % 3 }} {{ 'a' ~ 1 ~ none }}
"""
SHOWN = "{{ tools | tojson }}\n{{ tools[0] | tojson(indent=4) }}\n{{ tools[0].function }}\n{{ messages[0].content }}"


def tool(name: str, description: str, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool("weather", "Das Wetter in <Stadt> & Umgebung, in °C", city={"enum": ["Zürich", "naïve"]})
ODD = tool("z_first", 'says "it\'s"\n', b={"default": 1.0, "maximum": 1e21}, a={"nullable": True, "x": None})


def call(name: str, number: int, **arguments) -> dict:
    return {"type": "function", "id": f"call{number:05}", "function": {"name": name, "arguments": arguments}}


TOOL_TALK = [
    {"role": "user", "content": "Wie warm ist es?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", 1, city="Zürich", days=2)]},
    {"role": "tool", "name": "weather", "content": '{"°C": 21.5}'},
    {"role": "tool", "name": "weather", "content": "<sonnig>"},
    {"role": "assistant", "content": " 21,5 °C. "},
    {"role": "user", "content": "Danke"},
]
THOUGHT_TALK = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "<think>\nyes\n</think>\n\nsure"},
]
LOOK = {"type": "text", "text": "look"}
PARTS_TALK = [
    {"role": "system", "content": "straße"},
    {"role": "user", "name": "Ada", "content": [LOOK, {"type": "image"}, {"type": "text", "text": "here"}]},
    {"role": "user", "content": {"b": 1, "a": 2.0}},
    {"role": "assistant", "content": [{"type": "image"}, {"type": "image"}]},
]
SCOPE_TALK = [
    {"role": role, "content": content}
    for role, content in (("user", "a"), ("skip", "b"), ("user", "c"), ("stop", "d"), ("user", "e"))
]


def rendered(config: dict) -> Compute:
    """transformers' text as UTF-8; for a template with {% generation %} the mask of the assistant's characters, too."""
    marked = "generation %}" in config["template"]

    def compute(_: Tensors) -> Tensors:
        with mock.patch.object(chat_template_utils, "datetime") as clock:
            clock.now.return_value = datetime.fromisoformat(config["now"])
            (text,), spans = chat_template_utils.render_jinja_template(
                json.loads(json.dumps([config["messages"]])),
                tools=config["tools"],
                chat_template=config["template"],
                add_generation_prompt=config["add_generation_prompt"],
                return_assistant_tokens_mask=marked,
                **config["special_tokens"],
                **config["variables"],
            )
        answer = {"text": torch.tensor(list(text.encode()), dtype=torch.uint8)}
        if marked:
            mask = torch.zeros(len(text), dtype=torch.uint8)
            for start, stop in spans[0]:
                mask[start:stop] = 1
            answer["assistant"] = mask
        return answer

    return compute


def cases() -> Iterator[Case]:
    prompt, llama = {"add_generation_prompt": True}, {"bos_token": "<s>", "eos_token": "</s>"}
    rows = [  # variant, template, messages, other members of the config, flags, comment
        ("chatml-plain", CHATML, [SYSTEM, *ANSWERED], {}, "TemplateWhitespace", ""),
        ("chatml-prompt", CHATML, [SYSTEM, *TALK], prompt, "GenerationPrompt", "the text ends where the answer begins"),
        ("chatml-empty", CHATML, [{"role": "system", "content": ""}, {"role": "user", "content": ""}], prompt,
         "SystemMessage", "empty texts keep their headers"),
        ("chatml-default-system", DEFAULT_SYSTEM, TALK, prompt, "SystemMessage",
         "the template brings a system message"),
        ("chatml-own-system", DEFAULT_SYSTEM, [SYSTEM, *TALK], prompt, "SystemMessage",
         "and leaves it out where there is one"),
        ("chatml-generation", GENERATION, [SYSTEM, *ANSWERED], {}, "AssistantMask TemplateWhitespace",
         "the mask counts characters, not bytes or UTF-16 units; the end of a turn is said, its header is not"),
        ("generation-macro", GENERATION_MACRO, ANSWERED, {"special_tokens": llama}, "AssistantMask",
         "the mark stands in a macro, where no output is seen yet"),
        ("llama2-system", LLAMA_2, [SYSTEM, *ANSWERED], {"special_tokens": llama}, "SystemMessage TemplateMethods",
         "the system message goes into the first user's; bos and eos in every turn"),
        ("llama2-plain", LLAMA_2, [{"role": "user", "content": "\n x \u00a0"}], {"special_tokens": llama},
         "TemplateMethods", "strip takes off all of Unicode's white space"),
        ("llama3-prompt", LLAMA_3, [SYSTEM, {"role": "user", "content": "  a\n b \n"}],
         prompt | {"special_tokens": {"bos_token": "<|begin_of_text|>"}}, "GenerationPrompt TemplateMethods",
         "texts are trimmed, a filter before +; bos once"),
        ("llama3-date", LLAMA_3_DATE, TALK, {"special_tokens": llama, "now": "2026-07-04T23:59:59"}, "TemplateClock",
         "the date is that of config's `now`, in English"),
        ("llama3-date-given", LLAMA_3_DATE, TALK, {"special_tokens": llama, "variables": {"date_string": "then"}},
         "TemplateClock", "a date that is given wins"),
        ("zephyr-prompt", ZEPHYR, [SYSTEM, *TALK], prompt | {"special_tokens": llama},
         "TemplateWhitespace GenerationPrompt",
         "the line break behind a block goes, that behind {{ }} stays, the template's last one goes"),
        ("whitespace", WHITESPACE, TALK, {}, "TemplateWhitespace", "trim_blocks, lstrip_blocks, -, +, comments, raw"),
        ("mistral-tools", MISTRAL, TOOL_TALK, {"special_tokens": llama, "tools": [WEATHER, ODD]},
         "JsonInTemplates TemplateScope", "the tools stand before the last user message"),
        ("mistral-no-tools", MISTRAL, TOOL_TALK[:5], {"special_tokens": llama}, "JsonInTemplates TemplateScope",
         "tools are none, not an empty list"),
        ("gemma-prompt", GEMMA, TALK, prompt | {"special_tokens": {"bos_token": "<bos>"}}, "GenerationPrompt",
         "the assistant is called model"),
        ("hermes-tools", HERMES, TOOL_TALK, {"tools": [WEATHER]}, "JsonInTemplates TemplateScope",
         "answers of tools that follow one another are one turn: loop.previtem and nextitem"),
        ("json", SHOWN, TALK, {"tools": [ODD, WEATHER]}, "JsonInTemplates",
         "keys in order, no escapes of HTML or of other letters, 1.0 and 1e+21; a dict as it is has Python's form"),
        ("thoughts", THOUGHTS, THOUGHT_TALK, {}, "TemplateMethods TemplateScope",
         "what was thought before the last question is left out"),
        ("thoughts-prompt", THOUGHTS, THOUGHT_TALK[:3], prompt | {"variables": {"enable_thinking": False}},
         "GenerationPrompt TemplateMethods", "a variable of the caller's; the loop runs backwards"),
        ("parts", PARTS, PARTS_TALK, {}, "TemplateMethods",
         "texts as lists of parts; what is undefined is written as nothing, none as None, true as True"),
        ("scope", SCOPE, SCOPE_TALK, {}, "TemplateScope",
         "what a loop sets is forgotten behind it, but in a namespace; break and continue"),
        ("scope-empty", SCOPE, [], {}, "TemplateScope", "no messages at all: the loop's else"),
    ]  # fmt: skip
    defaults = {"add_generation_prompt": False, "tools": None, "special_tokens": {}, "variables": {}}
    for variant, template, messages, others, flags, comment in rows:
        config = {"template": template, "messages": messages, **defaults, "now": "2026-01-02T03:04:05", **others}
        compute = rendered(config)
        yield Case(
            id=f"template-{variant}",
            kind="template",
            name="chat",
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs={},
            compute=compute,
            limits=dict.fromkeys(compute({}), "exact"),
            oracle=f"transformers {transformers.__version__}, render_jinja_template",
            spec="golden/README.md, Chat templates",
        )
