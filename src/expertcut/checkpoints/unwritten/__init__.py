"""What the checkpoint of a cut would be, without writing it."""
