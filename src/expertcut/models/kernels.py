"""CPU kernels: matrix products by oneDNN, and a loop over experts.

torch multiplies float32 matrices with MKL, which does not use all vector units of AMD processors:
oneDNN, which torch includes, is more than twice as fast there (docs/benchmarks.md).

The loop over experts is registered as an experts implementation of transformers. Scoring and
all-token statistics share it, so observing experts changes no bit. The `eager` loop of transformers
has the same order, but searches all assignments again for every expert.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

# Products are prepared for each number of rows and kept, by oneDNN and by torch's layer above it:
# 1,024 each, if nothing is said, which take some 300 MB in a long run.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
INNER = "_old_forward"  # where accelerate keeps the wrapped forward
_HAS_DNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BY_EXPERT = "by_expert"
Own = Callable[[int, Tensor], Tensor]  # expert, its tokens (M, D) → its outputs (M, D)
See = Callable[[int, Tensor, Tensor, Tensor], None]  # expert, tokens_M, weights_M, output_MD
Known = Mapping[int, tuple[Tensor, Tensor]]  # expert → tokens_M, output_MD


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN for float32 on a CPU without gradients."""
    # In half precision F.linear uses oneDNN itself.
    is_float32_on_cpu = weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not _HAS_DNN or not is_float32_on_cpu or needs_gradient or not x.numel():
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class Linear(nn.Linear):
    """An `nn.Linear` that uses `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return linear(input, self.weight, self.bias)


def use_faster_products(model: nn.Module, routers: Iterable[nn.Module]) -> None:
    """Changes the class of linear layers in place, as torch's parametrize does; not in routers."""
    kept = {id(part) for router in routers for part in router.modules()}
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in kept:
            module.__class__ = Linear
            if INNER in vars(module):
                setattr(module, INNER, MethodType(Linear.forward, module))


def by_expert(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    n_experts: int,
    own: Own,
    see: See | None = None,
    known: Known | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
    only: range | None = None,
) -> Tensor:
    """Σ weight · output in the order of expert ids; `see` gets the outputs of each expert.

    Ids from `n_experts` on mean nobody: nothing runs for them. Outputs that are `known` are not
    computed again. Where `own` gives a process's part of an output, `total` sums all parts at once.
    With `only`, no other experts run.
    """
    y_TD = torch.zeros_like(x_TD)
    # A: all T * K assignments, sorted once; a stable sort keeps each expert's tokens in order.
    expert_A, order_A = experts_TK.T.flatten().sort(stable=True)
    hit, counts = (found.tolist() for found in expert_A.unique_consecutive(return_counts=True))
    parts = ((order_A % len(x_TD)).split(counts), weights_TK.T.flatten()[order_A].split(counts))
    ids = range(n_experts) if only is None else only
    calls = [call for call in zip(hit, *parts, strict=True) if call[0] in ids]

    def output_of(expert: int, tokens_M: Tensor) -> Tensor:
        run = partial(_on_tokens, partial(own, expert), x_TD)
        return _with_known(run, tokens_M, known.get(expert)) if known else run(tokens_M)

    outputs: Iterable[Tensor] = (output_of(*call[:2]) for call in calls)
    if total is not None and calls:
        outputs = total(torch.cat([*outputs])).split([len(call[1]) for call in calls])
    for (expert, tokens_M, weights_M), output_MD in zip(calls, outputs, strict=True):
        if see is not None:
            see(expert, tokens_M, weights_M, output_MD)
        y_TD.index_add_(0, tokens_M, (output_MD * weights_M[:, None]).to(y_TD.dtype))
    return y_TD


def _on_tokens(own: Callable[[Tensor], Tensor], x_TD: Tensor, tokens_M: Tensor) -> Tensor:
    # oneDNN prepares each new number of rows for a millisecond.
    n_more = -len(tokens_M) % 16 if x_TD.device.type == "cpu" else 0
    return own(x_TD.index_select(0, F.pad(tokens_M, (0, n_more))))[: len(tokens_M)]


def _with_known(
    run: Callable[[Tensor], Tensor], tokens_M: Tensor, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The outputs of an expert on its tokens, run on those alone whose outputs are not known."""
    if known is None:
        return run(tokens_M)
    known_N, order_N = known[0].sort()
    at_M = torch.searchsorted(known_N, tokens_M).clamp(max=len(known_N) - 1)
    is_new_M = known_N[at_M] != tokens_M
    output_MD = known[1].index_select(0, order_N[at_M])
    if len(new_M := is_new_M.nonzero()[:, 0]):
        output_MD.index_copy_(0, new_M, run(tokens_M[new_M]))
    return output_MD


def own_output(experts: Any, expert: int, x_MD: Tensor) -> Tensor:
    """Outputs of one expert, from the attributes that transformers gives every family."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden_MI = project(experts, up, expert, x_MD)
    hidden_MI = experts._apply_gate(hidden_MI) if experts.has_gate else experts.act_fn(hidden_MI)
    output_MD = project(experts, "down_proj", expert, hidden_MI)
    if experts.has_post_expert_norm:
        output_MD = experts.post_expert_norm(output_MD)
    return output_MD


def project(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """One projection of an expert, by the attribute's name."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(x, weight.T if experts.is_transposed else weight, bias)


def _forward(
    experts: nn.Module, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *_: object
) -> Tensor:
    # As in eager, an index behind the last row adds nothing.
    n_rows = len(experts.down_proj)  # type: ignore[arg-type]
    return by_expert(x_TD, experts_TK, weights_TK, n_rows, partial(own_output, experts))


ExpertsInterface.register(BY_EXPERT, _forward)
