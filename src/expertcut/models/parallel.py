"""Tensor and expert parallelism: processes of torchrun that hold one model together.

transformers shards the model by its own plan: under `tensor` every process holds a slice of each
expert, so an expert's output is the sum of the processes' outputs; under `expert` each process
holds whole experts. The processes of a group run the same passes and decide alike: what depends on
files or clocks is decided by the leader. Groups of one launch share chunks as single processes do.
"""

import atexit
import copy
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from expertcut.errors import ExpertcutError, ModelError, SettingsError
from expertcut.models.devices import own_device
from expertcut.models.kernels import own_output

dist: Any = torch.distributed  # its types name few of its functions
T = TypeVar("T")
Kind = Literal["tensor", "expert"]
# The plan of a model class, and its style of experts that `Share` knows.
_PLANS = {"tensor": ("tp_plan", "moe_tp_experts"), "expert": ("ep_plan", "ep_dispatch_experts")}
_START = "start it with `torchrun --nproc-per-node N -m expertcut`"
_WAIT = timedelta(days=7)  # for the chunks of other groups
_ENDED = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe", re.I)


@dataclass(frozen=True)
class Group:
    """The processes that hold one model; `rank` is this one's place among them."""

    kind: Kind
    size: int
    rank: int
    store: Any
    control: Any  # the process group of messages that are not tensors

    @property
    def name(self) -> str:
        """As `--parallel` is given."""
        return f"{self.kind}:{self.size}"

    @property
    def is_leader(self) -> bool:
        """Whether this process decides and writes for the group."""
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """What the leader's work gives, or the error that it raises, in every process."""
        found: list[Any] = [_outcome(work) if self.is_leader else None]
        dist.broadcast_object_list(found, src=0, group=self.control)
        result: T = _result(*found[0])
        return result

    def agree(self, work: Callable[[], T]) -> T:
        """What the work gives here, unless it raised an error in any process."""
        value, error = _outcome(work)
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error, group=self.control)
        result: T = _result(value, next((e for e in errors if e is not None), None))
        return result

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(part)
        return part

    def is_heard(self) -> bool:
        """Whether this process is the first of the launch to report how the run ended."""
        try:
            return bool(self.store.add("heard", 1) == 1)
        except RuntimeError:  # the process that kept the store has ended
            return True

    def sharding(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        from transformers.distributed.configuration_utils import DistributedConfig

        n_ep = self.size if self.kind == "expert" else 1
        config = DistributedConfig(tp_plan="auto", tp_size=self.size, ep_size=n_ep)
        return {"distributed_config": config}


def _outcome(work: Callable[[], T]) -> tuple[T | None, ExpertcutError | None]:
    try:
        return work(), None
    except ExpertcutError as error:
        return None, error


def _result(value: Any, error: ExpertcutError | None) -> Any:
    if error is not None:
        raise error
    return value


_JOINED: list[Group] = []


def joined() -> Group | None:
    """The group of this process, if it has joined one."""
    return _JOINED[0] if _JOINED else None


def join(parallel: str, device: str) -> Group:
    """The group of this process, by the environment that torchrun sets; SettingsError without."""
    kind, _, given = parallel.partition(":")
    n_all = int(os.environ.get("WORLD_SIZE") or 1)
    size = int(given or n_all)
    if "RANK" not in os.environ or n_all < 2:
        raise SettingsError(f"--parallel {parallel} spreads a model over processes: {_START}")
    if size < 2 or n_all % size:
        raise SettingsError(
            f"--parallel {parallel} of {n_all} processes makes no equal groups: give {kind}:N "
            f"with an N above 1 that divides {n_all}"
        )
    if not _JOINED:
        _JOINED.append(_meet(size, device))
    if (met := _JOINED[0].size) != size:
        raise SettingsError(f"--parallel {parallel}: this process is in a group of {met} already")
    return replace(_JOINED[0], kind="tensor" if kind == "tensor" else "expert")


def _meet(size: int, device: str) -> Group:
    place, most = torch.device(own_device(device)), torch.accelerator.device_count()
    if place.type != torch._C._get_accelerator().type:
        raise SettingsError(
            f"--device {device} beside an accelerator, over which --parallel spreads a model: "
            "leave it out"
        )
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if place.type != "cpu" and n_here > most:
        raise SettingsError(
            f"--parallel: {n_here} processes of this host have {most} devices: start one for each"
        )
    store, rank, _ = next(dist.rendezvous("env://", timeout=_WAIT))
    store.set_timeout(_WAIT)
    is_on_cpu = place.type == "cpu"
    dist.init_process_group(
        "gloo" if is_on_cpu else "nccl",
        # A world for each group, so that groups need not wait for each other.
        store=dist.PrefixStore(f"group {rank // size}", store),
        rank=rank % size,
        world_size=size,
        timeout=_WAIT,
        device_id=None if is_on_cpu else place,
    )
    atexit.register(_leave)
    control = None if is_on_cpu else dist.new_group(backend="gloo", timeout=_WAIT)
    return Group("tensor", size, rank % size, store, control)


def _leave() -> None:
    with suppress(RuntimeError):
        dist.destroy_process_group()


def has_ended(error: BaseException) -> bool:
    """Whether an error means that another process of the group has ended."""
    is_told = isinstance(error, dist.DistError) or bool(_ENDED.search(str(error)))
    return bool(_JOINED) and isinstance(error, RuntimeError) and is_told


def check_plan(file: Any, config: dict[str, Any], model: Any, parallel: str) -> None:
    """Refuses a model (on the meta device) that transformers cannot spread so."""
    kind, family = parallel.partition(":")[0], str(config.get("model_type"))[:50]
    if "auto_map" in config or model is None:
        raise ModelError(
            f"{file} names code that comes with the checkpoint, which is not spread over "
            "processes: leave --parallel out"
        )
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{file} says quantization_config: quantized weights are not spread over processes: "
            "leave --parallel out"
        )
    plan, style = _PLANS[kind]
    if style not in (getattr(model, plan, None) or {}).values():
        other, its = next((k, v) for k, v in _PLANS.items() if k != kind)
        has_other = its[1] in (getattr(model, its[0], None) or {}).values()
        instead = f"take --parallel {other}" if has_other else "leave --parallel out"
        raise ModelError(
            f"{file}: transformers has no plan to spread the experts of {family} by --parallel "
            f"{kind}: {instead}"
        )
    size = int(parallel.partition(":")[2] or os.environ.get("WORLD_SIZE") or 1)
    text = model.config.get_text_config()
    splits_heads = any(
        name.endswith("k_proj") and own == "colwise" for name, own in model.tp_plan.items()
    )
    n_heads = getattr(text, "num_key_value_heads", None)
    if splits_heads and n_heads is not None and n_heads % size:
        raise ModelError(
            f"{file}: {n_heads} key heads cannot be dealt to {size} processes: give --parallel "
            f"{kind}:N with an N that divides them"
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def put(parameter: Tensor, values: Tensor) -> None:
    """Replaces the values of a parameter, or of this process's part of it."""
    if (part := local(parameter)) is parameter:
        parameter.data = values  # the old ones may be those of a mapped file
    else:
        part.copy_(values)


class Share:
    """This process's share of the experts of one block."""

    def __init__(self, group: Group, experts: Any) -> None:
        self.group, self.own = group, copy.copy(experts)
        self.own._parameters = {k: local(p) for k, p in experts.named_parameters(recurse=False)}
        self.is_whole = group.kind == "expert"  # whole experts, else slices of all
        n_own = len(self.own.down_proj)
        first = group.rank * n_own if self.is_whole else 0
        self.ids = range(first, first + n_own)

    def part(self, expert: int, x_MD: Tensor) -> Tensor:
        """What the processes' outputs sum up to is the expert's (M, D)."""
        if expert in self.ids:
            return own_output(self.own, expert - self.ids.start, x_MD)
        shape = self.own.down_proj.shape
        return x_MD.new_zeros(len(x_MD), shape[2 if self.own.is_transposed else 1])

    def whole(self, expert: int, x_MD: Tensor) -> Tensor:
        """The expert's output (M, D), in every process."""
        return self.group.total(self.part(expert, x_MD).contiguous())


def attach(group: Group, experts: nn.Module, name: str) -> None:
    """Gives the experts of a block their `Share`; ModelError for a form that has none."""
    form: Any = experts
    is_common = hasattr(form, "has_gate")
    is_linear = is_common and not (form.has_bias or form.has_post_expert_norm)
    if not is_common or (group.kind == "tensor" and not is_linear):
        raise ModelError(
            f"{name}: its experts have a form that --parallel {group.kind} cannot take apart: "
            "leave --parallel out"
        )
    form.share = Share(group, experts)
