"""Linear layers that treat outlier columns of the input apart, `OutlierAwareLinear`, and how these are found, `OutlierTracer`."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import torch

from bnb_core.errors import BnbError, InvalidArgumentError
from bnb_core.nn.quantized_module import QuantizedModule

#: How far the columns of an input must spread, as `find_outlier_dims` counts it.
_INPUT_ZSCORE = 3.0
#: Magnitude from which an element of an input is an outlier (LLM.int8, arXiv 2208.07339).
_MAGNITUDE = 6.0


def find_outlier_dims(
    weight: torch.Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: Optional[int] = None, rdm: bool = False
) -> torch.Tensor:
    """Return the columns of a matrix that spread most.

    Args:
        weight: floating-point [N, K].
        reduction_dim: the dimension to take standard deviations over: 0 to find columns, 1 to find rows.
        zscore: how many standard deviations a column's must lie above the mean of all.
        topk: return this many instead, those that spread most, in descending order.
        rdm: return `topk` random columns instead.

    Returns:
        Indices, int64.

    Raises:
        InvalidArgumentError: random columns are asked for, but not how many.
    """
    if rdm:
        if topk is None:
            raise InvalidArgumentError("find_outlier_dims: rdm is True and topk is None; say how many columns by topk")
        return torch.randint(0, weight.shape[1], (topk,), device=weight.device)
    spread = weight.std(reduction_dim)
    if topk is not None:
        return spread.topk(topk).indices
    return ((spread - spread.mean()) / spread.std() > zscore).nonzero().view(-1)


def outlier_hook(module: torch.nn.Linear, input: Any) -> None:
    """Have `OutlierTracer` look at a layer that is about to be called: the forward pre-hook that it registers.

    Args:
        module: the layer.
        input: its positional arguments, of which the first is floating-point [..., in_features].
    """
    OutlierTracer.get_instance()._look(module, input)


class OutlierTracer:
    """The outlier columns of a model's linear layers, found in the first forward after `initialize`.

    They are told by the weights, but for the first layer: its columns are told by its input, by their spread or by an element of
    magnitude 6 and more. There is one for the process, `OutlierTracer.get_instance()`.
    """

    _instance: "Optional[OutlierTracer]" = None

    def __init__(self) -> None:
        raise BnbError("there is one OutlierTracer for the process; call OutlierTracer.get_instance()")

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        """Return the tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._hooks = []
            cls._instance._outliers = {}
        return cls._instance

    _hooks: List[Any]
    _outliers: Dict[int, torch.Tensor]

    def initialize(self, model: torch.nn.Module) -> None:
        """Forget what was found, and watch the next forward of this model.

        Args:
            model: its linear layers are watched, but for those with quantized weights.
        """
        self._stop()
        self._outliers = {}
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and not isinstance(module, QuantizedModule):
                self._hooks.append(module.register_forward_pre_hook(outlier_hook))

    def is_initialized(self) -> bool:
        """Say whether a model is watched or has been."""
        return bool(self._hooks or self._outliers)

    def get_hvalue(self, weight: torch.Tensor) -> int:
        """Return what a weight is known by: its address."""
        return weight.data_ptr()

    def get_outliers(self, weight: torch.Tensor) -> Optional[torch.Tensor]:
        """Return the outlier columns of the layer with this weight, int64; None if they are not known."""
        return self._outliers.get(self.get_hvalue(weight))

    def _look(self, module: torch.nn.Linear, args: Any) -> None:
        key = self.get_hvalue(module.weight)
        if key in self._outliers:  # the second forward
            self._stop()
            return
        with torch.no_grad():
            if self._outliers:
                columns = find_outlier_dims(module.weight)
            else:
                rows = args[0].reshape(-1, args[0].shape[-1])
                large = (rows.abs() >= _MAGNITUDE).any(0).nonzero().view(-1)
                columns = torch.cat([find_outlier_dims(rows, zscore=_INPUT_ZSCORE), large]).unique()
        self._outliers[key] = columns

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class OutlierAwareLinear(torch.nn.Linear):
    """A linear layer that quantizes its weight at its first call, knowing the outlier columns: to be derived from.

    Override `quantize_weight` and `forward_with_outliers`.

    Args:
        input_features, output_features: size of the last dimension of input and output.
        bias: have one.
        device: where to make the parameters.

    Attributes:
        outlier_dim: the outlier columns, int64; None until they are set, or taken from `OutlierTracer` at the first call.
        is_quantized: whether `quantize_weight` has been applied.
    """

    def __init__(self, input_features: int, output_features: int, bias: bool = True, device: Any = None) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Optional[torch.Tensor] = None
        self.is_quantized = False

    def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        """Return the layer's output.

        Args:
            x: floating-point [..., input_features].
            outlier_idx: the outlier columns, int64.
        """
        raise NotImplementedError(f"{type(self).__name__} must override forward_with_outliers(x, outlier_idx)")

    def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
        """Return the values that take the weight's place.

        Args:
            w: the weight [output_features, input_features].
            outlier_idx: the outlier columns, int64.
        """
        raise NotImplementedError(f"{type(self).__name__} must override quantize_weight(w, outlier_idx)")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `forward_with_outliers` does, the weight having been quantized.

        Raises:
            BnbError: the outlier columns are not known.
        """
        if self.outlier_dim is None:
            self.outlier_dim = OutlierTracer.get_instance().get_outliers(self.weight)
        if self.outlier_dim is None:
            raise BnbError(
                f"{type(self).__name__}: the outlier columns are not known; call OutlierTracer.get_instance().initialize(model) "
                "before the first forward, or set outlier_dim"
            )
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
