"""Embedding tables of 4-bit and int8 codes: rows, checkpoints, moving and copying."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from bnb_core import functional, nn, ops
from bnb_core.errors import CheckpointError, InvalidArgumentError, NotQuantizedError
from bnb_core.quantization.layout import as_bytes

ROWS, DIM = 50, 24
ASSIGNS = "assign" in inspect.signature(torch.nn.Module.load_state_dict).parameters
MAKERS = {
    "nf4": lambda rows=ROWS, dim=DIM, **kw: nn.EmbeddingNF4(rows, dim, **kw),
    "fp4": lambda rows=ROWS, dim=DIM, **kw: nn.EmbeddingFP4(rows, dim, **kw),
    "nf4-bfloat16": lambda rows=ROWS, dim=DIM, **kw: nn.Embedding4bit(
        rows, dim, quant_type="nf4", quant_storage=torch.bfloat16, **kw
    ),
    "int8": lambda rows=ROWS, dim=DIM, **kw: nn.Embedding8bit(rows, dim, **kw),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def whole_table(module, dtype=torch.float32):
    """The table that the codes stand for, all rows at once."""
    data = module.weight.data
    if data.dtype == torch.int8:
        return ops.int8_dequantize_rows(data, module.state.SCB, dtype)
    s = module.quant_state
    return ops.dequantize_4bit(as_bytes(data), s.absmax, s.code, s.blocksize, s.shape, dtype, s.nested_statistics)


def bits(module):
    return {name: (value.dtype, value.shape, bytes(as_bytes(value).tolist())) for name, value in module.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------------- rows


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 0, 3)], ids=str)
def test_rows_are_those_of_the_whole_table(make, dtype, shape):
    module = make(dtype=dtype).to("cpu")
    for index_dtype in (torch.int64, torch.int32):
        indices = torch.randint(ROWS, shape, dtype=index_dtype)
        rows = module(indices)
        assert rows.dtype == dtype
        assert torch.equal(rows, whole_table(module, dtype)[indices.long()])


@pytest.mark.parametrize("dim", [1, 7, 33, 64, 130])
@pytest.mark.parametrize("kind", [nn.EmbeddingNF4, nn.EmbeddingFP4, nn.Embedding8bit])
def test_rows_may_begin_within_a_byte_or_a_block(kind, dim):
    module = kind(9, dim)
    values = module.weight.data.clone()
    module.to("cpu")
    indices = torch.tensor([8, 0, 3, 3])
    if kind is nn.Embedding8bit:
        codes, absmax, _ = functional.int8_vectorwise_quant(values)
        expected = (codes * (absmax / 127)[:, None])[indices]
        torch.testing.assert_close(module(indices), expected, rtol=2**-22, atol=0)
    else:
        expected = functional.dequantize_4bit(*functional.quantize_4bit(values, quant_type=module.weight.quant_type))
        assert torch.equal(module(indices), expected[indices])


@every
def test_only_the_rows_that_are_looked_up_are_dequantized(make, monkeypatch):
    module = make().to("cpu")
    expected = whole_table(module)[[3, 4]]
    for name in ("dequantize_4bit", "int8_dequantize_rows"):
        monkeypatch.setattr(f"bnb_core.ops.{name}", None)
    data = module.weight.data
    untouched = torch.ones(ROWS, dtype=torch.bool)
    untouched[[3, 4]] = False
    if data.dtype == torch.int8:  # what the others hold does not matter
        module.state.SCB[untouched] = float("nan")
    else:
        first, last = 3 * DIM // 64, 5 * DIM // 64
        others = torch.ones_like(module.quant_state.absmax, dtype=torch.bool)
        others[first : last + 1] = False
        module.quant_state.absmax[others] = float("nan")
    assert torch.equal(module(torch.tensor([3, 4])), expected)


@every
def test_wrong_indices(make):
    module = make().to("cpu")
    for index in (-1, ROWS):
        with pytest.raises(InvalidArgumentError, match=rf"{index}.*\[0, {ROWS}\)"):
            module(torch.tensor([0, index]))
    with pytest.raises(InvalidArgumentError, match="float32"):
        module(torch.tensor([0.0]))


@every
def test_an_unquantized_table_says_what_to_do(make):
    with pytest.raises(NotQuantizedError, match=r"not quantized.*\.to\(device\)"):
        make()(torch.tensor([0]))


def test_wrong_quant_type():
    with pytest.raises(InvalidArgumentError, match=r"'nf5'.*'nf4'"):
        nn.Embedding4bit(4, 4, quant_type="nf5")


def test_constructor_arguments():
    module = nn.Embedding4bit(6, 4, torch.float16, "nf4", torch.float32, "meta")
    weight = module.weight
    assert (module.num_embeddings, module.embedding_dim, module.dtype, weight.dtype) == (6, 4, torch.float16, torch.float16)
    assert (weight.quant_type, weight.quant_storage, weight.compress_statistics) == ("nf4", torch.float32, False)
    assert weight.module is module
    assert weight.is_meta
    assert nn.Embedding8bit(6, 4, "meta", torch.bfloat16).weight.dtype == torch.bfloat16
    assert isinstance(module, torch.nn.Embedding)


@every
def test_an_output_for_training_what_follows(make):
    table, head = make().to("cpu"), torch.nn.Linear(DIM, 3)
    head(table(torch.tensor([1, 5]))).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], whole_table(table)[[1, 5]].sum(0))
    assert not any(parameter.requires_grad for parameter in table.parameters())


# ---------------------------------------------------------------------------------------------------------------------- checkpoints


@every
@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: m.to("cpu"), lambda m: m.to("meta")], ids=["new", "quantized", "meta"])
def test_checkpoints_load_strictly_into_a_module_in_any_state(make, prepare):
    source, target = make().to("cpu"), prepare(make())
    result = target.load_state_dict(source.state_dict())
    assert not any(result)
    assert bits(target) == bits(source)
    indices = torch.arange(ROWS)
    assert torch.equal(target(indices), source(indices))


@every
@pytest.mark.skipif(not ASSIGNS, reason="load_state_dict cannot assign")
def test_assigned_checkpoints(make):
    source = make().to("cpu")
    target = make(device="meta")
    saved = source.state_dict()
    target.load_state_dict(saved, assign=True)
    assert target.weight.data_ptr() == saved["weight"].data_ptr()
    assert torch.equal(target(torch.arange(ROWS)), source(torch.arange(ROWS)))


@every
def test_checkpoints_within_a_model(make, tmp_path):
    source = torch.nn.Sequential(make(), torch.nn.Linear(DIM, 2)).to("cpu")
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target = torch.nn.Sequential(make(), torch.nn.Linear(DIM, 2))
    target.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(target(torch.arange(ROWS)), source(torch.arange(ROWS)))


@every
def test_floating_point_values_load_into_a_quantized_table(make):
    values = torch.nn.Embedding(ROWS, DIM)
    early, late = make(), make().to("cpu")
    early.load_state_dict(values.state_dict())
    early.to("cpu")
    late.load_state_dict(values.state_dict())
    assert bits(early) == bits(late)


@every
def test_other_shapes_are_refused(make):
    entries = make(rows=ROWS + 2).to("cpu").state_dict()
    with pytest.raises((RuntimeError, CheckpointError), match=rf"\[?{ROWS + 2}.*{ROWS}"):
        make().load_state_dict(entries)


def test_nested_statistics_load():
    values = torch.randn(ROWS, DIM)
    packed, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    entries = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    module = nn.EmbeddingNF4(ROWS, DIM)
    module.load_state_dict(entries)
    assert torch.equal(module(torch.arange(ROWS)), functional.dequantize_4bit(packed, state))


def test_scales_are_never_missing_silently():
    entries = nn.EmbeddingNF4(ROWS, DIM).to("cpu").state_dict()
    del entries["weight.absmax"]
    with pytest.raises(RuntimeError, match=r"weight\.absmax"):
        nn.EmbeddingNF4(ROWS, DIM).load_state_dict(entries)
    entries = nn.Embedding8bit(ROWS, DIM).to("cpu").state_dict()
    del entries["SCB"]
    with pytest.raises(RuntimeError, match="SCB"):
        nn.Embedding8bit(ROWS, DIM).load_state_dict(entries)


# --------------------------------------------------------------------------------------------------------------- moving and copying


@every
def test_casts_leave_the_codes_alone_and_change_the_output(make):
    module = make().to("cpu")
    before, indices = bits(module), torch.arange(ROWS)
    for cast, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.float(), torch.float32),
    ):
        rows = cast(module)(indices)
        assert bits(module) == before
        assert module.dtype == rows.dtype == dtype
        exact = torch.float32 if dtype == torch.float64 else dtype
        assert torch.equal(rows, whole_table(module, exact)[indices].to(dtype))


@every
def test_a_cast_before_quantization_counts_too(make):
    module = make().half().to("cpu")
    assert module(torch.tensor([0])).dtype == torch.float16


@every
def test_to_meta_and_back_from_a_checkpoint(make):
    module = make().to("cpu")
    saved, indices = copy.deepcopy(module.state_dict()), torch.arange(ROWS)
    rows = module(indices)
    module.to("meta")
    assert module.weight.is_meta
    module.to_empty(device="cpu")
    module.load_state_dict(saved)
    assert torch.equal(module(indices), rows)


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, **({"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}))


@every
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_and_independent(make, copied):
    module = make().to("cpu")
    twin, before = copied(module), bits(module)
    assert bits(twin) == before
    assert twin.weight.data_ptr() != module.weight.data_ptr()
    as_bytes(twin.weight.data).zero_()
    assert bits(module) == before


@every
def test_an_ordinary_parameter_in_its_place(make):
    module = make().to("cpu")
    rows = module(torch.arange(ROWS))
    module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)  # as sharding does
    assert torch.equal(module(torch.arange(ROWS)), rows)
    twin = make()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(torch.arange(ROWS)), rows)
