"""README.md of a published checkpoint: where it comes from, what was done, how it did."""
