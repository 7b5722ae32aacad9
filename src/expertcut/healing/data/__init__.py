"""What is trained on: rows of token ids, and nothing that is later scored."""
