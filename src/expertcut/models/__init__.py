"""Mixture-of-Experts models under the contract that transformers >= 5.22 gives nearly every family.

    router(x_TD, ...)                     -> logits_TE, weights_TK, experts_TK
    experts(x_TD, experts_TK, weights_TK) -> y_TD
    every tensor that belongs to experts has one axis of length E

Legend of the shape suffixes used everywhere (`weights_TK`, `alpha_NLE`): T tokens, P tokens of the
shared prefix, D width, L MoE blocks, E experts of a block, K experts per token, N questions, C
choices of a question.
"""
