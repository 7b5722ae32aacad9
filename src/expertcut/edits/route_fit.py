"""Fits how far a block's output moves with fewer experts, for routing rule `fitted`.

The change ‖y_K − y_k‖/‖y_K‖ with the best k of K experts is measured on at most 1,024 tokens of the
tuning questions, and fitted by the logarithms of the gate weights' ratios.
"""

import torch
from torch import Tensor

from expertcut.data.corpus import CalibrationSet
from expertcut.edits.calibrate import RemovalTrial, sample_inputs
from expertcut.models.modeling_routed import log_shares
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule, Weights
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting, rerouted


def fit_errors(
    engine: Engine, tuning: CalibrationSet, weights: Weights = "gate"
) -> dict[int, ErrorCoefficients]:
    """The coefficients of every layer, for a rule with these gate weights."""
    sample = sample_inputs(engine, tuning)
    blocks = engine.moe.blocks
    return {block.layer: fit_block(block, sample[block.layer], weights) for block in blocks}


@torch.inference_mode()
def fit_block(block: MoeBlock, x_TD: Tensor, weights: Weights = "gate") -> ErrorCoefficients:
    """The coefficients (K - 1, K) of one block on its inputs, by least squares."""
    errors_TK, shares_TK = measured_errors(block, x_TD, weights)
    if not errors_TK.shape[1]:
        return ()
    found = torch.linalg.lstsq(shares_TK, errors_TK, driver="gelsd").solution.T
    return tuple(map(tuple, found.tolist()))


@torch.inference_mode()
def measured_errors(
    block: MoeBlock, x_TD: Tensor, weights: Weights = "gate"
) -> tuple[Tensor, Tensor]:
    """‖y_K − y_k‖/‖y_K‖ (T, K - 1) for k = 1 … K - 1, and `log_shares` (T, K), of tokens with y."""
    trial, errors = RemovalTrial(block, x_TD), []
    size_T = trial.squares(trial.gate_TE)
    rule = RoutingRule(rule="top-k", weights=weights)
    for k in range(1, block.top_k):
        with rerouted([block], Rerouting(rule, {block.layer: float(k)})):
            moved_T = trial.squares(trial.gates() - trial.gate_TE)
        errors.append((moved_T.clamp(min=0) / size_T).sqrt())
    shares_TK = log_shares(trial.route()[1]).cpu()
    is_there_T = size_T > 0
    errors_TK = torch.stack(errors, dim=1) if errors else size_T.new_zeros(len(size_T), 0)
    return errors_TK[is_there_T], shares_TK[is_there_T]
