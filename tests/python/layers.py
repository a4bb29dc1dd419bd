"""What the tests of all layer ops share: data, layouts, errors in ULP of the output, and the checks that each op must pass.

A case is a function of tensors (and nothing else) that returns a tensor or a tuple of tensors. `reference` is the same function
written independently on FP64 tensors with torch's plain operations; `eager` is what a user writes with stock torch.
"""

import pytest
import torch
from torch._dynamo.utils import counters

import halfstep as hs

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
SIXTEEN = [torch.float16, torch.bfloat16]
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 127, 255, 257, 511, 768, 1000, 1023, 1024, 1025, 4097]  # and longer ones where they matter


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def ulp(x, dtype):
    """The distance from |x| (FP64) to the next value of `dtype`, subnormals included."""
    info = torch.finfo(dtype)
    magnitude = x.double().abs().clamp(min=info.smallest_normal, max=info.max)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def error(got, want):
    """The largest |got - want| in ULP of got's dtype; `want` is FP64. Where the exact result leaves the range, infinity is right."""
    exact, dtype = want.double(), got.dtype
    limit = torch.finfo(dtype).max + ulp(torch.tensor(torch.finfo(dtype).max), dtype).item() / 2
    beyond = exact.abs() >= limit
    wrong = (got.isnan() != exact.isnan()) | (beyond & ~exact.isnan() & (got.double() != exact.sign() * float("inf"))) | (~beyond & got.isinf())
    assert not wrong.any(), f"{int(wrong.sum())} elements of {wrong.numel()} are non-finite on one side only, the first at {wrong.nonzero()[0].tolist()}"
    good = ~(exact.isnan() | beyond)
    if not good.any():
        return 0.0
    return ((got.double() - exact).abs() / ulp(exact, dtype))[good].max().item()


def leaves(inputs, dtype=None):
    """Copies (layout kept) that require grad where they are floating."""
    def one(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        y = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype) if 0 not in x.stride() else torch.empty(x.shape, dtype=dtype or x.dtype)
        return y.copy_(x).requires_grad_()
    return [one(x) for x in inputs]


def run(function, inputs, upstream, dtype=None):
    """Outputs and gradients of `function`; `upstream`: one gradient for each output, or None where it gets none."""
    given = leaves(inputs, dtype)
    outputs = as_tuple(function(*given))
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream) if u is not None]
    wanted = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True)
    return [o.detach() for o in outputs], list(grads)


def check_error(ours, reference, eager, inputs, upstream, ulps=1.0, slack=1.0, eager_dtype=None):
    """Every output and gradient: the error against FP64 is at most the larger of `ulps` and `slack` times stock torch's own.

    A torch op that refuses the dtypes, or whose result is not finite where the exact one is, sets no mark.
    """
    got_outputs, got_grads = run(ours, inputs, upstream)
    want_outputs, want_grads = run(reference, inputs, upstream, torch.float64)
    try:
        peer_outputs, peer_grads = run(eager, inputs, upstream, eager_dtype)
    except RuntimeError:
        peer_outputs = peer_grads = None
    for kind, got, want, peer in (("output", got_outputs, want_outputs, peer_outputs), ("gradient", got_grads, want_grads, peer_grads)):
        for i, (g, w) in enumerate(zip(got, want)):
            if w is None:
                assert g is None or not g.any(), f"{kind} {i}: expected none"
                continue
            assert g.shape == w.shape, f"{kind} {i}: {tuple(g.shape)}, expected {tuple(w.shape)}"
            allowed = ulps
            if peer is not None:
                try:
                    allowed = max(ulps, slack * error(peer[i].to(g.dtype), w))
                except AssertionError:
                    pass
            measured = error(g, w)
            assert measured <= allowed, f"{kind} {i}: error {measured:.3g} ULP, allowed {allowed:.3g}"


def check_repeats(function, inputs, upstream, times=100):
    """The same bits every time."""
    first = None
    for _ in range(times):
        outputs, grads = run(function, inputs, upstream)
        bits = [t for t in outputs + grads if t is not None]
        if first is None:
            first = bits
        assert all(torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b) for a, b in zip(first, bits))


def check_rows_independent(function, inputs, rows_of):
    """`rows_of(inputs, slice)` takes some rows of the batch: their outputs have the same bits as in the whole batch."""
    whole = as_tuple(function(*inputs))
    count = whole[0].shape[0]
    for part in (slice(0, 1), slice(count // 2, count), slice(count - 1, count)):
        for all_rows, some in zip(whole, as_tuple(function(*rows_of(inputs, part)))):
            assert torch.equal(all_rows[part], some)


def check_scale_exact(function, inputs, upstream, exponents=range(0, 25, 4)):
    """Gradients of S times the upstream gradient are S times the gradients, to the bit, while nothing leaves the range of the dtype.

    `upstream` and the gradients should be normal numbers at S = 1 and finite at the largest S.
    """
    _, plain = run(function, inputs, upstream)
    for k in exponents:
        _, scaled = run(function, inputs, [None if u is None else u * 2.0**k for u in upstream])
        for a, b in zip(plain, scaled):
            if a is not None:
                normal = (a.double().abs() >= torch.finfo(a.dtype).smallest_normal) & ((b.double().abs() < torch.finfo(b.dtype).max)) | (a == 0)
                assert torch.equal((a.double() * 2.0**k)[normal], b.double()[normal]), f"S = 2^{k}"


def check_compiled(function, make_inputs, sizes, backend="aot_eager"):
    """One graph with dynamic shapes, equal to eager to the bit; `make_inputs(size)` gives inputs and upstream gradients."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for size in sizes:
        inputs, upstream = make_inputs(size)
        for a, b in zip(*[sum(run(f, inputs, upstream), []) for f in (function, compiled)]):
            assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())
    assert not counters["graph_break"]


def layouts(x):
    """The same values in other layouts, by name: transposed, sliced, offset by one element, expanded where a dimension is constant, channels_last."""
    yield "contiguous", x.contiguous()
    if x.dim() >= 2:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        yield "every other column", wide[..., 1::2]
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    memory[1:] = x.reshape(-1)
    yield "offset by one element", memory[1:].view(x.shape)
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)


def families(shape, dtype, seed=0):
    """Data by name: the families that find wrong reductions, lost subnormals and lost ranges."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=random, dtype=torch.float64)
    largest = torch.finfo(dtype).max
    yield "normal", normal.to(dtype)
    yield "all equal", torch.full(shape, 0.7, dtype=dtype)
    yield "large mean, small variance", (1e3 + 1e-2 * normal).to(dtype)
    yield "alternating largest", (largest * (1 - 2 * (torch.arange(normal.numel()) % 2)).double().view(shape)).to(dtype)
    yield "subnormal of FP16", (normal.clamp(-2, 2) * 2.0**-17).to(dtype)
    yield "smallest of FP16", (2.0**-24 * normal.sign()).to(dtype)
    yield "position", (torch.arange(normal.numel(), dtype=torch.float64).view(shape) % 1021 / 16).to(dtype)


def check_refused_alike(calls):
    """Each call raises, with the overrides of stock torch and without, in the same words."""

    def words(call):
        with pytest.raises((RuntimeError, IndexError, ValueError)) as error:
            call()
        return type(error.value), str(error.value)

    ours = [words(call) for call in calls]
    try:
        hs.set_overrides(False)
        assert ours == [words(call) for call in calls]
    finally:
        hs.set_overrides(True)
