"""What a plan means for the tensors on disk: layout `stock`, which all tools load, and `exact`."""
