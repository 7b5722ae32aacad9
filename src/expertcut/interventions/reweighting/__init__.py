"""Tilting the gate: which experts, how strongly, and what that does to answers."""
