"""torch.ops.bnb: every op of the spec, with a schema, shapes and derivatives that torch's own checker accepts."""

import pytest
import torch

from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.schema import flatten, torch_schema
from bnb_core.ops.spec import OPS
from bnb_core.ops.structured import structured_op

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # opcheck's own, in torch 2.15
]

HAS_NESTED = [op for op, spec in OPS.items() if spec.parameters[-1].kind == "nested"]
CALLS = [
    (op, dtype, nested)
    for op, spec in OPS.items()
    for dtype in spec.dtypes
    for nested in ([False, True] if op in HAS_NESTED else [False])
]


def differentiable_in(op):
    """Where an op's first argument and its bias are, if it has derivatives in them."""
    return [] if structured_op(op).adjoint is None else [0, structured_op(op).bias_at]


@pytest.mark.parametrize(("op", "dtype", "nested"), CALLS, ids=[f"{op}-{dtype}{'-nested' * nested}" for op, dtype, nested in CALLS])
def test_opcheck(op, dtype, nested, example_call):
    args = list(example_call(op, getattr(torch, dtype), nested))
    for at in differentiable_in(op):
        if at is not None:
            args[at] = args[at].clone().requires_grad_()
    torch.library.opcheck(structured_op(op).torch_op, tuple(flatten(OPS[op], args)))


@pytest.mark.parametrize("op", [op for op in OPS if differentiable_in(op)])
def test_opcheck_without_grad(op, example_call):
    torch.library.opcheck(structured_op(op).torch_op, tuple(flatten(OPS[op], example_call(op))))


@pytest.mark.parametrize("op", ["quantize_blockwise", "quantize_4bit", "int8_quantize_rows", "int8_quantize_rows_cols"])
def test_opcheck_of_what_has_no_derivative_on_what_requires_grad(op, example_call):
    x, *rest = example_call(op)
    torch.library.opcheck(structured_op(op).torch_op, tuple(flatten(OPS[op], [x.requires_grad_(), *rest])))


def test_schemas():
    nested = "Tensor? nested_absmax, Tensor? nested_codebook, Tensor? nested_offset, SymInt nested_blocksize"
    assert torch_schema(OPS["gemm_4bit"]) == (
        "gemm_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor codebook, SymInt blocksize, SymInt N, SymInt K, "
        f"Tensor? bias, {nested}) -> Tensor"
    )
    assert torch_schema(OPS["int8_quantize_rows"]) == "int8_quantize_rows(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)"
    assert torch_schema(OPS["optimizer_step_32bit_"]).startswith(
        "optimizer_step_32bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] state3, "
        "str algorithm, float beta1,"
    )
    for op in OPS:
        assert str(structured_op(op).torch_op._schema) == "bnb::" + torch_schema(OPS[op])


@pytest.mark.parametrize("op", OPS)
def test_the_registered_op_computes_what_the_function_computes(op, example_call):
    from bnb_core import ops

    torch.manual_seed(1)
    args = example_call(op)
    torch.manual_seed(1)
    same = example_call(op)
    direct, registered = getattr(ops, op)(*args), structured_op(op).torch_op(*flatten(OPS[op], same))
    updated = [tensor for parameter, value in zip(OPS[op].parameters, args) if parameter.mutated for tensor in value]
    also = [tensor for parameter, value in zip(OPS[op].parameters, same) if parameter.mutated for tensor in value]
    assert bool(updated) == (not OPS[op].outputs)
    torch.testing.assert_close((direct, updated), (registered, also), rtol=0, atol=0)
