"""Ways to use bnb_core from other libraries."""
