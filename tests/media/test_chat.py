import json
import pathlib
import subprocess
import sys

import pytest

from valora_jax.media import Tokenizer, render_chat
from valora_jax.media.chat import content_format

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CASES = json.loads((GOLDENS / "text" / "text_cases.json").read_text("utf-8"))["chat"]
LLAVA = Tokenizer.from_folder(GOLDENS / "checkpoints" / "llava15-tiny").chat_template or ""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICTURE = {"type": "image", "image": "a.png"}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def render(messages, template=LLAVA, **options):
    options = dict(image_token="<image>", special_tokens={}) | options
    return render_chat(template, messages, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"])
def test_prompts_match_the_golden(case):
    options = {"add_generation_prompt": case["add_generation_prompt"]}
    assert render(case["messages"], **options) == (case["text"], [])


def test_a_string_is_a_list_of_one_text():
    text, _ = render([{"role": "user", "content": "Hi"}])
    assert text == "USER: Hi ASSISTANT:"


def test_images_come_out_in_order():
    text, images = render(
        [
            {"role": "user", "content": [{"type": "text", "text": "Both?"}, PICTURE, URL]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "image", "image": b"bytes"}]},
        ]
    )
    assert text.count("<image>") == 3
    assert images == ["a.png", URL["image_url"]["url"], b"bytes"]


def test_a_template_for_strings_gets_strings():
    content = [{"type": "text", "text": "What"}, PICTURE, {"type": "text", "text": "is it?"}]
    text, images = render([{"role": "user", "content": content}], CHATML)
    assert text == "<|im_start|>user\n<image>\nWhat\nis it?<|im_end|>\n<|im_start|>assistant\n"
    assert images == ["a.png"]


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (LLAVA, "parts"),
        (CHATML, "string"),
        ("{{ messages[0].content }}", "string"),
        ("{{ messages[0].content | tojson }}", "string"),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
            "parts",
        ),
        (
            "{% set items = messages[0]['content'] %}{% if items is string %}{{ items }}"
            "{% else %}{{ items | map(attribute='text') | join }}{% endif %}",
            "parts",
        ),
        ("{{ raise_exception('never') }}", "string"),
    ],
)
def test_the_form_of_content_is_found_out(template, want):
    assert content_format(template) == want


def test_special_tokens_are_variables_of_the_template():
    template = "{{ bos_token }}" + CHATML
    assert render(
        [{"role": "user", "content": "x"}], template, special_tokens={"bos_token": "<s>"}
    )[0].startswith("<s><|im_start|>")


BAD = {
    "no_messages": [],
    "one_message": {"role": "user", "content": "x"},
    "not_a_dict": [{"role": "user", "content": "x"}, "text"],
    "no_role": [{"role": "user", "content": "x"}, {"content": "x"}],
    "unknown_role": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}],
    "no_content": [{"role": "user", "content": "x"}, {"role": "user"}],
    "unknown_part": [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "a"}]},
    ],
    "text_without_text": [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": 3}]},
    ],
    "path_as_url": [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/a.png"}}]},
    ],
}


@pytest.mark.parametrize("messages", BAD.values(), ids=BAD.keys())
def test_a_wrong_message_is_named(messages):
    where = r"messages\[1\]" if len(messages) == 2 and isinstance(messages, list) else "list"
    with pytest.raises(ValueError, match=where):
        render(messages)


def test_a_template_may_refuse():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        render([{"role": "user", "content": "x"}], template)


def test_a_template_runs_in_a_sandbox():
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="unsafe"):
        render([{"role": "user", "content": "x"}], template)


def test_importing_the_package_costs_neither_transformers_nor_jax():
    code = "import sys, valora_jax.media; print({'transformers', 'jinja2', 'jax'} & {*sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "set()\n"


@pytest.mark.parametrize("messages", [5, "hello", [], {"role": "user"}])
def test_what_is_no_list_of_messages_is_refused(messages):
    with pytest.raises(ValueError, match="a chat needs a list of at least one message"):
        render(messages)
