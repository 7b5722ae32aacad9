"""The prompts of `eval --generate`: read from JSON lines, encoded by each model's tokenizer."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from expertcut.data.readers import json_lines
from expertcut.data.texts import check_characters, checked_messages, checked_tools, said_in
from expertcut.errors import ModelError, TextError
from expertcut.models import validate
from expertcut.models.checkpoint_dir import read_object
from expertcut.models.load import LoadOptions, Source, load_config, load_tokenizer
from expertcut.scoring.engine import context_length
from expertcut.scoring.passes import grows_with_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text as it stands, or the turns of a chat, which the model answers."""

    where: str  # file:line
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()

    def rendered(self, tokenizer: Any) -> str:
        """The text that is tokenized: that of the chat in the tokenizer's template."""
        if not self.messages:
            return self.text
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                f"{self.where}: a chat, but {validate.file_of(tokenizer).parent} has no chat "
                "template: write prompt or text"
            )
        try:
            text: str = tokenizer.apply_chat_template(
                list(self.messages),
                tools=list(self.tools) or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ModelError(
                f"{self.where}: the tokenizer's chat template fails: {reason}"
            ) from None
        return text


@dataclass(frozen=True)
class ModelPrompts:
    """The prompts as one model reads them; its `tokenizer`, and the tokens that end an output."""

    source: Source
    tokenizer: Any
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]

    def encode(self, text: str) -> tuple[int, ...]:
        """A text without special tokens before or after it."""
        return tuple(validate.token_ids(self.tokenizer, [text], add_special_tokens=False)[0])

    @property
    def tokenizer_hash(self) -> str:
        """Of the vocabulary: with equal ones, ids are the same tokens."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(vocabulary.encode()).hexdigest()


@dataclass(frozen=True)
class Prompts:
    """A file of prompts, as every model reads it; the first is the base."""

    file: Path
    sha256: str
    models: tuple[ModelPrompts, ...]


def read_for(
    file: Path, sources: Sequence[Source], load_as: LoadOptions, max_new_tokens: int
) -> Prompts:
    """Reads and encodes prompts for all models before one runs."""
    prompts = read_prompts(file)
    models = tuple(encode_prompts(s, prompts, load_as, max_new_tokens) for s in sources)
    return Prompts(file, _sha256(prompts), models)


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts from lines of `{"prompt"}`, `{"text"}` or `{"messages"}`, else a TextError.

    The last turns of a chat are left out if they are the assistant's: the model writes them.
    """
    prompts = [_prompt(record, where) for where, record in json_lines(file)]
    if not prompts:
        raise TextError(f"{file} holds no prompts: write lines of JSON with prompt or messages")
    n_different = len({json.dumps([p.text, p.messages, p.tools]) for p in prompts})
    if n_different < len(prompts):
        logger.warning(
            "%s: %d of %d prompts are repeats: intervals and tests take each as a sample of its "
            "own, so they are too narrow",
            *(file, len(prompts) - n_different, len(prompts)),
        )
    return prompts


def _sha256(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the content of all prompts."""
    content = [[p.text, p.messages, p.tools] for p in prompts]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _prompt(record: Mapping[str, Any], where: str) -> Prompt:
    text = record.get("prompt", record.get("text"))
    if isinstance(text, str):
        contents, prompt = [text], Prompt(where, text)
    elif "messages" in record:
        messages = checked_messages(where, record["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        contents = [said_in(message) for message in messages if message.get("content")]
        tools = checked_tools(where, record.get("tools")) or ()
        prompt = Prompt(where, messages=tuple(messages), tools=tuple(tools))
    else:
        raise TextError(
            f"{where}: must hold prompt or text, or messages with role and content: it holds "
            f"{', '.join(record)[:200] or 'nothing'}"
        )
    if not any(content.strip() for content in contents):
        raise TextError(f"{where}: the prompt is empty")
    for content in contents:
        check_characters(where, content)
    return prompt


def encode_prompts(
    source: Source, prompts: Sequence[Prompt], load_as: LoadOptions, max_new_tokens: int
) -> ModelPrompts:
    """The prompts for one model; those that leave no room in its context are refused.

    Reads the tokenizer and config.json alone, so that all models are checked before one runs.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=load_as.trust_remote_code)
    config = load_config(source, load_as)
    texts = tuple(prompt.rendered(tokenizer) for prompt in prompts)
    ids = []
    for prompt, text in zip(prompts, texts, strict=True):
        # A chat template writes special tokens itself.
        is_text = not prompt.messages
        ids.append(tuple(validate.token_ids(tokenizer, [text], add_special_tokens=is_text)[0]))
        if not ids[-1]:
            raise TextError(f"{prompt.where}: {source.id} reads no token of the prompt")
    most = None if grows_with_prompt(config) else context_length(config, tokenizer)
    room = None if most is None else most - max_new_tokens
    long = [n for n, found in enumerate(ids) if room is not None and len(found) > room]
    if long:
        longest = max(long, key=lambda n: len(ids[n]))
        raise TextError(
            f"{prompts[longest].where}: a prompt of {len(ids[longest]):,} tokens and "
            f"{max_new_tokens:,} new ones do not fit in the {most:,} of the context of {source.id} "
            f"({len(long):,} of {len(ids):,} prompts): lower --max-new-tokens or leave it out"
        )
    return ModelPrompts(source, tokenizer, texts, tuple(ids), _end_ids(source, config, tokenizer))


def _end_ids(source: Source, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of generation_config.json, else of config.json, else of the tokenizer."""
    file = source.path / "generation_config.json"
    named = read_object(file).get("eos_token_id") if file.is_file() else None
    if named is None:
        named = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise ModelError(f"{file}: eos_token_id is {str(named)[:60]}, must be token ids")
    return tuple(ends)
