"""The changed model on disk, and what the change did to questions that did not choose it."""
