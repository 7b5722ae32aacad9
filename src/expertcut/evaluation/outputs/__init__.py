"""Evaluations for other programs: data frames, and readers of lm-evaluation-harness."""
