"""Each layer op in torch's own ops, as programs for other machines have it, is the op: shapes, dtypes and values, 16 to 64 bits."""

import pytest
import test_opcheck
import torch

import halfstep as hs
from halfstep._decompose import table

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}
OPS = {str(op).split(".")[1]: (op, function) for op, function in table().items()}


@pytest.mark.parametrize("name", OPS)
def test_a_decomposition_is_its_op(name):
    op, function = OPS[name]
    torch.manual_seed(0)
    count = 0
    for args, kwargs in getattr(test_opcheck, f"samples_{name}")():
        if name == "bias_dropout_add" and args[3]:
            args = (*args[:3], 0.0)
        with torch.no_grad():
            expected, found = op(*args, **kwargs), function(*args, **kwargs)
        pairs = [(expected, found)] if isinstance(expected, torch.Tensor) else list(zip(expected, found))[: 2 if args[-1] is not None else 1]
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape
            torch.testing.assert_close(b, a, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])
            count += a.numel()
    assert count > 20


def test_rows_of_which_nothing_takes_part_are_zeros_and_what_is_masked_is_not_looked_at():
    x, mask = torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), torch.tensor([[True, False], [False, False]])
    assert OPS["softmax"][1](x, -1, 1.0, mask, False).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_program_for_other_machines_drops_nothing():
    with pytest.raises(ValueError, match="p is 0.5"):
        OPS["bias_dropout_add"][1](torch.ones(2), None, torch.ones(2), 0.5)


def test_every_op_that_a_layer_function_calls_has_one():
    """But for those that write into their arguments: an exported model has none."""
    import ast
    from pathlib import Path

    called = {node.attr for path in Path(hs.functional.__file__).parent.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "H"}
    assert called - set(OPS) == {"swiglu_counted", "geglu_counted"} and set(OPS) <= called
