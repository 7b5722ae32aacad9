"""HTTP answers of the local Hub."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; a HEAD request gets it without its body."""

    body: bytes
    headers: dict[str, str]
    status: int = 200


class NotAllowedError(Exception):
    """What the Hub refuses with another status than 404."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def json_answer(content: object, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)
