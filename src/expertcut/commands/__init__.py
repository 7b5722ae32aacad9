"""One file per command: its settings and its run, for the command line, recipes and Python."""
