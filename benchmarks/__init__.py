"""Side-by-side measurements; run them as `python -m benchmarks.NAME` (README.md)."""
