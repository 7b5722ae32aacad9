"""How it is trained: adapters, losses, and what transformers' Trainer must do otherwise."""
