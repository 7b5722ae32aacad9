"""What a cut cost is won back: a checkpoint is trained for a short while, as low-rank adapters.

Beside the letters of `expertcut.models`: B rows of a batch, S tokens of a row (pads included),
M tokens that are trained on, V vocabulary, R likeliest tokens of a teacher.
"""
