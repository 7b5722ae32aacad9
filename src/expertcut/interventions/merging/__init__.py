"""Groups of experts that become one: which, with what neurons, and what the router then says."""
