"""What all optimizers have in common."""

from bnb_core.optim import GlobalOptimManager
from bnb_core.optim import Optimizer as Optimizer8bit

__all__ = ["GlobalOptimManager", "Optimizer8bit"]
