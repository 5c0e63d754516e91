"""int8 ops: each hands its tensors to the native kernel of the same name."""
