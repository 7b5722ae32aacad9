"""A LoRA adapter of the unpruned model, made to fit the pruned one."""
