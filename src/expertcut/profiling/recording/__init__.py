"""What one chunk's forward passes show, as they run."""
