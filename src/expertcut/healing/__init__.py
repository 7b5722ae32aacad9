"""Recovery training: a short training of low-rank adapters on an edited checkpoint.

Axes beside those of `expertcut.models`: B rows of a batch, S tokens of a row with padding, M
trained positions, V vocabulary, R top tokens of a teacher.
"""
