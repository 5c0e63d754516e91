"""OutlierAwareLinear and the tracer that finds outlier columns."""

import pytest
import torch

from bnb_core.errors import BnbError, InvalidArgumentError
from bnb_core.nn import LinearNF4, OutlierAwareLinear
from bnb_core.nn.outlier_aware import OutlierTracer, find_outlier_dims


@pytest.fixture(autouse=True)
def _fresh_tracer():
    OutlierTracer.get_instance().initialize(torch.nn.Identity())
    yield
    OutlierTracer.get_instance().initialize(torch.nn.Identity())


class Coarse(OutlierAwareLinear):
    """Rounds its weight to integers but in outlier columns."""

    def quantize_weight(self, w, outlier_idx):
        rounded = w.round()
        rounded[:, outlier_idx] = w[:, outlier_idx]
        return rounded

    def forward_with_outliers(self, x, outlier_idx):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_columns_that_spread_most():
    weight = torch.randn(64, 50)
    weight[:, [7, 20]] *= torch.tensor([30.0, 40.0])
    assert find_outlier_dims(weight).tolist() == [7, 20]
    assert find_outlier_dims(weight, zscore=5.0).tolist() == [20]
    assert find_outlier_dims(weight, zscore=9.0).tolist() == []
    assert find_outlier_dims(weight, topk=2).tolist() == [20, 7]
    assert find_outlier_dims(weight.t(), reduction_dim=1, zscore=2.0).tolist() == [7, 20]
    drawn = find_outlier_dims(weight, topk=1000, rdm=True)
    assert set(drawn.tolist()) == set(range(50))
    with pytest.raises(InvalidArgumentError, match="topk is None"):
        find_outlier_dims(weight, rdm=True)


def test_columns_of_a_model():
    model = torch.nn.Sequential(Coarse(40, 40), Coarse(40, 40), LinearNF4(40, 8).to("cpu"))
    with torch.no_grad():
        model[1].weight[:, 9] *= 100
    before = [layer.weight.clone() for layer in model[:2]]
    tracer = OutlierTracer.get_instance()
    tracer.initialize(model)
    x = torch.randn(64, 40).clamp(-5, 5)
    x[0, 3] = -6.0
    x[:, 5] *= 100
    model(x)
    assert tracer.is_initialized()
    assert [layer.outlier_dim.tolist() for layer in model[:2]] == [[3, 5], [9]]
    for layer, weight, columns in zip(model, before, ([3, 5], [9])):
        others = [column for column in range(40) if column not in columns]
        assert torch.equal(layer.weight[:, columns], weight[:, columns])
        assert torch.equal(layer.weight[:, others], weight[:, others].round())
    model(x)
    assert not any(layer._forward_pre_hooks for layer in model)
    assert tracer.get_outliers(torch.randn(2, 2)) is None


def test_columns_may_be_set():
    layer = Coarse(6, 4, bias=False)
    weight = layer.weight.clone()
    layer.outlier_dim = torch.tensor([1])
    x = torch.randn(2, 6)
    rounded = weight.round()
    rounded[:, 1] = weight[:, 1]
    assert torch.equal(layer(x), x @ rounded.t())


def test_what_is_to_be_done():
    with pytest.raises(BnbError, match=r"Coarse.*initialize\(model\)"):
        Coarse(4, 4)(torch.randn(1, 4))
    layer = OutlierAwareLinear(4, 4)
    layer.outlier_dim = torch.tensor([0])
    with pytest.raises(NotImplementedError, match="quantize_weight"):
        layer(torch.randn(1, 4))
    layer.is_quantized = True
    with pytest.raises(NotImplementedError, match="forward_with_outliers"):
        layer(torch.randn(1, 4))
    with pytest.raises(BnbError, match="get_instance"):
        OutlierTracer()
