"""An adapter on its way into the checkpoint of a cut: checked before, written with it."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertcut.checkpoints.adapters.places import Base
from expertcut.checkpoints.adapters.reading import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from expertcut.checkpoints.adapters.slicing import Folds, adapter_rewrite
from expertcut.checkpoints.files.shards import Shard, lay_out
from expertcut.checkpoints.files.streaming import check_space, check_written, write_shards
from expertcut.checkpoints.layouts.names import blocks_of
from expertcut.edits.plan import Draft, Plan, PlanAdapter
from expertcut.errors import ModelError, OutputError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import Source
from expertcut.models.safetensors_index import read_headers
from expertcut.models.validate import check_values

ADAPTER_FOLDER = "adapter"  # in the checkpoint's

_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Carried:
    """An adapter of a model, and the plan that cuts both; `folder` is the checkpoint to be."""

    adapter: Adapter
    source: Source
    draft: Draft
    folder: Path

    def write(self, temporary: Path, plan: Plan, folds: Folds) -> Plan:
        """Writes it sliced, as peft lays it out, into what will be `folder`; the plan names it.

        `folds` are those of layout stock, by layer.

        Raises:
            ModelError: the adapter became shorter while it was read.
            OutputError: the place cannot be written.
        """
        shard, place = self.laid_out(folds), temporary / ADAPTER_FOLDER
        try:
            write_shards(place, [shard])
        except EOFError:
            raise ModelError(f"{self.adapter.folder} became shorter while it was read") from None
        except OSError as error:
            raise OutputError(f"{place} cannot be written: {error.strerror}") from None
        check_written(place, [shard])
        write_atomically(
            place / CONFIG_FILE, (json.dumps(self._config(), indent=2) + "\n").encode()
        )
        return plan.model_copy(update={"adapter": _record(self.adapter)})

    def laid_out(self, folds: Folds | None = None) -> Shard:
        """The file of its weights; without the folds its values are wrong, not its size.

        Raises:
            ModelError: it is of another model, or adapts what cannot be sliced.
        """
        headers = read_headers(self.source.path)
        is_tied = bool(read_config(self.source.path).get("tie_word_embeddings"))
        base = Base(headers, blocks_of(headers, self.draft.edits), is_tied)
        rewrite = adapter_rewrite(self.adapter, base, self.draft, folds)
        (shard,) = lay_out(self.adapter.stored, rewrite, _NO_LIMIT)
        return replace(shard, name=WEIGHTS_FILE)

    def _config(self) -> dict[str, Any]:
        """As it was, with its new base, whose own config names the class of layout exact."""
        config = {**self.adapter.config, "revision": None}
        config["base_model_name_or_path"] = str(self.folder.resolve())
        if self.draft.layout == "exact":
            config |= {"auto_mapping": None, "task_type": config.get("task_type") or "CAUSAL_LM"}
        return config


def carried(adapter: Path | None, source: Source, draft: Draft, folder: Path) -> Carried | None:
    """An adapter that fits the model and the plan, and has room; None where there is none.

    Raises:
        ModelError: no LoRA adapter, one of another model, or one that cannot be sliced.
        OutputError: too little space.
    """
    if adapter is None:
        return None
    found = Carried(read_adapter(adapter), source, draft, folder)
    check_space(folder, found.laid_out().size_bytes)
    check_values(adapter / WEIGHTS_FILE)
    return found


def _record(adapter: Adapter) -> PlanAdapter:
    sums = {}
    for key, name in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
        with (adapter.folder / name).open("rb") as stream:
            sums[f"{key}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return PlanAdapter(path=str(adapter.folder), **sums)
