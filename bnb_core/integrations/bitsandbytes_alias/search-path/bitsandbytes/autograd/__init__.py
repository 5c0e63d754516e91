"""Products that have gradients."""
