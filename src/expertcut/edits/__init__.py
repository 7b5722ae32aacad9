"""What to change in a model, without touching its weights: criteria, and the plan of an edit."""
