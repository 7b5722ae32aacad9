"""What must hold between config.json, weights and tokenizer before and after they are loaded."""
