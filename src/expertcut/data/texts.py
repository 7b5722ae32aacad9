"""Texts to calibrate on, to judge by and to train on: JSON lines, parquet, plain files, the Hub.

A record holds `text`, `messages` (with `tools`, if any) or `prompt` and `completion`. Errors name
file and line.
"""

import codecs
import errno
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from expertcut.data.questions import normalised
from expertcut.data.readers import opened, read_object
from expertcut.data.sources import hub_errors
from expertcut.errors import ModelError, TextError
from expertcut.files import MARK_BYTES, open_file, read_file, wide_encoding

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 16 << 20  # of one document: a tokenizer needs some hundred bytes a token
_MAX_FILE_BYTES = 1 << 40
_MAX_LINE_BYTES = 64 << 20
_HEAD_BYTES = 1 << 16
_FIELDS = ("text", "content")  # of a record that has neither messages nor prompt
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FILE_ENDING = re.compile(r"\.[A-Za-z]+$")  # a version of a data set has digits
_MUST = "must hold text, messages with role and content, or prompt and completion"


@dataclass(frozen=True)
class Text:
    """A document as the model reads it (`read`), and what it says without a chat template.

    What the assistant wrote begins at a character (`completion`), or is a mask over `ids`, the
    tokens of a chat; both are None for plain text. The template of a chat writes special tokens.
    """

    read: str
    said: str
    where: str = ""
    completion: int | None = None
    is_chat: bool = False
    ids: tuple[int, ...] | None = None
    is_assistant: tuple[bool, ...] | None = None

    @cached_property
    def overlap_hash(self) -> str:
        """16 hex digits that ignore white space and invisible characters."""
        return hashlib.sha256(normalised(self.said).encode()).hexdigest()[:16]

    @property
    def hash_line(self) -> str:
        """Hash of the text as it stands, and `overlap_hash`: a line of `chosen_on.txt`."""
        return f"{content_hash(self.said)} {self.overlap_hash}"


def content_hash(said: str) -> str:
    """16 hex digits over a text as it stands."""
    return hashlib.sha256(said.strip().encode()).hexdigest()[:16]


class Block(Protocol):
    """Documents of one file, or of one row group of a parquet file, in their order."""

    def __len__(self) -> int: ...

    def records(self, order: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """Positions (file:line) and records in this order: mappings, or the text itself."""


class JsonLines:
    """The lines of a JSON lines file that are not blank; only their places are kept."""

    def __init__(self, file: Path) -> None:
        self.file = file
        begins, numbers, at, number = [], [], 0, 0
        with opened(file, _MAX_FILE_BYTES, TextError) as stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES:
                    raise TextError(f"{file}:{number}: {_too_long(len(line), 'bytes')}")
                if line.strip():
                    begins.append(at)
                    numbers.append(number)
                at += len(line)
        self.begins, self.numbers = np.array(begins, np.int64), np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.begins)

    def records(self, order: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """Positions and JSON objects of lines."""
        with opened(self.file, _MAX_FILE_BYTES, TextError) as stream:
            for index in order:
                where = f"{self.file}:{self.numbers[index]}"
                stream.seek(int(self.begins[index]))
                line = stream.readline(_MAX_LINE_BYTES)
                if self.numbers[index] == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield where, read_object(line, where, TextError)


class PlainFile:
    """A file that is one document."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __len__(self) -> int:
        return 1

    def records(self, order: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """The file's name and its text."""
        for _ in order:
            yield str(self.file), plain_text(self.file)


class _NotTextError(TextError):
    """The file is not UTF-8 text, as images are not."""


def plain_text(file: Path) -> str:
    """The text of a file. Raises TextError with the line of what is not UTF-8 text."""
    try:
        with open_file(file) as stream:
            _decoded(file, stream.read(_HEAD_BYTES), is_whole=False)  # of a binary file of any size
        return _decoded(file, read_file(file, 4 * MAX_CHARACTERS))
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TextError(f"{file}: {_too_long(4 * MAX_CHARACTERS, 'bytes')}") from None
        raise TextError(f"{file}: cannot be read: {error.strerror}") from None


def _decoded(file: Path, content: bytes, *, is_whole: bool = True) -> str:
    if (encoding := wide_encoding(content[:MARK_BYTES])) is not None:
        raise _NotTextError(f"{file}: {encoding} text, must be UTF-8: save it as UTF-8")
    fault, at = "a NUL byte", content.find(b"\0")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, is_whole)
    except UnicodeDecodeError as error:
        if at < 0 or error.start < at:
            fault, at = "a byte that is not UTF-8", error.start
    if at < 0:
        return text
    line = content.count(b"\n", 0, at) + 1
    raise _NotTextError(f"{file}:{line}: {fault}: it is not a text, or save it as UTF-8")


class RowGroup:
    """The rows of one row group of a parquet file."""

    def __init__(self, file: Path, group: int, first: int, n_rows: int) -> None:
        self.file, self.group, self.first, self.n_rows = file, group, first, n_rows

    def __len__(self) -> int:
        return self.n_rows

    def records(self, order: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """Positions (file:row from 1) and rows."""
        rows = _rows_of_group(self.file, self.group)
        for index in order:
            yield f"{self.file}:{self.first + index + 1}", rows.slice(index, 1).to_pylist()[0]


@lru_cache(maxsize=1)
def _rows_of_group(file: Path, group: int) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(group)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None


def row_groups(file: Path) -> list[RowGroup]:
    """The row groups of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        open_file(file).close()  # a pipe might never end
        found = parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from None
    groups, first = [], 0
    for group in range(found.num_row_groups):
        n_rows = found.row_group(group).num_rows
        groups.append(RowGroup(file, group, first, n_rows))
        first += n_rows
    return groups


class TextReader:
    """Makes a `Text` of a record, chats in the tokenizer's template.

    `field` names the text's column; `marks_assistant` finds what the assistant wrote, and refuses
    what has no assistant.
    """

    def __init__(self, tokenizer: Any, field: str = "", *, marks_assistant: bool = False) -> None:
        self.tokenizer, self.field, self.marks_assistant = tokenizer, field, marks_assistant
        if marks_assistant and not getattr(tokenizer, "is_fast", False):
            raise TextError(
                "--assistant-only needs a tokenizer that knows the place of each token in the "
                "text (tokenizer.json), which this model's does not: leave the option out"
            )

    def read(self, where: str, record: Any) -> Text | None:
        """The text; None if it is empty. Raises TextError with file and line."""
        text = self._text(where, record)
        check_characters(where, text.read)
        if self.marks_assistant and text.completion is None and text.is_assistant is None:
            raise TextError(
                f"{where}: --assistant-only needs messages, or prompt and completion: this is text"
            )
        return text if text.said.strip() else None

    def _text(self, where: str, record: Any) -> Text:
        if isinstance(record, str):
            return Text(record, record, where)
        if self.field:
            return self._named(where, record)
        if record.get("messages") is not None:
            return self._chat(where, record["messages"], record.get("tools"))
        if record.get("prompt") is not None and record.get("completion") is not None:
            return self._completed(where, record["prompt"], record["completion"], record)
        own = {field: record[field] for field in _FIELDS if field in record}
        for value in own.values():
            if isinstance(value, str):
                return Text(value, value, where)
        if own and all(value is None for value in own.values()):  # as data sets keep empty ones
            return Text("", "", where)
        for field, value in own.items():
            raise TextError(f"{where}: its {field} must be a text, not {type(value).__name__}")
        raise TextError(f"{where}: {_MUST}: it holds {_keys(record)}")

    def _named(self, where: str, record: Mapping[str, Any]) -> Text:
        value = record.get(self.field)
        if isinstance(value, list):
            return self._chat(where, value, record.get("tools"))
        if self.field in record and value is None:
            return Text("", "", where)
        if not isinstance(value, str):
            raise TextError(f"{where}: has no text {self.field}: it holds {_keys(record)}")
        return Text(value, value, where)

    def _completed(
        self, where: str, prompt: Any, completion: Any, record: Mapping[str, Any]
    ) -> Text:
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat(where, [*prompt, *completion], record.get("tools"))
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise TextError(f"{where}: prompt and completion must both be texts or both messages")
        read = prompt + completion
        return Text(read, read, where, len(prompt))

    def _chat(self, where: str, messages: Any, tools: Any) -> Text:
        messages, tools = checked_messages(where, messages), checked_tools(where, tools)
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise TextError(f"{where}: a chat, but the tokenizer has no chat template: write text")
        if self.marks_assistant and not _GENERATION.search(str(template)):
            raise TextError(
                f"{where}: --assistant-only: the tokenizer's chat template does not mark what the "
                "assistant writes ({% generation %}): leave the option out, or give prompt and "
                "completion"
            )
        apply = partial(self.tokenizer.apply_chat_template, messages, tools=tools)
        ids = is_assistant = None
        try:
            read = apply(tokenize=False)
            check_characters(where, read)
            if self.marks_assistant:
                found = apply(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
                ids = tuple(found["input_ids"])
                is_assistant = tuple(map(bool, found["assistant_masks"]))
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(f"{where}: the tokenizer's chat template fails: {reason}") from None
        said = "\n".join(filter(None, map(said_in, messages)))
        return Text(read, said, where, None, True, ids, is_assistant)


def check_characters(where: str, text: str) -> None:
    """Raises TextError for a lone surrogate, and for a text that is too long."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(f"{where}: a lone surrogate is not a character: remove it") from None
    if len(text) > MAX_CHARACTERS:
        raise TextError(f"{where}: {_too_long(len(text))}")


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(ascii, record))[:200] or "nothing"


def checked_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """The turns of a chat, each with role and content or calls of tools; else a TextError."""
    is_list = isinstance(messages, list | tuple) and len(messages) > 0
    for message in messages if is_list else [None]:
        own = message if isinstance(message, dict) else {}
        content, has_calls = own.get("content"), bool(own.get("tool_calls"))
        has_content = isinstance(content, str | list) or (content is None and has_calls)
        if not isinstance(own.get("role"), str) or not has_content:
            raise TextError(f"{where}: messages must be turns with role and content")
    # Parquet and `datasets` fill absent keys with None, which templates do not expect.
    return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]


def checked_tools(where: str, tools: Any) -> list[Any] | None:
    """The JSON schemas of a chat's tools, if any; TextError for anything else."""
    if isinstance(tools, str):  # as data sets keep them
        try:
            tools = json.loads(tools)
        except ValueError:
            raise TextError(f"{where}: tools is not JSON: it must be a list") from None
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise TextError(f"{where}: tools must be a list of JSON schemas")
    return list(tools)


def said_in(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text", "") for part in content if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else json.dumps(message.get("tool_calls"))


def _too_long(n: int, unit: str = "characters") -> str:
    most = f"at most {MAX_CHARACTERS:,} characters can be read"
    return f"a document of {n:,} {unit} or more, {most}: split it into several"


def records_of(blocks: Sequence[Block], seed: int | None) -> Iterator[tuple[str, Any]]:
    """Every record of some blocks with its position, in order or with a seed in random order.

    Blocks come one after another, so that a file of many row groups is read once.
    """
    chance = None if seed is None else np.random.default_rng(seed)
    for at in range(len(blocks)) if chance is None else chance.permutation(len(blocks)):
        block = blocks[at]
        order: Any = range(len(block)) if chance is None else chance.permutation(len(block))
        yield from block.records(order)


def find_blocks(path: Path) -> list[Block]:
    """The documents of a local file, or of all files below a folder, in name order.

    In a folder, files that are no text are passed over. Raises TextError: nothing to read.
    """
    if path.suffix == ".json" and not path.is_dir():
        raise TextError(f"{path}: must be JSON lines, an object in each: save it as .jsonl")
    if not path.is_dir():
        return _blocks_of(path)
    blocks: list[Block] = []
    n_binary = 0
    for file in _files_below(path):
        own = _blocks_of(file)
        try:
            blocks += [b for b in own if not isinstance(b, PlainFile) or plain_text(file)]
        except _NotTextError:
            n_binary += 1
    if not blocks:
        raise TextError(f"{path} holds no text: name a folder with .jsonl, .parquet or text files")
    if n_binary:
        logger.warning("%s: %d files that are not UTF-8 text are left out", path, n_binary)
    return blocks


def local_source(spec: str) -> tuple[Path | None, str]:
    """The local file or folder of a spec, and the field behind a colon; None for the Hub."""
    if not spec:
        raise TextError("--text names nothing: give a file, a folder or a data set of the Hub")
    before, colon, field = spec.rpartition(":")
    for text, own in ((spec, ""), *([(before, field)] if colon and before else [])):
        if exists(path := Path(text).expanduser()):
            return path, own
    id = spec.partition(":")[0]
    is_path = spec.startswith((".", "/", "~")) or _FILE_ENDING.search(id)
    if is_path or spec.count("/") != 1:
        raise TextError(f"no such text: {spec} does not exist")
    return None, ""


def exists(path: Path) -> bool:
    """Whether there is something. Raises TextError: that cannot be told."""
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, a folder that cannot be read
        raise TextError(f"{str(path)[:200]}: cannot be read: {error.strerror}") from None


def read_texts(spec: str, tokenizer: Any) -> list[Text]:
    """All texts of a source that are not empty, in order. Raises TextError: a fault, or none."""
    path, field = local_source(spec)
    if path is not None:
        blocks = find_blocks(path)
        records = records_of(blocks, None)
    else:
        (_, records), field = hub_records(spec, None, None), hub_parts(spec)[3]
    reader = TextReader(tokenizer, field)
    texts = [text for where, record in records if (text := reader.read(where, record))]
    if not texts:
        raise TextError(f"{spec} holds no text that is not empty")
    return texts


def text_files(spec: str) -> list[Path] | None:
    """The files of a local source, None for a data set of the Hub."""
    path, _ = local_source(spec)
    if path is None:
        return None
    return _files_below(path) if path.is_dir() else [path]


def _files_below(folder: Path) -> list[Path]:
    """All files that are not hidden and not compiled Python, in name order."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(map(_is_passed_over, file.relative_to(folder).parts))
    ]


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _blocks_of(file: Path) -> list[Block]:
    if file.suffix in (".jsonl", ".ndjson"):
        return [JsonLines(file)]
    return [*row_groups(file)] if file.suffix == ".parquet" else [PlainFile(file)]


def hub_records(
    name: str, revision: str | None, seed: int | None
) -> tuple[str | None, Iterator[tuple[str, Any]]]:
    """Revision and records of `org/name[:config][:split][:field]`, streamed.

    Raises TextError: it cannot be read.
    """
    id, config, split, _ = hub_parts(name, revision)
    with hub_errors(TextError, name):
        from datasets import load_dataset

        pinned = revision or _commit_of(id)
        rows: Any = load_dataset(id, config, split=split, revision=pinned, streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=10_000)

    def records() -> Iterator[tuple[str, Any]]:
        with hub_errors(TextError, name):
            for number, row in enumerate(rows, start=1):
                yield f"{id} {split} row {number}", row

    return pinned, records()


def hub_parts(name: str, revision: str | None = None) -> tuple[str, str | None, str, str]:
    """Id, configuration, split and field of `org/name[:config][:split][:field]`.

    One or two parts are read as a configuration only where the data set has one of that name.
    """
    id, *parts = name.split(":")
    if len(parts) > 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", id):
        raise TextError(
            f"no such text: {name} is not a file, a folder or org/name[:config][:split][:field]"
        )
    if len(parts) < 3:
        has_config = bool(parts) and parts[0] in _configs_of(id, revision)
        parts = parts if has_config else ["", *parts]
    config, split, field = [*parts, "", "", ""][:3]
    return id, config or None, split or "train", field


@lru_cache
def _configs_of(id: str, revision: str | None) -> tuple[str, ...]:
    with hub_errors(TextError, id):
        from datasets import get_dataset_config_names

        return tuple(get_dataset_config_names(id, revision=revision))


@lru_cache
def _commit_of(id: str) -> str | None:
    from datasets import config
    from huggingface_hub import HfApi

    if Path(id).is_dir() or config.HF_HUB_OFFLINE:
        return None
    return HfApi().dataset_info(id).sha
