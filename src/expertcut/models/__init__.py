"""Mixture-of-Experts models under one contract.

Legend of the shape suffixes used everywhere (`weights_TK`, `alpha_NLE`):

    T  tokens            E  experts of a block     N  questions
    D  width             K  experts per token      C  choices of a question
    L  MoE blocks        P  tokens of the shared prefix

The contract, which transformers >= 5.22 gives nearly every MoE family:

    router(x_TD, ...)                    -> logits_TE, weights_TK, experts_TK
    experts(x_TD, experts_TK, weights_TK) -> y_TD
    every tensor that belongs to experts has one axis of length E
"""
