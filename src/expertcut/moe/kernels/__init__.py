"""How a forward pass is computed: matrix products, experts, attention of packed questions."""
