"""hs.functional.rope and hs.nn.RotaryEmbedding against FP64 and torch: both kinds of pairs, layouts, in place, gradients, positions, one graph under compile."""

import layers
import pytest
import torch

import halfstep as hs

rope = hs.functional.rope
rope_ = torch.ops.halfstep.rope_


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain(x, cos, sin, interleaved=False):
    """The rotation in torch's own operations, in the dtype of x and the tables."""
    n = cos.shape[-1]
    turning, rest = x[..., : 2 * n], x[..., 2 * n :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else (turning[..., :n], turning[..., n:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def tables(*shape):
    angles = torch.randn(shape, dtype=torch.float64) * 10
    return angles.cos().float(), angles.sin().float()


def check(x, cos, sin, interleaved):
    upstream = torch.randn(x.shape).to(x.dtype)
    layers.check_error(lambda x: rope(x, cos, sin, interleaved), lambda x: plain(x, cos.double(), sin.double(), interleaved),
                       lambda x: plain(x, cos, sin, interleaved).to(x.dtype), [x], [upstream])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_widths_and_partial_rotation(dtype, interleaved):
    for pairs in (1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 100):
        for rest in (0, 1, 16):
            check((3 * torch.randn(2, 3, 5, 2 * pairs + rest)).to(dtype), *tables(5, pairs), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_families_of_data(dtype, interleaved):
    for _, x in layers.families((2, 9, 4, 24), dtype):
        check(x, *tables(9, 1, 12), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_cancels_is_rounded_once(interleaved):
    """a cos - b sin with both products alike: the error stays below 1 ULP of what is left."""
    cos, sin = tables(4000, 16)
    a = torch.randn(4000, 16).abs() + 0.5
    b = (a.double() * cos / sin).float()
    x = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    want = plain(x.double(), cos.double(), sin.double(), interleaved)
    assert layers.error(rope(x, cos, sin, interleaved), want) <= 1.5 and layers.error(plain(x, cos, sin, interleaved), want) > 1000


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_and_broadcast(interleaved):
    x = torch.randn(4, 6, 8, 10).half()
    for shape in ((8,), (6, 8), (4, 1, 8), (4, 6, 8), (6, 1)):
        cos, sin = tables(*shape, 4)
        want = rope(x, cos, sin, interleaved)
        assert torch.equal(want, rope(x, cos.expand(4, 6, 8, 4).contiguous(), sin.expand(4, 6, 8, 4).contiguous(), interleaved))
        for _, y in list(layers.layouts(x.clone())):
            got = rope(y, cos, sin, interleaved)
            assert torch.equal(got, want) and got.stride() == torch.empty_like(y).stride()
            rope_(y, cos, sin, interleaved, False)
            assert torch.equal(y, want)
            check(x, cos, sin, interleaved)
    qkv = torch.randn(2, 9, 3, 4, 16).half()
    cos, sin = tables(9, 8)
    q = qkv.unbind(2)[0].transpose(1, 2)
    want = rope(q.contiguous(), cos, sin, interleaved)
    assert torch.equal(rope(q, cos, sin, interleaved), want)
    rest = qkv[:, :, 1:].clone()
    rope_(q, cos, sin, interleaved, False)
    assert torch.equal(qkv[:, :, 0].transpose(1, 2), want) and torch.equal(qkv[:, :, 1:], rest)
    strided = torch.stack([cos, cos], -1)[..., 0], torch.stack([sin, sin], -1)[..., 0]
    assert torch.equal(rope(qkv[:, :, 1].transpose(1, 2), *strided, interleaved), rope(qkv[:, :, 1].transpose(1, 2).contiguous(), cos, sin, interleaved))
    assert rope(torch.zeros(0, 8), *tables(1, 4)).shape == (0, 8) and torch.equal(rope(x, *tables(8, 0)), x)


def test_eight_dimensions_that_cannot_be_merged():
    x = torch.randn(2, 2, 2, 2, 2, 2, 2, 2, 6).permute(7, 1, 5, 3, 2, 4, 6, 0, 8)
    cos, sin = (t[:, None, :, None, :, None, :, None] for t in tables(2, 2, 2, 2, 3))
    want = plain(x, cos, sin)
    assert torch.allclose(rope(x, cos, sin), want, atol=1e-6)
    rope_(x, cos, sin, False, False)
    assert torch.allclose(x, want, atol=1e-6)


@pytest.mark.parametrize("dtype", layers.FLOATS + [torch.float64])
def test_tables_of_any_dtype(dtype):
    x, (cos, sin) = torch.randn(3, 5, 20).to(dtype), tables(5, 10)
    for kind in layers.FLOATS + [torch.float64]:
        c, s = cos.to(kind), sin.to(kind)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(rope(x, c, s), rope(x, c.to(wide), s.to(wide)))


def test_non_finite_values_stay():
    x = torch.ones(6, 4)
    x[0, 0], x[1, 2], x[2, 1] = float("nan"), float("inf"), -float("inf")
    cos, sin = torch.full((2,), 0.6), torch.full((2,), 0.8)
    got, want = rope(x, cos, sin), plain(x, cos, sin)
    assert torch.allclose(got, want, equal_nan=True) and got.isfinite().sum() == 18


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_agree_with_finite_differences(interleaved):
    x, (cos, sin) = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True), (t.double() for t in tables(3, 4))

    def in_place(x):
        y = x * 2
        rope_(y[:, 1:], cos[1:], sin[1:], interleaved, False)
        return y.sin()

    for f in (lambda x: rope(x.sin(), cos, sin, interleaved), in_place):
        assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))


def test_in_place_is_seen_by_autograd():
    cos, sin = tables(5, 4)
    x = torch.randn(3, 5, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="rope_: x is a leaf that requires grad"):
        rope_(x, cos, sin, False, False)
    y = x.exp()  # whose backward needs its result
    rope_(y, cos, sin, False, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = x * 2
    version = y._version
    rope_(y, cos, sin, False, False)
    g, = torch.autograd.grad(y.square().sum(), x)
    want, = torch.autograd.grad(rope(x * 2, cos, sin).square().sum(), x)
    assert y._version == version + 1 and torch.equal(g, want)
    with torch.no_grad():
        rope_(x, cos, sin, False, False)
    with torch.inference_mode():
        z = torch.randn(5, 8)
        want = rope(z, cos, sin)
        rope_(z, cos, sin, False, False)
        assert torch.equal(z, want)


def test_the_inverse_undoes_it():
    x, (cos, sin) = torch.randn(3, 5, 8, dtype=torch.float64), tables(5, 4)
    norm = (cos.double() ** 2 + sin.double() ** 2).repeat(1, 2)
    assert torch.allclose(torch.ops.halfstep.rope(rope(x, cos, sin), cos, sin, False, True), x * norm)


def test_same_bits_every_time_and_in_every_batch():
    x, (cos, sin) = torch.randn(6, 2, 20, 64).half(), tables(20, 32)
    layers.check_repeats(lambda x: rope(x, cos, sin), [x], [torch.randn(x.shape).half()])
    layers.check_rows_independent(lambda x: rope(x, cos, sin), [x], lambda inputs, part: [inputs[0][part]])
    layers.check_scale_exact(lambda x: rope(x, cos, sin), [x], [(torch.randn(x.shape) / 16).half()], range(0, 13, 3))


def test_it_compiles_into_one_graph():
    module = hs.nn.RotaryEmbedding(16, max_seq_len=128)

    def make(n):
        return [torch.randn(2, 4, n, 24).half(), torch.randint(0, 128, (2, n))], [torch.randn(2, 4, n, 24).half()]

    layers.check_compiled(lambda x, positions: module(module(x * 2), positions), make, (5, 33, 100))

    def in_place(x, positions):
        y = x * 2
        rope_(y, module.cos[: y.shape[-2]], module.sin[: y.shape[-2]], False, False)
        return y * 3

    with torch.no_grad():
        x = torch.randn(2, 4, 9, 24)
        assert torch.equal(torch.compile(in_place, fullgraph=True, backend="aot_eager")(x, None), in_place(x, None))


def test_the_module_turns_by_positions():
    module = hs.nn.RotaryEmbedding(16, base=500.0, max_seq_len=64, interleaved=True)
    x = torch.randn(2, 4, 10, 20)
    angles = torch.outer(torch.arange(64.0).double(), 500.0 ** (-torch.arange(0, 16, 2).double() / 16))
    assert torch.equal(module.cos, angles.cos().float()) and not module.state_dict()
    want = rope(x, module.cos[:10], module.sin[:10], True)
    assert torch.equal(module(x), want) and torch.equal(module(x, torch.arange(10)), want)
    assert torch.equal(module(x.transpose(1, 2), seq_dim=-3).transpose(1, 2), want)
    positions = torch.stack([torch.arange(10), torch.arange(20, 30)])
    for p in (positions, positions.int()):
        y = module(x, p)
        assert torch.equal(y[0], want[0]) and torch.equal(y[1], rope(x[1], module.cos[20:30], module.sin[20:30], True))
        assert torch.equal(module(x.transpose(1, 2), p, seq_dim=-3).transpose(1, 2), y) and torch.equal(module(x[:, 0], p), y[:, 0])
    q, k = torch.randn(1, 16), torch.randn(1, 16)
    score = lambda i, j: (module(q, torch.tensor([i])) * module(k, torch.tensor([j]))).sum().item()
    assert abs(score(3, 9) - score(43, 49)) < 1e-5  # distances only


def test_casting_the_module_leaves_its_tables():
    module = hs.nn.RotaryEmbedding(8, max_seq_len=4096)
    want = module.cos.clone()
    for cast in (module.half(), module.bfloat16(), module.to(torch.float64), torch.nn.Sequential(module).half()[0]):
        assert cast.cos.dtype == torch.float32 and torch.equal(cast.cos, want)
    assert module.to("meta").cos.device.type == "meta"


def test_refusals_name_what_was_given():
    x, (cos, sin) = torch.randn(3, 5, 8), tables(5, 4)
    for args, text in (((x.int(), cos, sin), r"rope: x is Int\[3, 5, 8\]"), ((x, cos, sin[:, :3]), r"rope: sin is torch.float32\[5, 3\] but cos is torch.float32\[5, 4\]"),
                       ((x[..., :7], cos, sin), r"rope: cos is torch.float32\[5, 4\], for 8 elements of a row, but x is torch.float32\[3, 5, 7\]"),
                       ((x[:, :4], cos, sin), "rope: cos is .* do not broadcast to those of x"), ((x, cos.to("meta"), sin), "rope: cos is on meta but x is on cpu"),
                       ((x, cos, sin.clone().requires_grad_()), "rope: sin requires grad, but it gets none"), ((x, cos.long(), sin.long()), "rope: cos is torch.int64")):
        with pytest.raises(RuntimeError, match=text):
            rope(*args)
    with pytest.raises(RuntimeError, match=r"rope_: x is torch.float32\[4, 5, 8\] with strides .*: its elements overlap"):
        rope_(x[:1].expand(4, 5, 8), cos, sin, False, False)
    for call, text in ((lambda: hs.nn.RotaryEmbedding(7), "RotaryEmbedding: dim is 7"), (lambda: hs.nn.RotaryEmbedding(8, max_seq_len=4)(x), "x has 5 positions but max_seq_len is 4"),
                       (lambda: hs.nn.RotaryEmbedding(8)(x, seq_dim=-1), "seq_dim is -1")):
        with pytest.raises(ValueError, match=text):
            call()


def test_tables_are_there_after_meta_and_negative_positions_are_refused():
    with torch.device("meta"):
        rope = hs.nn.RotaryEmbedding(8, max_seq_len=4)
    rope.to_empty(device="cpu")
    fresh = hs.nn.RotaryEmbedding(8, max_seq_len=4)
    assert torch.equal(rope.cos, fresh.cos) and torch.equal(rope.sin, fresh.sin)
    with pytest.raises(IndexError, match="RotaryEmbedding: positions hold -1; expected 0 to 3"):
        rope(torch.randn(2, 8), torch.tensor([-1, 0]))
