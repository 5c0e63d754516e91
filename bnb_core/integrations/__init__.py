"""What connects bnb_core with models, checkpoints and programs that other libraries made."""
