"""What connects bnb_core with models and checkpoints that other libraries made."""
