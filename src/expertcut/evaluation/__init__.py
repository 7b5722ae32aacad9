"""Was it worth it: accuracy with its uncertainty, paired comparison, and size."""
