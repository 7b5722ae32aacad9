"""The corpus, a module for each kind of file; `CASES` of each by the name of its fault."""
