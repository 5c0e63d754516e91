"""What a backend is tested with: the conformance suite, its oracles and tolerances, and its pytest plugin.

Run it with `pytest --pyargs bnb_core.testing.conformance --bnb-backend NAME`.

conformance       the tests
plugin, report    their options, fixtures and results; loaded by every pytest run, so nothing large is imported there
subject           the backend under test: runs an op on it alone, twice, between guards
guards            tensors with poisoned surroundings
expectations      what the results of a call must be, put together from
  oracle            what each op must compute, in numpy
  optimizer_oracle  one optimizer step, in the numbers of
  rounding          float64 that carries the error which float32 arithmetic may have made
  tolerances        the bounds of the contracts, and comparisons that say where they are broken
cases, calls      inputs, ordinary and nasty; a plain call of every op
strategies        inputs for hypothesis
loopback          a backend that forwards to another and records the calls
"""
