"""What the experts did: measured chunk by chunk, stored as safetensors, read as statistics."""
