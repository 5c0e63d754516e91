"""What a backend is tested with: the conformance suite, its tolerances and its pytest plugin."""
