"""Layout `routed`: the tensors of stock, behind routers that choose by a rule at run time.

`config.json` declares the rule under `expert_routing`, and `modeling_routed.py` beside it runs it
in transformers. `model_type` and `architectures` have names of their own: a loader that knows the
family only would leave the rule out, so it must refuse the checkpoint.

Rule contrast runs the model twice, which no router can. It becomes `custom_generate/`, which
transformers loads for any folder of the model.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.edit import TensorChanges
from expertcut.checkpoints.exact import ExactWriter, family_type, is_exact
from expertcut.checkpoints.stock import StockWriter
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models import contrast_generate
from expertcut.models.checkpoint_dir import read_config, read_object
from expertcut.models.devices import runs_on
from expertcut.models.expert_routing import ROUTING_KEY, TYPE_PREFIX, ExpertRouting
from expertcut.models.load import (
    MODELLING_FILE,
    ROUTED_EXACT_FILE,
    ROUTED_FILE,
    MoeModel,
    Source,
    load_tokenizer,
    modelling_code,
)
from expertcut.scoring.rerouting import Rerouting, rerouted

_ROUNDING = 2e-2  # of logits, in half precision


class RoutedWriter(StockWriter):
    """Removed experts leave no row, as in stock; the rule goes into config.json.

    On a model of layout exact its constants stay, and nothing but the rule is added.
    """

    def check(self, source: Source, *, is_cutting: bool) -> None:
        check = _EXACT.check if is_exact(read_config(source.path)) else super().check
        check(source, is_cutting=is_cutting)

    def changes(self, source: Source, edits: Mapping[str, BlockEdit]) -> TensorChanges:
        changes = _EXACT.changes if is_exact(read_config(source.path)) else super().changes
        return changes(source, edits)

    def check_routing(self, source: Source, routing: Rerouting) -> None:
        config, rule = read_config(source.path), routing.rule
        source.refuse_packed("put behind a rule of layout routed")
        if ROUTING_KEY in config:
            raise ContractError(
                f"{source.id} has a routing rule already ({config[ROUTING_KEY]['rule']}): route "
                "the model that it was made from"
            )
        if not rule.kind.is_exportable or rule.is_random:
            raise ContractError(
                f"rule {rule.rule} needs more than a router has at run time, so no checkpoint can "
                "hold it: score it with expertcut, or take another rule"
            )
        if "auto_map" in config and not is_exact(config):
            raise ContractError(
                f"{source.id} brings code of its own, which layout routed would replace: take "
                "--layout stock with --rule top-k"
            )
        class_names(config)

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        if not is_exact(read_config(source.path)):
            return super().config(source, tensors, n_experts)
        assert tensors.routing is not None, "or the layout would be exact"
        return self._with_rule(_EXACT.config(source, tensors, n_experts), tensors.routing)

    def _with_rule(self, config: dict[str, Any], routing: ExpertRouting) -> dict[str, Any]:
        return routed_config(config, routing)

    def files(self, source: Source, _tensors: TensorChanges) -> Mapping[str, bytes]:
        names = [ROUTED_FILE]
        if is_exact(read_config(source.path)):
            names += [MODELLING_FILE, ROUTED_EXACT_FILE]
        return {**{name: modelling_code(name) for name in names}, **tokenizer_files(source)}


_EXACT = ExactWriter()


def routed_config(config: Mapping[str, Any], routing: ExpertRouting) -> dict[str, Any]:
    """The original config with the rule, and the names of the classes that run it."""
    names, family = class_names(config), family_type(config)
    file, also, prefix = ROUTED_FILE, "", TYPE_PREFIX
    if is_exact(config):
        file, also, prefix = ROUTED_EXACT_FILE, "Exact", f"{TYPE_PREFIX}exact_"
    module = file.removesuffix(".py")
    return {
        **config,
        "architectures": [f"Routed{also}{names['AutoModelForCausalLM']}"],
        "model_type": f"{prefix}{family}",
        "auto_map": {auto: f"{module}.Routed{also}{name}" for auto, name in names.items()},
        ROUTING_KEY: routing.model_dump(mode="json"),
    }


def check_contrast(source: Source) -> None:
    """Raises a ContractError if the routers of a model are not its family's own."""
    config = read_config(source.path)
    if is_exact(config):
        raise ContractError(
            f"{source.id} has layout exact, whose constants a weak run would miss: contrast the "
            "model that it was made from"
        )
    if (routing := config.get(ROUTING_KEY)) is not None:
        raise ContractError(
            f"{source.id} has a routing rule already ({routing['rule']}): contrast the model that "
            "it was made from"
        )


def contrast_files(moe: MoeModel, routing: Rerouting) -> dict[str, bytes]:
    """`custom_generate/` for rule contrast, by name; ContractError if its weak run is another."""
    declared = ExpertRouting.of(moe.blocks, routing.rule, routing.at_by_layer, {})
    said = declared.model_dump(mode="json")
    said["layers"] = {str(layer): at for layer, at in declared.layers.items()}
    with rerouted(moe.blocks, routing):
        wanted_TV = _last_logits(moe)
    with contrast_generate.weakly_routed(contrast_generate.weak_routers(moe.model, said)):
        found_TV = _last_logits(moe)
    if not (found_TV - wanted_TV).norm() <= _ROUNDING * wanted_TV.norm():
        raise ContractError(
            f"{moe.source.id} does not take one expert a token behind its routers, so contrast has "
            "no weak run in transformers: score it with --sweep"
        )
    code = modelling_code(f"{contrast_generate.__name__.rpartition('.')[2]}.py").decode()
    before = f"EXPERT_ROUTING: dict[str, Any] = {{}}\nBETA = {contrast_generate.BETA}\n"
    assert code.count(before) == 1, "it has a place for the rule"
    after = f"EXPERT_ROUTING: dict[str, Any] = {said!r}\nBETA = {routing.beta!r}\n"
    return {
        "custom_generate/generate.py": code.replace(before, after).encode(),
        f"custom_generate/{ROUTED_FILE}": modelling_code(ROUTED_FILE),
    }


@torch.inference_mode()
def _last_logits(moe: MoeModel) -> Tensor:
    ids_BT = torch.arange(8, device=runs_on(moe.model.get_input_embeddings()))[None]
    logits_TV: Tensor = moe.model(input_ids=ids_BT, use_cache=False).logits[0].float()
    return logits_TV


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """The tokenizer's config with its class: transformers may have chosen it by `model_type`."""
    file = source.path / "tokenizer_config.json"
    config = read_object(file, 500_000_000) if file.is_file() else {}
    made = type(load_tokenizer(source, trust_remote_code=False)).__name__
    if "auto_map" in config or config.get("tokenizer_class") == made:
        return {}
    edited = {**config, "tokenizer_class": made}
    return {file.name: (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()}


def class_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The family's classes for config and model; ContractError if transformers has none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family, models = family_type(config), AutoModelForCausalLM._model_mapping
    own: Any = CONFIG_MAPPING[family] if family in CONFIG_MAPPING else None  # noqa: SIM401
    if own is None or own not in models:
        raise ContractError(
            f"layout routed needs a model class of transformers, which {family[:50]} has not: take "
            "--layout stock with --rule top-k"
        )
    model: Any = models[own]
    return {"AutoConfig": own.__name__, "AutoModelForCausalLM": model.__name__}
