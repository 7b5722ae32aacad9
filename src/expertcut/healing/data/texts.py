"""Plain texts and chats as JSON lines: `{"text": …}`, `{"messages": [{"role", "content"}, …]}`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from expertcut.data.readers import json_lines
from expertcut.errors import ModelError, QuizError


@dataclass(frozen=True)
class Text:
    """What the model reads, and what is said there: of a chat the messages without the template."""

    read: str
    said: str


def read_texts(file: Path, tokenizer: Any) -> list[Text]:
    """Each line's text, chats in the tokenizer's template.

    Raises:
        QuizError: a file that cannot be read, a line that holds neither, a chat without template.
        ModelError: a template that fails, or asks for what transformers' sandbox does not give.
    """
    texts = [_text(record, where, tokenizer) for where, record in json_lines(file)]
    if not texts:
        raise QuizError(f"{file} holds no text: one JSON object a line, with text or messages")
    return texts


def _text(record: Mapping[str, Any], where: str, tokenizer: Any) -> Text:
    if (text := record.get("text")) and isinstance(text, str):
        made = Text(text, text)
    else:
        made = _chat(record, where, tokenizer)
    if any("\ud800" <= char <= "\udfff" for char in made.read):
        raise QuizError(f"{where}: a lone surrogate, which is no character")
    return made


def _chat(record: Mapping[str, Any], where: str, tokenizer: Any) -> Text:
    messages = record.get("messages")
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise QuizError(
            f"{where}: must hold text, or messages with role and content: it holds "
            f"{', '.join(record)[:200] or 'nothing'}"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise QuizError(f"{where}: a chat, but the tokenizer has no chat template: write text")
    try:
        made: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ModelError(f"{where}: the tokenizer's chat template fails: {error}") from None
    return Text(made, "\n".join(message["content"] for message in messages))


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(key), str) for key in ("role", "content")
    )
