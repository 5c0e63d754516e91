"""The pytest plugin of the conformance suite. Every pytest run where bnb-core is installed loads it, so it does not import torch."""
