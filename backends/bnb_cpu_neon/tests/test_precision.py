"""The fast precision: what it computes, to the rounding, and that nothing uses it unasked."""

import threading

import bnb_cpu_neon
import pytest
import torch
from bnb_cpu_neon import current_precision, engine, set_precision, use_precision
from bnb_cpu_neon.cpu import TIERS, this_cpu

import bnb_core as bnb
from bnb_core import backends, ops
from bnb_core.errors import BackendUnavailableError, ConfigurationError

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: In the baseline tier, more rows than these are exact.
FEW = 6


@pytest.fixture(autouse=True)
def _neon(_clean_backends):
    backends.set_backend("neon")
    yield
    set_precision(None)


@pytest.fixture(params=[tier for tier in TIERS if not this_cpu().lacks(tier)])
def tier(request):
    engine.native.set_tier(TIERS.index(request.param))
    yield request.param
    engine.native.set_tier(TIERS.index(engine.tier))


class Weight:
    """A quantized weight, as `ops.gemm_4bit` takes it."""

    def __init__(self, N, K, blocksize, quant_type="nf4", nested=False):
        self.N, self.K, self.blocksize = N, K, blocksize
        self.codebook = bnb.functional.get_4bit_type(quant_type, device="cpu")
        self.packed, self.absmax = ops.quantize_4bit(torch.randn(N, K), self.codebook, blocksize)
        self.nested = None
        if nested:
            codebook = torch.linspace(-1, 1, 256)
            offset = self.absmax.mean()
            self.absmax, nested_absmax = ops.quantize_blockwise(self.absmax - offset, codebook, 4)
            self.nested = ops.Nested(nested_absmax, codebook, offset, 4)

    def multiply(self, x, bias=None):
        return ops.gemm_4bit(x, self.packed, self.absmax, self.codebook, self.blocksize, self.N, self.K, bias, self.nested)

    def scales(self):
        """float32 [N, blocks of a row]."""
        ones = torch.ones(16)
        shape = (self.N, self.K)
        dense = ops.dequantize_4bit(self.packed, self.absmax, ones, self.blocksize, shape, torch.float32, self.nested)
        return dense[:, :: self.blocksize]

    def codes(self):
        """The int8 value of each weight: [N, blocks of a row, blocksize]."""
        pairs = self.packed.reshape(-1).long()
        table = (self.codebook * torch.tensor(127.0).div(self.codebook.abs().max())).round().double()
        return table[torch.stack((pairs >> 4, pairs & 15), 1).reshape(self.N, -1, self.blocksize)]


def int8_blocks(x, blocksize):
    """float64 codes [M, blocks, blocksize] and absmax [M, blocks] of rows of x."""
    blocks = x.float().reshape(len(x), -1, blocksize)
    absmax = blocks.abs().amax(-1)
    scale = torch.tensor(127.0) / absmax  # with a number of Python's, torch would multiply by the reciprocal
    return (blocks * scale[..., None]).round().double(), absmax.double()


def check(y, x, weight, bias=None):
    """Hold each element to what the algorithm gives in float64, but for the float32 roundings of sums and that of the result."""
    codes, absmax = int8_blocks(x, weight.blocksize)
    exact_sums = torch.einsum("mbk,nbk->mnb", codes, weight.codes())
    scale = weight.codebook.abs().max().double() / 127**2
    terms = exact_sums * absmax[:, None] * weight.scales().double() * scale
    expected, magnitude = terms.sum(-1), terms.abs().sum(-1)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    subnormal = 2.0**-25 if y.dtype == torch.float16 else 0.0  # what rounding to those of float16 may take
    bound = UNIT[y.dtype] * expected.abs() + 2.0**-24 * (terms.shape[-1] + 6) * magnitude + subnormal
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 8, 13, 21])
@pytest.mark.parametrize(("N", "K", "blocksize"), [(16, 64, 64), (5, 96, 32), (33, 1280, 64), (9, 8192, 4096), (3, 4224, 32)])
def test_float64_model(tier, dtype, rows, N, K, blocksize):
    weight, x = Weight(N, K, blocksize), torch.randn(rows, K).to(dtype)
    with use_precision("fast"):
        y = weight.multiply(x)
    if tier == "baseline" and rows > FEW:
        assert torch.equal(y, weight.multiply(x))
    else:
        check(y, x, weight)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [3, 16])
def test_float64_model_with_bias(quant_type, nested, rows):
    if engine.tier == "baseline":
        rows = min(rows, FEW)
    weight, x, bias = Weight(12, 256, 64, quant_type, nested), torch.randn(rows, 256), torch.randn(12)
    with use_precision("fast"):
        check(weight.multiply(x, bias), x, weight, bias)


def test_large_values_spoil_only_their_block():
    weight = Weight(8, 256, 64)
    x = torch.randn(1, 256)
    with use_precision("fast"):
        x[0, 70] = 1e4
        check(weight.multiply(x), x, weight)
        x[0, 70] = 0
        x[0, 64:128] *= 1e-30
        check(weight.multiply(x), x, weight)


@pytest.mark.parametrize("rows", [5, 16])
def test_zeros_and_what_is_not_finite(rows):
    weight, x = Weight(8, 128, 64), torch.randn(rows, 128)
    x[1] = 0
    with use_precision("fast"):
        before = weight.multiply(x)
        x[2, 70], x[3, 5] = float("nan"), float("inf")
        y = weight.multiply(x)
    assert (y[1] == 0).all()
    if engine.tier == "baseline" and rows > FEW:
        return
    assert y[2:4].isnan().all()
    others = [0, 1, *range(4, rows)]
    assert torch.equal(y[others], before[others])


def test_every_tier_and_number_of_rows_gives_the_same(tier):
    weight, x = Weight(20, 512, 64), torch.randn(24, 512)
    with use_precision("fast"):
        one_by_one = torch.cat([weight.multiply(row[None]) for row in x])
        for rows in (2, 6) if tier == "baseline" else (2, 6, 7, 9, 24):
            assert torch.equal(weight.multiply(x[:rows]), one_by_one[:rows])
        engine.native.set_tier(0)
        assert torch.equal(torch.cat([weight.multiply(row[None]) for row in x]), one_by_one)


def test_threads_change_nothing():
    weight, x = Weight(512, 1024, 64), torch.randn(5, 1024)
    before, results = torch.get_num_threads(), []
    try:
        with use_precision("fast"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(weight.multiply(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_error_is_about_one_percent():
    weight, x = Weight(256, 1024, 64), torch.randn(4, 1024)
    exact = weight.multiply(x)
    with use_precision("fast"):
        fast = weight.multiply(x)
    assert 0.002 < (fast - exact).norm() / exact.norm() < 0.012


def test_rows_that_are_no_whole_blocks_are_exact():
    weight, x = Weight(6, 100, 32), torch.randn(3, 100)
    exact = weight.multiply(x)
    with use_precision("fast"):
        assert torch.equal(weight.multiply(x), exact)


def test_experts():
    experts, x = [Weight(8, 128, 64) for _ in range(3)], torch.randn(5, 128)
    packed, absmax = (torch.stack([getattr(weight, name).reshape(-1) for weight in experts]) for name in ("packed", "absmax"))
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    with use_precision("fast"):
        y = ops.grouped_gemm_4bit(x, packed, absmax, experts[0].codebook, 64, offsets, 8, 128, None)
        expected = torch.cat([experts[0].multiply(x[:2]), experts[2].multiply(x[2:])])
    assert torch.equal(y, expected)


def test_gradients_are_exact():
    layer = bnb.nn.Linear4bit(128, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    gradients, outputs = [], []
    for precision in ("exact", "fast"):
        torch.manual_seed(0)
        x = torch.randn(4, 128, requires_grad=True)
        with use_precision(precision):
            y = layer(x)
            y.backward(torch.ones_like(y))
        gradients.append(x.grad)
        outputs.append(y.detach())
    assert torch.equal(*gradients)
    assert not torch.equal(*outputs)


def test_exact_unless_asked():
    assert current_precision() == "exact"
    weight, x = Weight(16, 128, 64), torch.randn(2, 128)
    dense = ops.dequantize_4bit(weight.packed, weight.absmax, weight.codebook, 64, (16, 128), torch.float32, None).double()
    y = weight.multiply(x)
    bound = 2.0**-24 * 129 * (x.double().abs() @ dense.abs().t())
    assert ((y.double() - x.double() @ dense.t()).abs() <= bound).all()
    with use_precision("exact"):
        assert torch.equal(weight.multiply(x), y)


def test_contexts_nest_and_end():
    set_precision("fast")
    with use_precision("exact"):
        with use_precision("fast"):
            assert current_precision() == "fast"
        assert current_precision() == "exact"
        with pytest.raises(KeyError), use_precision("fast"):
            raise KeyError
        assert current_precision() == "exact"
    assert current_precision() == "fast"
    set_precision(None)
    assert current_precision() == "exact"


def test_a_context_is_of_its_thread_alone():
    weight, x = Weight(16, 128, 64), torch.randn(2, 128)
    exact = weight.multiply(x)
    elsewhere = []

    def work():
        elsewhere.append(weight.multiply(x))

    def run():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with use_precision("fast"):
        run()
        fast = weight.multiply(x)
    set_precision("fast")
    run()
    assert torch.equal(elsewhere[0], exact)
    assert torch.equal(elsewhere[1], fast)
    assert not torch.equal(exact, fast)


def test_other_backends_are_as_exact_as_ever():
    weight, x = Weight(16, 128, 64), torch.randn(2, 128)
    with backends.use_backend("reference"):
        expected = weight.multiply(x)
        with use_precision("fast"):
            assert torch.equal(weight.multiply(x), expected)
    with use_precision("fast"):
        assert not torch.equal(weight.multiply(x), expected)


@pytest.mark.parametrize("wrong", ["FAST", "", 8, None])
def test_unknown_precision(wrong):
    with pytest.raises(ConfigurationError, match=r"there is no such precision; pass 'exact' or 'fast'"), use_precision(wrong):
        pass
    if wrong is not None:
        with pytest.raises(ConfigurationError, match=r"there is no such precision; pass 'exact' or 'fast'"):
            set_precision(wrong)
    assert current_precision() == "exact"


def test_unknown_precision_in_the_environment(monkeypatch):
    monkeypatch.setenv("BNB_NEON_PRECISION", "int8")
    backends.refresh()
    with pytest.raises(
        BackendUnavailableError, match=r"BNB_NEON_PRECISION='int8' is not one of exact, fast; set one of these or unset it"
    ):
        backends.get_backend("neon")


def test_environment(run_python):
    code = "import bnb_cpu_neon; from bnb_core.cli import main; main(['doctor'])"
    result = run_python(code, BNB_BACKEND="neon", BNB_NEON_PRECISION="fast")
    assert "fast precision" in result.output
    assert "exact precision" in bnb_cpu_neon.backend.description
