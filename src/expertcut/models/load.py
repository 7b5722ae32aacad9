"""Loads models: from a folder or hub id to a checked source and a model with its MoE blocks.

The modelling file in checkpoints of layouts `exact`, `routed` and `packed` runs without
`--trust-remote-code` if it equals, byte for byte, that of this package or of an earlier version.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from expertcut.errors import ContractError, ModelError, SettingsError
from expertcut.files import advance, hub_reason
from expertcut.models import checkpoint_dir, modeling_packed, parallel, safetensors_index, validate
from expertcut.models.checkpoint_dir import fingerprint_of, read_config, read_object, stamp
from expertcut.models.contract_check import Contract, declare
from expertcut.models.devices import find_device, free_bytes, runs_on, spread
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.find_blocks import candidates, find_blocks, probe_ids, routers
from expertcut.models.kernels import BY_EXPERT, use_faster_products
from expertcut.models.layerwise import LayerWeights, opened
from expertcut.models.modeling_packed import PACKING_KEY, Packing
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import INDEX_FILE, SINGLE_FILE, Stored, StoredTensor

MODELLING_FILE, ROUTED_FILE = "modeling_exact.py", "modeling_routed.py"
ROUTED_EXACT_FILE, PACKED_FILE = "modeling_routed_exact.py", "modeling_packed.py"
# By the file that config.json names: itself, and those that it imports.
_CODE_FILES = {
    MODELLING_FILE: (MODELLING_FILE,),
    ROUTED_FILE: (ROUTED_FILE,),
    ROUTED_EXACT_FILE: (ROUTED_EXACT_FILE, MODELLING_FILE, ROUTED_FILE),
    PACKED_FILE: (PACKED_FILE, MODELLING_FILE),
}
# SHA-256 of earlier files: two whose constants are called `experts.<id>.approx_value`, one whose
# rule skip compares with the largest gate weight even where `most` leaves that expert out, and two
# for constants of four families only.
_EARLIER_FILES = (
    "315247a9829be5c0b9698b9adeeba7f970089367f5862d97fe38a41d04a01ace",
    "4305f98b4a520ff0b5be793cfda7755250bb42668f257c682e42d17e7d502108",
    "1352bf2af53294bdcf077135903930292b063b5c1aaf64e846944006fb67b8c4",
    "2505a1af71aa90e9dcd1db6943814b72bee25389d8b5f23aa0b3995717c9df16",
    "824fceaebdaa5ad82d477bec2d7356beded712b5c0b9d6d159565a072d2650c0",
)
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md")
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MODELS: Any = AutoModelForCausalLM  # its types lack output_loading_info


def modelling_code(name: str = MODELLING_FILE) -> bytes:
    """The content of a modelling file."""
    return Path(__file__).with_name(name).read_bytes()


def runs_our_code_only(folder: Path, config: dict[str, Any]) -> bool:
    """Whether all code that config.json names is a modelling file of this package."""
    named = config.get("auto_map")
    if not isinstance(named, dict):
        return False
    # A name with `--` before it is a class of another repository.
    stems = {c.rpartition(".")[0] if isinstance(c, str) else "" for c in named.values()}
    name = f"{stems.pop()}.py" if len(stems) == 1 else ""
    files = _CODE_FILES.get(name, ())
    return bool(files) and all(_is_ours(folder / file) for file in files)


def _is_ours(file: Path) -> bool:
    content = file.read_bytes() if file.is_file() else b""
    known = hashlib.sha256(content).hexdigest()
    return content == modelling_code(file.name) or known in _EARLIER_FILES


def check_named(folder: Path, config: dict[str, Any]) -> None:
    """Refuses other weights files, and kernels, which transformers would download and run."""
    file, field = folder / "config.json", "transformers_weights"
    if (weights := config.get(field)) not in (None, SINGLE_FILE, INDEX_FILE):
        raise ModelError(f"{file} says {field} {str(weights)[:100]!r}: must be {SINGLE_FILE}")
    names = [f"{under}{part}_implementation" for part in ("attn", "experts") for under in ("", "_")]
    for part in checkpoint_dir.parts_of(config):
        for name in names:
            named = part.get(name)
            for value in named.values() if isinstance(named, dict) else (named,):
                if value is not None and not (isinstance(value, str) and value.isidentifier()):
                    raise ModelError(
                        f"{file} says {name} {str(value)[:100]!r}, which is code of others: "
                        "take that line out"
                    )


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine: the id or path given, its folder and its revision."""

    id: str
    path: Path
    revision: str | None = None
    contract: Contract | None = None  # what declares its blocks; None if they are found

    @property
    def name(self) -> str:
        """The last part of the id, for names of outputs."""
        return Path(self.id).resolve().name if self.revision is None else self.id.split("/")[-1]

    @property
    def weight_files(self) -> list[Path]:
        """All safetensors files, by name."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def even_quantized(self) -> Stored:
        """The headers, quantized weights included; parsed again only after a file changed."""
        try:
            stamps = tuple(map(stamp, (*self.weight_files, *self.path.glob(INDEX_FILE))))
        except OSError:
            return safetensors_index.read_even_quantized(self.path)  # raises the error
        known: dict[tuple[object, ...], Stored] = self.__dict__.setdefault("_stored", {})
        if stamps not in known:
            known[stamps] = safetensors_index.read_even_quantized(self.path)
        return known[stamps]

    @property
    def packing(self) -> Packing | None:
        """How weights are packed; None for plain weights. A ModelError if they are not so."""
        stored = self.even_quantized
        known: list[tuple[Stored, Packing | None]] = self.__dict__.setdefault("_packing", [])
        if not known or known[-1][0] is not stored:
            config = read_config(self.path) if (self.path / "config.json").exists() else {}
            packing = safetensors_index.read_packing(self.path, config, stored)
            known.append((stored, packing))
        return known[-1][1]

    @property
    def dense(self) -> Stored:
        """The headers as unpacked weights would have them; other quantized weights included."""
        return safetensors_index.dense(self.packing, self.even_quantized)

    @property
    def stored(self) -> Stored:
        """The headers of weights that are not quantized, or packed."""
        if self.packing is None:
            safetensors_index.refuse_quantized(self.path, self.even_quantized)
        return self.even_quantized

    def refuse_packed(self, what: str) -> None:
        """Raises a ContractError for packed weights, which cannot be `what`."""
        if self.packing is not None:
            raise ContractError(
                f"{self.id} has packed experts (compress), which cannot be {what}: take the model "
                "that it was made from, and compress the result"
            )

    @property
    def headers(self) -> Mapping[str, StoredTensor]:
        """The tensors of `stored` by name, in file order."""
        return self.stored.tensors

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config.json (as parsed JSON) and every byte of the weights."""
        return fingerprint_of(self.path)

    def expert_axes(self, names: Sequence[str]) -> Mapping[str, tuple[str, int]]:
        """`meta_model.expert_axes` of config.json, derived once."""
        from expertcut.models.meta_model import expert_axes

        known: dict[Any, dict[str, Any]] = self.__dict__.setdefault("_expert_axes", {})
        if (key := tuple(names)) not in known:
            known[key] = expert_axes(read_config(self.path), key)
        return known[key]


def find_source(
    model: str, revision: str | None = None, contract: Contract | None = None
) -> Source:
    """Finds and checks a checkpoint; a hub id is downloaded or read from the cache."""
    path = Path(model)
    if path.is_dir():
        source = Source(model, path, contract=contract)
    elif path.is_file() and path.suffix in (".csv", ".jsonl"):
        raise ModelError(f"{model} is a file of questions, no model: give it as --quiz {model}")
    elif path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ModelError(f"no such model: {model} is neither a folder nor a hub id (owner/name)")
    else:
        folder = _download(model, revision)
        source = Source(model, folder, folder.name, contract)
    checkpoint_dir.check_folder(source.path)
    config = read_config(source.path)
    if contract is None:  # which finds experts that config.json does not count
        validate.check_moe(model, source.path, config)
    if not source.weight_files:
        checkpoint_dir.refuse_pickles(source.path)
        raise ModelError(f"{model} holds no *.safetensors weights: other formats are not read")
    stored = source.dense
    if "auto_map" not in config:  # else it depends on whether that code is run
        validate.check_counts(source.path, config, stored)
    return source


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Reported(tqdm):
        """Draws nothing; the bar of the bytes written is reported."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.is_of_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.is_of_bytes:
                advance(f"fetching {model}", self.n, self.total or 0, "B")

    advance(f"fetching {model}", 0, 0)
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=list(_FILES), tqdm_class=Reported
        )
        return Path(found)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = hub_reason(error)
        raise ModelError(f"no such model: {model} is not a folder here: {reason}") from None


@dataclass(frozen=True)
class LoadOptions:
    """The options of every command that loads a model.

    `dtype` `stored` is that of the checkpoint, `auto` is float32 on a CPU and `stored` elsewhere.
    `device` `auto` is CUDA if available. `device_map` `auto` spreads the model over all devices and
    the CPU within `max_memory` (`0=20GiB,cpu=60GiB`); the rest goes to the folder `offload`.
    `layerwise` loads the decoder layers one by one, and keeps their outputs in `hidden_states`.
    `parallel` (`tensor`, `expert:4`) spreads it over processes of torchrun instead.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    device_map: Literal["auto"] | None = None
    max_memory: str | None = None
    offload: Path | None = None
    layerwise: bool = False
    hidden_states: Path | None = None
    parallel: str | None = None


@dataclass(frozen=True)
class MoeModel:
    """A loaded model with its tokenizer, MoE blocks and source.

    With `layers` its decoder layers are loaded one by one, and `hidden_states` is where their
    outputs are kept (None: in memory). With a `group` several processes hold it together.
    """

    source: Source
    model: Any
    tokenizer: Any
    blocks: tuple[MoeBlock, ...]
    layers: LayerWeights | None = None
    hidden_states: Path | None = None
    group: parallel.Group | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
        return runs_on(self.model.get_input_embeddings())


def load_tokenizer(source: Source, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint; ModelError for files that it cannot be read from."""
    for file in (source.path / name for name in _JSON):
        if file.exists():
            read_object(file, 500_000_000)  # the largest known has 33 MB
    raw, config = read_config(source.path), None
    with validate.translate_errors("AutoTokenizer", source.path / "tokenizer.json"):
        is_renamed = {ROUTING_KEY, PACKING_KEY, "biased_gates"} & {*raw}  # its `model_type`
        if is_renamed and runs_our_code_only(source.path, raw):
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=True)
        return AutoTokenizer.from_pretrained(
            source.path, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )


def load(source: Source, options: LoadOptions) -> MoeModel:
    """Loads a model in eval mode, without gradients, with reproducible kernels."""
    if source.contract is not None and not options.trust_remote_code:
        raise SettingsError(
            f"{source.contract.path} is code that declares the blocks of {source.id}: read it, "
            "then --trust-remote-code"
        )
    group = parallel.join(options.parallel, options.device) if options.parallel else None
    device = find_device(options.device)
    spreading = spread(options.device, options.device_map, options.max_memory, options.offload)
    if group is not None:
        spreading = group.sharding()
    config, is_trusted = _checked_config(source, options)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    layers = None
    if options.layerwise:
        layers = _open_layers(source, options, config, device, is_trusted=is_trusted)
        model = layers.model.eval().requires_grad_(False)
    else:
        model = _load_all(source, options, config, is_trusted=is_trusted, spreading=spreading)
        check_finite = partial(validate.check_finite, source.path, model, source.weight_files)
        check_finite() if group is None else group.agree(check_finite)
        model = validate.text_model(model)
        model = (model if spreading else model.to(device)).eval().requires_grad_(False)
    if model.config._attn_implementation not in ("sdpa", "eager"):  # the engine knows their masks
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
    declared = () if source.contract is None else _declared(source.contract, model)
    if runs_on(model.get_input_embeddings()).type == "cpu":
        # The loop that statistics observe too, so they change no bit.
        model.set_experts_implementation(BY_EXPERT)
        use_faster_products(model, (b.router for b in declared) if declared else routers(model))
        for tensor in (*model.parameters(), *model.buffers()):
            # Products sum in another order at unaligned addresses of a mapped file, so the last
            # bits would depend on the layout of the files; new tensors of torch are aligned.
            if parallel.local(tensor) is tensor and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
    validate.check_vocabulary(source.path, tokenizer, len(model.get_input_embeddings().weight))
    if group is not None:
        for name, module in candidates(model):
            parallel.attach(group, module.experts, name)
    blocks = _blocks(source, model, declared)
    if not declared:
        validate.warn_untested(source.path, read_config(source.path))
    return MoeModel(source, model, tokenizer, blocks, layers, options.hidden_states, group)


def _load_all(
    source: Source, options: LoadOptions, config: Any, *, is_trusted: bool, spreading: Any
) -> Any:
    """The model with all of its weights."""
    # The config was tested without weights before, so an error here may be in any file.
    with validate.translate_errors("AutoModelForCausalLM", source.path), _loading(source):
        model, info = _class_of(config).from_pretrained(
            source.path,
            config=config,
            trust_remote_code=is_trusted,
            local_files_only=True,
            dtype=_dtype(options.dtype, find_device(options.device)),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            # Without it, transformers would run custom_generate/generate.py.
            generation_config=GenerationConfig(),
            **spreading,
        )
    validate.check_complete(source.path, info, is_trusted=is_trusted)
    return model


def _open_layers(
    source: Source, options: LoadOptions, config: Any, device: torch.device, *, is_trusted: bool
) -> LayerWeights:
    """The model without its decoder layers, which `--layerwise` loads one by one."""
    source.refuse_packed("run with --layerwise")
    if source.contract is not None:
        raise SettingsError("--layerwise runs no contract: leave one of them out")
    if device.type != "cpu":
        raise SettingsError(
            f"--layerwise runs on the CPU, not on {device}: give --device cpu, or --device-map auto"
        )
    if options.trust_remote_code and "auto_map" in read_config(source.path):
        raise SettingsError(f"--layerwise runs no code of {source.id}: leave one of them out")
    with validate.translate_errors("AutoModelForCausalLM", source.path):
        auto, dtype = _class_of(config), _dtype(options.dtype, device)
        return opened(source, config, auto, is_trusted=is_trusted, dtype=dtype)


def load_config(source: Source, options: LoadOptions) -> Any:
    """Loads the config alone, checked against the headers of the weights."""
    return _checked_config(source, options)[0]


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Reports the share of tensors that are loaded, as bytes of the files."""
    n_bytes = sum(file.stat().st_size for file in source.weight_files)

    def each(tensors: Sequence[Any]) -> Iterator[Any]:
        for n_done, tensor in enumerate(tensors, start=1):
            yield tensor
            advance(f"loading {source.name}", n_bytes * n_done / len(tensors), n_bytes, "B")

    def shown(bar: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_loading = args and kwargs.get("desc") == "Loading weights"
        return each(tuple(args[0])) if is_loading else bar(*args, **kwargs)

    advance(f"loading {source.name}", 0, n_bytes, "B")
    before = logging.set_tqdm_hook(shown)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _checked_config(source: Source, options: LoadOptions) -> tuple[Any, bool]:
    """The config, checked against the weights, and whether the checkpoint's code may run.

    The modelling file of this package is trusted. A config of other trusted code is not checked.
    """
    folder, raw = source.path, read_config(source.path)
    check_named(folder, raw)
    may_run_code = options.trust_remote_code or runs_our_code_only(folder, raw)
    with validate.translate_errors("AutoConfig", folder / "config.json"):
        if options.trust_remote_code and "auto_map" in raw:
            if options.parallel:
                parallel.check_plan(folder / "config.json", raw, None, options.parallel)
            return AutoConfig.from_pretrained(folder, trust_remote_code=True), True
        validate.check_counts(folder, raw, source.dense)
        if source.packing is None:
            validate.check_quantization(folder, raw)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=may_run_code)
        if not may_run_code and validate.auto_class(config) is None:
            raise validate.not_a_text_model(folder, config.to_dict())
        if source.packing is not None and PACKING_KEY not in raw:
            config = _unpacking(config, source.packing)
        with torch.device("meta"):  # tensors with shapes and no bytes
            if hasattr(model_class := _class_of(config), "from_config"):
                model = model_class.from_config(config, trust_remote_code=may_run_code)
            else:
                model = model_class._from_config(config)
        validate.check_total(folder, model, source.dense)
        if options.parallel:
            parallel.check_plan(folder / "config.json", raw, model, options.parallel)
    return config, may_run_code


def _unpacking(config: Any, packing: Packing) -> Any:
    """The config of weights as vLLM reads them, for the class that unpacks them."""
    said = {
        k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "model_type")
    }
    unpacking = getattr(modeling_packed, f"Packed{type(config).__name__}")
    return unpacking.from_dict({**said, PACKING_KEY: dataclasses.asdict(packing)})


def _class_of(config: Any) -> Any:
    """What loads a model; for weights as vLLM reads them the class that unpacks its family's."""
    if type(config).__module__ != modeling_packed.__name__:
        return validate.auto_class(config) or _MODELS
    family = _MODELS._model_mapping[type(config).__base__]
    return getattr(modeling_packed, f"Packed{family.__name__}")


def _declared(contract: Contract, model: Any) -> tuple[MoeBlock, ...]:
    try:
        return declare(model, contract, probe_ids(model))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the model of {contract.path} does not run: {reason}") from error


def _blocks(source: Source, model: Any, declared: tuple[MoeBlock, ...]) -> tuple[MoeBlock, ...]:
    file = source.path / "config.json" if source.contract is None else source.contract.path
    try:
        return find_blocks(model, probe_ids(model), declared)
    except ContractError as error:
        raise ContractError(f"{file}: {error}") from None
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{file} describes a model that does not run: {reason}") from error


def fits_in_memory(source: Source, options: LoadOptions) -> bool:
    """Whether the weights, in their dtype after loading, fit in the free memory of the device."""
    device = find_device(options.device)
    dtype = _dtype(options.dtype, device)
    tensors = source.dense.tensors.values()
    n_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    if isinstance(dtype, torch.dtype):
        n_bytes = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    return n_bytes * 1.25 <= free_bytes(device)  # with the overhead of loading and running


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name in ("auto", "stored"):
        return torch.float32 if name == "auto" and device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"--dtype {name} is not a floating-point type of torch")
    return dtype
