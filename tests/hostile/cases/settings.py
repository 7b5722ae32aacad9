"""What lies beside tokenizer.json: settings, special tokens, templates."""

import os
from pathlib import Path

from tests.hostile.case import Corpus
from tests.hostile.edits import Change, in_model, json_of, text_of

CASES = Corpus("tokenizer settings")
SETTINGS = "tokenizer_config.json"


def settings(**fields: object) -> Change:
    return json_of(SETTINGS, lambda content: content.update(fields))


SETTINGS_OF: dict[str, tuple[Change, str]] = {
    "no JSON": (text_of(SETTINGS, "{"), r"tokenizer_config\.json cannot be read as JSON"),
    "a list": (text_of(SETTINGS, "[]"), r"tokenizer_config\.json holds a list"),
    "10,000 levels": (
        text_of(SETTINGS, '{"a":' + "[" * 10_000 + "]" * 10_000 + "}"),
        r"tokenizer_config\.json cannot be read as JSON",
    ),
    "a class that is a list": (settings(tokenizer_class=["x"]), "cannot be loaded"),
    "a limit that is a text": (settings(model_max_length={"a": 1}), "cannot be loaded"),
    "special tokens that are numbers": (settings(bos_token=7), "cannot be loaded"),
    "an added token that is a number": (
        settings(added_tokens_decoder={"0": 7}),
        "cannot be loaded",
    ),
    "an added token of no number": (
        settings(added_tokens_decoder={"zero": {"content": "x"}}),
        "cannot be loaded",
    ),
    "added tokens that are a list": (settings(added_tokens_decoder=[1]), "cannot be loaded"),
    "an auto_map that is a number": (settings(auto_map=1), "cannot be loaded"),
}
for fault, (change, says) in SETTINGS_OF.items():
    CASES.add(fault, in_model(change), "olmoe/tokenizer", says)

BESIDE = {
    "special_tokens_map.json with no JSON": ("special_tokens_map.json", "{"),
    "special_tokens_map.json with a list": ("special_tokens_map.json", "[1]"),
    "added_tokens.json with no JSON": ("added_tokens.json", "x"),
    "added_tokens.json with a list": ("added_tokens.json", '["a"]'),
}
for fault, (name, content) in BESIDE.items():
    CASES.add(fault, in_model(text_of(name, content)), f"olmoe/{name}", "JSON")
CASES.add(
    "a special token that is a number in special_tokens_map.json",
    in_model(text_of("special_tokens_map.json", '{"bos_token": {"content": 7}}')),
    "olmoe/tokenizer",
    "cannot be loaded",
)


CASES.add(
    "a template folder that is a pipe's",
    in_model(
        lambda f: (
            (f / "additional_chat_templates").mkdir(),
            os.mkfifo(f / "additional_chat_templates" / "tool.jinja"),
        )
    ),
    r"additional_chat_templates/tool\.jinja",
    "not a regular file",
)


def linked_template(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("/etc/hostname")


CASES.add(
    "a template that is a link",
    in_model(linked_template),
    r"chat_template\.jinja",
    "leads outside",
)
