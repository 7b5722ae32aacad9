"""The stage behind `merge`, and what is held against the checkpoint that it writes."""
