"""What all optimizers have in common."""

from bnb_core.optim.by_name import Optimizer1State, Optimizer2State
from bnb_core.optim.manager import GlobalOptimManager
from bnb_core.optim.optimizer import MockArgs, Optimizer8bit

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]
