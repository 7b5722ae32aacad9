"""Attempts to break it that take minutes: `make soak`. `make test` holds short versions of them."""
