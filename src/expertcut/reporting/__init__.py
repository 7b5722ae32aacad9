"""Show it: what stages found, as tables and sentences."""
