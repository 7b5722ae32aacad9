"""Plain texts and chats as JSON lines: `{"text": …}`, `{"messages": [{"role", "content"}, …]}`."""

import json
from pathlib import Path
from typing import Any

from expertcut.errors import QuizError


def read_texts(file: Path, tokenizer: Any) -> list[str]:
    """Each line's text as the model reads it, chats in the tokenizer's template.

    Raises:
        QuizError: a file that cannot be read, a line that holds neither, a chat without template.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise QuizError(f"{file} cannot be read: {error}") from None
    texts = [
        _text(line, f"{file} line {number}", tokenizer)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not texts:
        raise QuizError(f"{file} holds no text: one JSON object a line, with text or messages")
    return texts


def _text(line: str, where: str, tokenizer: Any) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QuizError(f"{where} is no JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("text"), str) and found["text"]:
        return str(found["text"])
    messages = found.get("messages") if isinstance(found, dict) else None
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise QuizError(
            f"{where} must hold text, or messages with role and content: it holds "
            f"{', '.join(map(str, found)) if isinstance(found, dict) else type(found).__name__}"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise QuizError(f"{where} is a chat, but the tokenizer has no chat template: write text")
    made: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return made


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(key), str) for key in ("role", "content")
    )
