"""Give it away: the model card, and the Hugging Face Hub."""
