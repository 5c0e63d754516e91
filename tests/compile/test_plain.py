"""Which calls run their kernel directly: plain tensors in ordinary execution, and nothing else."""

import pytest
import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED, add_plain_type, is_plain, ordinary_execution
from bnb_core.ops.spec import OPS, Nested

needs_registration = pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4")


def dispatched(call):
    """List the ops of this package that a call hands to the torch dispatcher, as torch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    return [event.name for event in profile.events() if event.name.startswith("bnb::")]


class Wrapper(torch.Tensor):
    """A subclass around a tensor that sees every op."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map(lambda value: value.inner if isinstance(value, Wrapper) else value, args)
        cls.seen.append(function)
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapper, function(*unwrapped, **(kwargs or {})))


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


# --------------------------------------------------------------------------------------------------------------------------- direct


@needs_registration
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("op", OPS)
def test_plain_tensors_do_not_meet_the_dispatcher(op, grad, example_call):
    args = list(example_call(op))
    if isinstance(args[0], torch.Tensor):
        args[0] = torch.nn.Parameter(args[0], requires_grad=grad and args[0].is_floating_point())
    assert dispatched(lambda: getattr(ops, op)(*args)) == []


@needs_registration
def test_neither_does_the_backward(example_call):
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    assert dispatched(lambda: ops.gemm_4bit(x, *rest).sum().backward()) == []
    assert x.grad is not None


def test_plain_types():
    class Marked(torch.nn.Parameter):
        pass

    marked = Marked(torch.zeros(1))
    assert is_plain([torch.zeros(1), torch.nn.Parameter(torch.zeros(1))])
    assert not is_plain([torch.zeros(1), marked])
    assert add_plain_type(Marked) is Marked
    assert is_plain([marked])
    assert not is_plain([torch.zeros(1).as_subclass(Named)])


# ------------------------------------------------------------------------------------------------------------------- the dispatcher


@needs_registration
@pytest.mark.parametrize("op", [op for op, spec in OPS.items() if spec.outputs])
def test_each_tensor_argument_counts(op, example_call):
    """A subclass in any place, in a field of `nested` as well, brings the call to the dispatcher."""
    args = example_call(op, nested=OPS[op].parameters[-1].kind == "nested")
    places = [(at, None) for at, value in enumerate(args) if isinstance(value, torch.Tensor)]
    if isinstance(args[-1], Nested):
        places += [(len(args) - 1, field) for field in range(3)]
    expected = getattr(ops, op)(*args)
    for at, field in places:
        given = list(args)
        if field is None:
            given[at] = args[at].as_subclass(Named)
        else:
            given[at] = args[at]._replace(**{Nested._fields[field]: args[at][field].as_subclass(Named)})
        result = []
        assert dispatched(lambda: result.append(getattr(ops, op)(*given))) == [f"bnb::{op}"]  # noqa: B023
        torch.testing.assert_close(result[0], expected, rtol=0, atol=0, check_device=False)


@needs_registration
def test_a_wrapper_subclass_sees_the_op(example_call):
    Wrapper.seen = []
    x, packed, *rest = example_call("gemm_4bit")
    result = ops.gemm_4bit(x, Wrapper(packed), *rest)
    assert Wrapper.seen == [torch.ops.bnb.gemm_4bit.default]
    assert torch.equal(result.inner, ops.gemm_4bit(x, packed, *rest))


@needs_registration
def test_a_wrapper_subclass_sees_the_ops_of_the_backward(example_call):
    Wrapper.seen = []
    x, *rest = example_call("gemm_4bit")
    leaf = x.clone().requires_grad_()
    ops.gemm_4bit(leaf, *rest).sum().backward()
    wrapped = Wrapper(x).requires_grad_()
    ops.gemm_4bit(wrapped, *rest).sum().backward()
    assert [function for function in Wrapper.seen if function.namespace == "bnb"] == [
        torch.ops.bnb.gemm_4bit.default,
        torch.ops.bnb.gemm_4bit_transposed.default,
    ]
    assert torch.equal(wrapped.grad.inner, leaf.grad)


@needs_registration
def test_distributed_tensors_are_refused(example_call):
    """A local shard is never multiplied as if it were the whole."""
    dtensor = pytest.importorskip("torch.distributed.tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        x, *rest = example_call("gemm_4bit")
        sharded = dtensor.distribute_tensor(x, mesh, [dtensor.Shard(0)])
        whole = [dtensor.distribute_tensor(value, mesh) if isinstance(value, torch.Tensor) else value for value in rest]
        for others in (rest, whole):
            with pytest.raises(InvalidArgumentError, match=r"gemm_4bit: x is a DTensor with placements .* pass x.to_local\(\)"):
                ops.gemm_4bit(sharded, *others)
    finally:
        torch.distributed.destroy_process_group()


@needs_registration
def test_ordinary_execution_ends_where_anything_else_begins(example_call):
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    assert ordinary_execution()
    with TorchDispatchMode():
        assert not ordinary_execution()
    with forward_ad.dual_level():
        assert not ordinary_execution()
    seen = []
    torch.func.vmap(lambda x: seen.append(ordinary_execution()) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append(ordinary_execution()) or x)(torch.zeros(()))
    assert seen == [False, False]
    assert ordinary_execution()
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ordinary_execution(), "these change nothing for an op"
    with torch.device("meta"):
        assert ordinary_execution(), "the op's device is that of its tensors"


@pytest.mark.skipif(REGISTERED, reason="this torch has the ops")
def test_old_torch_traces_no_op(example_call):
    """It would record the result for this one input."""
    from bnb_core.errors import OpNotSupportedError

    x, *rest = example_call("gemm_4bit")
    with pytest.raises(OpNotSupportedError, match="need torch 2"):
        torch.jit.trace(lambda x: ops.gemm_4bit(x, *rest), x)
    assert ops.gemm_4bit(x, *rest).shape == (2, 4, 6)


# ------------------------------------------------------------------------------------------------- modes that an op must not notice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype, example_call):
    """An op computes in the dtype of its tensors; who wants another casts them."""
    x, *rest = example_call("gemm_4bit", dtype)
    x.requires_grad_()
    expected = ops.gemm_4bit(x, *rest)
    expected.sum().backward()
    gradient, x.grad = x.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.gemm_4bit(x, *rest)
        y.sum().backward()
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode, example_call):
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    expected = ops.gemm_4bit(x, *rest)
    with mode():
        y = ops.gemm_4bit(x, *rest)
    assert not y.requires_grad
    assert y.is_inference() is (mode is torch.inference_mode)
    assert torch.equal(y, expected)


def test_a_default_device_changes_nothing(example_call):
    args = example_call("quantize_4bit")
    if not hasattr(torch, "get_default_device"):
        pytest.skip("torch.device is no context here")
    with torch.device("meta"):
        packed, absmax = ops.quantize_4bit(*args)
    assert packed.device.type == absmax.device.type == "cpu"
