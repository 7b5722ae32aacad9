"""A whole experiment as one YAML file: what it says, what is still to be done, doing it."""
