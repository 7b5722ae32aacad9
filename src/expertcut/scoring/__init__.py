"""Tokens to log-probabilities: packed questions, one pass, each choice's log p."""
