"""The conformance suite of bnb_core, on the first CUDA device."""

from __future__ import annotations

import subprocess
import sys

import bnb_cuda_jetson
import pytest
import torch


@pytest.mark.skipif(not (torch.cuda.is_available() and bnb_cuda_jetson.backend.available()), reason="needs a CUDA device")
def test_the_conformance_suite_passes_without_a_skip():
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "bnb_core.testing.conformance", "--bnb-backend", "jetson"]
    result = subprocess.run([*command, "--bnb-device", "cuda", "--bnb-strict"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
