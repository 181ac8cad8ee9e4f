import contextlib
import json
import time
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML

from refpeft import RefpeftError
from refpeft.templates import Rendered, Template

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "no"},
]

CHATML_WITH_GENERATION = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA_2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

# Like Qwen3: an answer is written with its (empty) thoughts only as long as it is the last message.
FORGETS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The prompt says "Assistant: ", the conversation "assistant: ".
NO_PREFIX = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def said(rendered):
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def test_chatml_spans_are_the_answers_with_their_end_of_turn():
    (rendered,) = Template(CHATML).conversation(TALK)
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n")
    assert said(rendered) == ["yes<|im_end|>\n", "no<|im_end|>\n"]


def test_generation_tags_mark_the_spans():
    (rendered,) = Template(CHATML_WITH_GENERATION).conversation(TALK)
    assert said(rendered) == ["yes<|im_end|>", "no<|im_end|>"]
    assert rendered.text == Template(CHATML).render(TALK)


def test_llama_3_and_llama_2():
    (rendered,) = Template(LLAMA_3, {"bos_token": "<|begin_of_text|>"}).conversation(TALK)
    assert rendered.text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    )
    assert said(rendered) == ["yes<|eot_id|>", "no<|eot_id|>"]
    (rendered,) = Template(LLAMA_2, {"bos_token": "<s>", "eos_token": "</s>"}).conversation(TALK[1:])
    assert rendered.text == "<s>[INST] hello [/INST] yes</s><s>[INST] why? [/INST] no</s>"
    assert said(rendered) == [" yes</s>", " no</s>"]


def test_a_template_that_rewrites_history_gives_one_text_per_answer():
    first, second = Template(FORGETS_THOUGHTS).conversation(TALK)
    assert said(first) == ["<think>\n\n</think>\n\nyes<|im_end|>\n"]
    assert said(second) == ["<think>\n\n</think>\n\nno<|im_end|>\n"]
    assert second.text.count("<think>") == 1
    assert second.text[: second.spans[0][0]] == Template(FORGETS_THOUGHTS).render(TALK[:4], add_generation_prompt=True)


def test_a_generation_prompt_that_is_no_prefix_is_a_clear_error():
    with pytest.raises(RefpeftError, match=r"before messages\[2\] .*'Assistant: ' .*'assistant: yes.*generation %"):
        Template(NO_PREFIX).conversation(TALK)


def test_a_conversation_without_an_answer_has_no_spans():
    assert Template(CHATML).conversation(TALK[:2]) == [Rendered(Template(CHATML).render(TALK[:2]), ())]
    assert Template(CHATML_WITH_GENERATION).conversation(TALK[:2])[0].spans == ()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8), min_size=1, max_size=5))
@settings(deadline=None)
def test_both_ways_to_find_spans_agree_on_chatml(texts):
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    (steps,), (tags,) = (Template(t).conversation(messages) for t in (CHATML, CHATML_WITH_GENERATION))
    assert steps.text == tags.text
    assert [(a, b) for a, b in steps.spans] == [(a, b + 1) for a, b in tags.spans]  # the newline behind <|im_end|>


def test_spans_are_found_inside_a_macro_too():
    text = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}[{{ say(m) if m.role == 'assistant' else m.content }}]{% endfor %}"
    )
    (rendered,) = Template(text).conversation(TALK)
    assert rendered.text == "[Be brief.][hello][yes][why?][no]" and said(rendered) == ["yes", "no"]


def test_an_answer_in_two_tags_is_one_span():
    tagged = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}.{% endgeneration %}"
    text = "{% for m in messages %}" + tagged + " {% endfor %}"
    (rendered,) = Template(text).conversation(TALK[1:3])
    assert said(rendered) == ["hello.", "yes."]


def test_a_template_that_leaves_out_the_answer_is_an_error():
    pictures = CHATML.replace("message['content']", "(message['content'] | map(attribute='text') | join)")
    with pytest.raises(RefpeftError, match=r"leaves out the text of messages\[2\]"):
        Template(pictures).conversation(TALK)


def test_tojson_does_not_escape_html_and_takes_transformers_options():
    tools = [{"name": "f<g>", "x": "é'&"}]
    assert Template("{{ tools | tojson }}").render(TALK, tools=tools) == json.dumps(tools, ensure_ascii=False)
    assert Template("{{ tools[0] | tojson(indent=2) }}").render(TALK, tools=tools) == json.dumps(
        tools[0], indent=2, ensure_ascii=False
    )


def test_the_clock_can_be_fixed():
    template = Template("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 7, 4))
    assert template.render(TALK) == "04 Jul 2026"


def test_loop_controls_namespaces_and_extra_variables_work():
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ enable_thinking }}"
    )
    assert Template(text).render(TALK, enable_thinking=False) == "2False"


def test_raise_exception_is_the_error():
    with pytest.raises(RefpeftError, match="the chat template fails: Conversation roles must alternate"):
        Template(LLAMA_2, {"bos_token": "<s>", "eos_token": "</s>"}).render(TALK)


def test_a_syntax_error_names_its_line():
    with pytest.raises(RefpeftError, match="wrong at line 3"):
        Template("a\nb\n{% for %}")


def test_a_template_cannot_change_what_it_gets():
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(RefpeftError, match="append"):
        Template("{{ messages.append(1) }}").render(messages)
    with pytest.raises(RefpeftError, match="plain JSON values"):
        Template("").render([{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ (messages | attr('__class__')).x }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.__subclasses__() }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(text):
    with contextlib.suppress(RefpeftError):
        assert Template(text).render(TALK) == ""  # Jinja writes what is forbidden as what is undefined


GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{{ 'a' * 10**12 }}",
        "{{ 9**9**9**9 }}",
        GROW.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
        GROW.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
        GROW.replace("START", "'ab'").replace("STEP", "ns.x * 9"),
        GROW.replace("START", "7").replace("STEP", "ns.x * ns.x"),
        GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
        GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x == [1] }}"),
        GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
        "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x %}{{ ns.x ~ ns.x }}{% endset %}{% endfor %}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '\t'.expandtabs(10**10) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
        "{{ ('b' * 1000000).join(['a'] * 100000) }}",
        "{{ ['a'] * 100000 | join('b' * 1000000) }}",
        "{{ range(100000) | map('string') | join('x' * 16000) }}",
        "{{ ('\n' * 1000000) | indent(1000000) }}",
        "{% set b = 'b' * 16000000 %}{% for i in range(99999) %}{{ 'a' in b }}{% endfor %}",
        "{% set b = 'b' * 16000000 %}{% for i in range(99999) %}{% set c = b[1:] %}{% endfor %}",
    ],
)
def test_a_template_cannot_run_away(text):
    start = time.process_time()
    with pytest.raises(RefpeftError):
        Template(text).render(TALK)
    assert time.process_time() - start < 20


def test_a_long_conversation_is_far_from_the_budget():
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 2000} for i in range(100)]
    template = Template(LLAMA_3, {"bos_token": "<s>"})
    assert len(template.render(messages)) > 1_000_000
    assert template._environment.purse > 0.9 * 200_000_000


@pytest.mark.real
@pytest.mark.parametrize("text", [CHATML, CHATML_WITH_GENERATION, LLAMA_3, FORGETS_THOUGHTS, NO_PREFIX])
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_the_same(text, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (theirs,), (spans,) = utils.render_jinja_template(
        [TALK],
        chat_template=text,
        add_generation_prompt=prompt,
        bos_token="<s>",
        return_assistant_tokens_mask="generation" in text,
    )
    template = Template(text, {"bos_token": "<s>"})
    assert template.render(TALK, add_generation_prompt=prompt) == theirs
    if template.has_generation and not prompt:
        assert template.conversation(TALK)[0].spans == tuple(tuple(span) for span in spans)
