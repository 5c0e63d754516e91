"""What a backend is tested with: the conformance suite, its oracles and tolerances, and its pytest plugin.

Run it with `pytest --pyargs bnb_core.testing.conformance --bnb-backend NAME`.

plugin        options, fixtures and the report; loaded by every pytest run, so it imports nothing large
subject       the backend under test: runs an op on it alone, twice, between guards
guards        tensors with poisoned surroundings
oracle        what each op must compute, in numpy
rounding      float64 numbers that carry the error that float32 arithmetic may have made
optimizer_oracle   one optimizer step in such numbers
tolerances    the bounds of the contracts, and comparisons that say where they are broken
cases         inputs, ordinary and nasty
strategies    the same for hypothesis
loopback      a backend that forwards to another and records the calls
conformance   the tests
"""
