"""The matrices of single experts in a loaded block: read, replaced for a while, and their inputs.

R rows (outputs) and C columns (inputs) are those of the tensors on disk: gate and up apart, none
transposed. M are the tokens of one expert.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from expertcut.errors import ContractError
from expertcut.models.kernels import project
from expertcut.models.moe_block import MoeBlock

Projection = Literal["gate", "up", "down"]
Matrices = Mapping[Projection, Tensor]


def matrices(block: MoeBlock, expert: int) -> dict[Projection, Tensor]:
    """The matrices (R, C) of an expert, as views; ContractError where it has none like these."""
    experts: Any = block.experts
    row = _row(block, expert)
    of_both: list[tuple[Projection, Tensor]] = []
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (up, "down_proj"):
        tensor = getattr(experts, name).detach()
        if tensor.device.type == "meta":
            raise ContractError(
                f"{block.name}: its experts are offloaded, so none can be replaced: load the "
                "model without --offload"
            )
        matrix_RC = tensor[row].T if experts.is_transposed else tensor[row]
        if name == "gate_up_proj":
            gate_RC, matrix_RC = matrix_RC.chunk(2)
            of_both.append(("gate", gate_RC))
        of_both.append(("down" if name == "down_proj" else "up", matrix_RC))
    return dict(of_both)


def _row(block: MoeBlock, expert: int) -> int:
    """The row of an expert in the tensors of all."""
    experts: Any = block.experts
    if not hasattr(experts, "is_transposed") or is_interleaved(experts):
        raise ContractError(
            f"{block.name}: its {type(experts).__name__} does not hold a matrix for each "
            "projection of an expert: this form is not supported"
        )
    if not (places := getattr(experts, "places", None)):
        return expert
    if places[expert] >= experts.num_experts:
        raise ContractError(f"expert {expert} of {block.name} is a constant: it has no matrices")
    return int(places[expert])


@torch.inference_mode()
def is_interleaved(experts: Any) -> bool:
    """Whether gate and up alternate: by the output that the second column changes."""
    if not (hasattr(experts, "_apply_gate") and getattr(experts, "has_gate", False)):
        return False
    width = experts.gate_up_proj.shape[1 if not experts.is_transposed else 2]
    ones_1I = torch.ones(1, width, device=experts.gate_up_proj.device)
    moved_1I = ones_1I.clone()
    moved_1I[0, 1] += 1
    difference_I = (experts._apply_gate(moved_1I) - experts._apply_gate(ones_1I))[0]
    return bool(difference_I[0] != 0)


@contextmanager
def replaced_matrices(block: MoeBlock, by_expert: Mapping[int, Matrices]) -> Iterator[None]:
    """Other matrices for some experts, rounded to the model's dtype; in place, then as before."""
    changed = []
    with torch.no_grad():
        for expert, new in by_expert.items():
            own = matrices(block, expert)
            for name, matrix_RC in new.items():
                changed.append((own[name], own[name].clone()))
                own[name].copy_(matrix_RC)
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix_RC, before_RC in changed:
                matrix_RC.copy_(before_RC)


def projection_inputs(block: MoeBlock, expert: int, x_MD: Tensor) -> dict[Projection, Tensor]:
    """The inputs (M, C) of each matrix on the expert's tokens."""
    experts: Any = block.experts
    row = _row(block, expert)
    if not experts.has_gate:
        return {"up": x_MD, "down": experts.act_fn(project(experts, "up_proj", row, x_MD))}
    hidden_MI = experts._apply_gate(project(experts, "gate_up_proj", row, x_MD))
    return {"gate": x_MD, "up": x_MD, "down": hidden_MI}
