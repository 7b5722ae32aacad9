"""What a run folder remembers: what each stage was made from, and what it made."""
