"""Tilting the gate: which experts, and by how much."""
