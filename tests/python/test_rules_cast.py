"""cast_model, evaluate_in, export_state_dict, load_state_dict: what they touch, what they leave, what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import halfstep as hs

pytestmark = pytest.mark.smoke
NEED = r"model was cast to float16: run it inside hs.autocast, or cast_model\(…, cast_inputs=True\)"


class Net(nn.Module):
    """Tied weights, norms, a frozen layer, buffers of three kinds, and arguments by position and by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.body[4].requires_grad_(False)
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("scale", torch.full((8,), 1.5))

    def forward(self, tokens, shift=None):
        x = self.embed(tokens)
        x = self.body(x if shift is None else x + shift)
        return {"logits": self.head(x), "hidden": (x, tokens)}


def bytes_of(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


TOKENS = torch.tensor([1, 5, 7, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_cast_and_what_is_not(dtype):
    model, before = Net(), bytes_of(Net())
    report = hs.cast_model(model, dtype)
    assert set(report.kept) == {"body.1.weight", "body.1.bias", "body.3.weight", "body.3.bias"}
    assert set(report.cast) == {"embed.weight", "body.0.weight", "body.0.bias", "body.4.weight", "body.4.bias"}
    assert str(report) == f"5 parameters cast to {str(dtype)[6:]}, 4 kept in FP32"
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == dtype
    assert not hasattr(model.body[4].weight, "_halfstep_exact")  # frozen: nothing to keep exact
    for key, value in model.named_buffers():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    opt = hs.optim.AdamW(model.named_parameters())
    assert model.body[4].weight not in opt.state and "frozen: no master, no state (2 parameters" in repr(opt)
    exact = dict(zip((n for n, _ in model.named_parameters()), opt.master_params()))
    for name in ("embed.weight", "body.0.weight", "body.0.bias", "body.1.weight"):
        tiny = before[name].abs() < 2.0**-16
        assert torch.equal(exact[name][~tiny], before[name][~tiny])


@pytest.mark.parametrize("cast_inputs", [False, True])
def test_a_cast_model_runs_with_and_without_autocast(cast_inputs):
    model = Net()
    hs.cast_model(model, cast_inputs=cast_inputs)
    inside = []
    model.body[1].register_forward_hook(lambda m, args, out: inside.append((args[0].dtype, out.dtype)))
    with hs.autocast("cpu"):
        out = model(TOKENS, shift=torch.zeros(8))
    assert out["logits"].dtype == torch.float16
    out = model(TOKENS)
    assert out["logits"].dtype == out["hidden"][0].dtype == torch.float16 and out["hidden"][1].dtype == torch.int64
    assert set(inside) == {(torch.float32, torch.float16)}  # kept modules cast in and out
    if cast_inputs:
        assert model(TOKENS, shift=torch.zeros(8))["logits"].dtype == torch.float16
    else:
        for args, kw in (((TOKENS, torch.zeros(8)), {}), ((TOKENS,), dict(shift=torch.zeros(8))), ((TOKENS,), dict(shift=torch.zeros(8).double()))):
            with pytest.raises(RuntimeError, match=NEED):
                model(*args, **kw)
        with pytest.raises(RuntimeError, match=NEED), hs.autocast("cpu", enabled=False):
            model(TOKENS, torch.zeros(8))
    assert model(TOKENS, shift=torch.zeros(8).half())["logits"].dtype == torch.float16


def test_running_statistics_are_updated_in_fp32():
    model, plain = Net(), Net()
    hs.cast_model(model)
    with hs.autocast("cpu"):
        model(TOKENS)
    plain(TOKENS)
    assert model.body[1].running_mean.dtype == torch.float32 and int(model.body[1].num_batches_tracked) == 1
    assert torch.allclose(model.body[1].running_mean, plain.body[1].running_mean, atol=1e-3)


@pytest.mark.parametrize("keep,kept", [(["head", "body.0"], {"embed.weight", "body.0.weight", "body.0.bias"}), ("body.*", {f"body.{i}.{n}" for i in (0, 1, 3, 4) for n in ("weight", "bias")}),
                                       (nn.Linear, {"embed.weight", "body.0.weight", "body.0.bias", "body.4.weight", "body.4.bias"}), ([], set()),
                                       ([nn.BatchNorm1d, "body.4"], {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"})])
def test_keep_fp32_takes_classes_names_and_globs(keep, kept):
    model = Net()
    report = hs.cast_model(model, keep_fp32=keep)
    kept = kept | {"body.1.weight", "body.1.bias"}  # running statistics stay FP32, so their norm does
    assert set(report.kept) == kept and all(p.dtype == (torch.float32 if n in kept else torch.float16) for n, p in model.named_parameters())
    with hs.autocast("cpu"):
        assert model(TOKENS)["logits"].isfinite().all()


def test_a_rule_that_fits_nothing_is_refused_with_the_modules():
    model, before = Net(), bytes_of(Net())
    for keep, message in [(["hed"], "keep_fp32 has 'hed', which fits no module"), ([nn.Conv2d], "keep_fp32 has <class 'torch.nn.modules.conv.Conv2d'>")]:
        with pytest.raises(ValueError, match=message):
            hs.cast_model(model, keep_fp32=keep)
    assert same(before, bytes_of(model))


def test_a_kept_module_inside_a_kept_module_stays_in_fp32_all_through():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    hs.cast_model(model, keep_fp32=[nn.LayerNorm, "1"])
    assert model(torch.randn(2, 4).half()).dtype == torch.float16


def test_too_large_weights_are_refused_by_name_and_nothing_is_changed():
    for value, message in [(65520.0, r"'body.4.bias' does not fit torch.float16: 1 of 8 elements are at or beyond 65520 \(largest 65520\); keep it in FP32"),
                           (-1e9, "largest 1e"), (float("inf"), "largest inf")]:
        model = Net()
        model.body[4].bias.data[3] = value
        before = bytes_of(model)
        with pytest.raises(ValueError, match=message):
            hs.cast_model(model)
        assert same(before, bytes_of(model)) and not hasattr(model.embed.weight, "_halfstep_exact")
        model(TOKENS, torch.zeros(8))  # no hook was left behind
        hs.cast_model(model, keep_fp32=["body.4"])
    fits = Net()
    fits.body[4].bias.data[3] = 65519.996
    hs.cast_model(fits)
    assert fits.body[4].bias[3] == 65504
    hs.cast_model(Net(), torch.bfloat16)


def test_casting_after_the_optimizer_raises_and_changes_nothing():
    for make in (lambda m: hs.optim.AdamW(m.parameters()), lambda m: hs.optim.Masters(torch.optim.Adam, m.parameters(), lr=0.1)):
        model = Net()
        before, opt = bytes_of(model), make(model)
        with pytest.raises(RuntimeError, match="cast_model: 'embed.weight' already belongs to an optimizer; cast the model first, then make the optimizer"):
            hs.cast_model(model)
        assert same(before, bytes_of(model))
        del opt
        hs.cast_model(model)


def test_bad_arguments():
    for kw, message in [(dict(dtype=torch.float32), "dtype is torch.float32; expected torch.float16 or torch.bfloat16"), (dict(grad_dtype="fp16"), "grad_dtype is 'fp16'")]:
        with pytest.raises(ValueError, match=message):
            hs.cast_model(Net(), **kw)


def test_casting_again_starts_from_the_exact_weights():
    model, before = Net(), bytes_of(Net())
    hs.cast_model(model)
    hs.cast_model(model, torch.bfloat16, cast_inputs=True)
    opt = hs.optim.AdamW(model.named_parameters(), master="fp32")
    exact = dict(zip((n for n, _ in model.named_parameters()), opt.master_params()))
    assert torch.equal(exact["embed.weight"], before["embed.weight"])
    assert model(TOKENS, torch.zeros(8))["logits"].dtype == torch.bfloat16


def test_gradients_that_are_there_are_cast_along():
    model = Net()
    model(TOKENS)["logits"].sum().backward()
    grad = model.embed.weight.grad.clone()
    hs.cast_model(model)
    assert torch.equal(model.embed.weight.grad, grad.half())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_cast_model_can_be_copied_and_pickled(clone, with_optimizer):
    model = Net()
    hs.cast_model(model)
    opt = hs.optim.AdamW(model.parameters()) if with_optimizer else None
    other = clone(model)
    assert same(bytes_of(model), bytes_of(other)) and torch.equal(other(TOKENS)["logits"], model(TOKENS)["logits"])
    with pytest.raises(RuntimeError, match=NEED):
        other(TOKENS, torch.zeros(8))
    with hs.evaluate_in(other):
        assert other(TOKENS, torch.zeros(8))["logits"].dtype == torch.float32
        with pytest.raises(RuntimeError, match=NEED):
            model(TOKENS, torch.zeros(8))
    assert (opt is None) != with_optimizer


def test_an_edit_between_casting_and_the_optimizer_counts():
    model = nn.Linear(4, 4)
    exact = model.weight.detach().clone()
    hs.cast_model(model)
    with torch.no_grad():
        model.weight[0] = 0.5
    opt = hs.optim.SGD(model.named_parameters(), lr=0.1, master="fp32")
    assert (opt.master_params()[0][0] == 0.5).all() and torch.equal(opt.master_params()[0][1:], exact[1:])


# -- evaluate_in -------------------------------------------------------------------------------------
OPTIMIZERS = {"split16": lambda m: hs.optim.AdamW(m.named_parameters(), lr=0.01), "fp64": lambda m: hs.optim.AdamW(m.named_parameters(), lr=0.01, master="fp64"),
              "masters": lambda m: hs.optim.Masters(torch.optim.RMSprop, m.named_parameters(), lr=0.01),
              "two": lambda m: [hs.optim.SGD(m.embed.parameters(), lr=0.01), hs.optim.Masters(torch.optim.SGD, m.body.named_parameters(), lr=0.01)]}


def trained(make, cast=True):
    model = Net()
    if cast:
        hs.cast_model(model)
    opts = make(model)
    scaler = hs.GradScaler("cpu")
    for _ in range(4):
        for opt in opts if isinstance(opts, list) else [opts]:
            opt.zero_grad()
        with hs.autocast("cpu"):
            loss = model(TOKENS)["logits"].float().square().mean()
        scaler.scale(loss).backward()
        for opt in opts if isinstance(opts, list) else [opts]:
            scaler.step(opt)
        scaler.update()
    return model, opts


def masters_of(opts):
    return [m for opt in (opts if isinstance(opts, list) else [opts]) for m in opt.master_params()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("thrown", [False, True])
@pytest.mark.parametrize("cast", [True, False])
def test_evaluate_in_is_exact_inside_and_leaves_every_bit(dtype, kind, thrown, cast, recwarn):
    model, opts = trained(OPTIMIZERS[kind], cast)
    model.body[3].eval()  # part of it, which must stay so
    weights, masters = bytes_of(model), masters_of(opts)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    exact = {n: m for (n, _), m in zip(model.named_parameters(), masters)} if kind != "two" else {}
    try:
        with hs.evaluate_in(model, opts, dtype):
            assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {dtype}
            assert all(torch.equal(p, exact[n].to(dtype)) for n, p in model.named_parameters() if n in exact)
            assert not any(m.training for m in model.modules())
            out = model(TOKENS, shift=torch.zeros(8))["logits"]
            assert out.dtype == dtype and not out.requires_grad
            if thrown:
                raise KeyError("inside")
    except KeyError:
        assert thrown
    assert same(weights, bytes_of(model)) and [m.training for m in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(a, b) for a, b in zip(masters, masters_of(opts)))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, (p.grad for p in model.parameters())))
    if cast:
        with pytest.raises(RuntimeError, match=NEED):
            model(TOKENS, torch.zeros(8))
        assert model(TOKENS)["logits"].dtype == torch.float16
    for opt in opts if isinstance(opts, list) else [opts]:
        opt.step()
    assert not [w for w in recwarn if "masters follow" in str(w.message)]


def test_evaluation_in_fp64_shows_what_fp16_rounds_away():
    model, opt = trained(OPTIMIZERS["fp64"])
    twin = Net().double()
    twin.load_state_dict(hs.export_state_dict(model, opt, torch.float64))
    twin.eval()
    with torch.no_grad(), hs.evaluate_in(model, opt, torch.float64):
        assert torch.equal(model(TOKENS)["logits"], twin(TOKENS)["logits"])


def test_evaluate_in_works_on_a_part_on_a_whole_and_without_an_optimizer():
    whole = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    exact = whole[0].weight.detach().clone()
    hs.cast_model(whole[0], cast_inputs=False)
    with hs.evaluate_in(whole):
        assert torch.equal(whole[0].weight, exact) and whole(torch.ones(1, 4)).dtype == torch.float32
    with hs.evaluate_in(whole[0], None, torch.float64):
        assert whole[0](torch.ones(1, 4)).dtype == torch.float64
    assert whole[0].weight.dtype == torch.float16 and whole[1].weight.dtype == torch.float32


def test_evaluate_in_refuses_before_it_changes_anything():
    model, opt = trained(OPTIMIZERS["split16"])
    model.body[1].running_var.fill_(1e6)
    before = bytes_of(model)
    with pytest.raises(ValueError, match="'body.1.running_var' does not fit torch.float16: 8 of 8 elements"):
        with hs.evaluate_in(model, opt, torch.float16):
            raise AssertionError("not reached")
    assert same(before, bytes_of(model))
    for call, kind, message in [(lambda: hs.evaluate_in(model, opt, weights="mean").__enter__(), ValueError, "weights is 'mean'"),
                                (lambda: hs.evaluate_in(model, torch.optim.SGD(model.parameters(), lr=1.0)).__enter__(), TypeError, "SGD is not a halfstep optimizer"),
                                (lambda: hs.export_state_dict(model, opt, weights="mean"), ValueError, "weights is 'mean'")]:
        with pytest.raises(kind, match=message):
            call()
    assert same(before, bytes_of(model))


# -- export and load ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_and_load_carry_exact_weights(kind, dtype):
    model, opts = trained(OPTIMIZERS[kind])
    state = hs.export_state_dict(model, opts, dtype)
    assert list(state) == list(model.state_dict()) and all(v.dtype == (dtype if v.is_floating_point() else torch.int64) for v in state.values())
    plain = Net().to(dtype)
    plain.load_state_dict(state)
    assert plain.head.weight is plain.embed.weight
    other = Net()
    hs.cast_model(other)
    second = OPTIMIZERS[kind](other)
    hs.load_state_dict(other, second, state)
    assert all(torch.equal(a.to(dtype).to(b.dtype), b) for a, b in zip(masters_of(opts), masters_of(second))) and same(bytes_of(other), bytes_of(model))
    early = Net()
    hs.cast_model(early)
    hs.load_state_dict(early, None, state)  # before there is an optimizer
    third = OPTIMIZERS[kind](early)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-7, atol=2.0**-40) for a, b in zip(masters_of(opts), masters_of(third)))


def test_a_refused_load_changes_nothing():
    model, opts = trained(OPTIMIZERS["two"])
    state = hs.export_state_dict(model, opts)
    before, masters = bytes_of(model), masters_of(opts)
    edits = [(lambda s: s.pop("scale"), r"missing \['scale'\], not in the model nothing"), (lambda s: s.update(x=torch.ones(1)), r"missing nothing, not in the model \['x'\]"),
             (lambda s: s.update({"body.4.bias": torch.full((8,), 65520.0)}), "'body.4.bias' does not fit torch.float16: 8 of 8"),
             (lambda s: s.update({"body.0.weight": torch.ones(8)}), r"'body.0.weight' is \[8, 8\] but the value is \[8\]"),
             (lambda s: s.update({"counts": torch.ones(4)}), r"'counts' is \[3\] but the value is \[4\]"), (lambda s: s.update({"scale": 3.0}), "'scale' is float; expected a tensor")]
    for edit, message in edits:
        bad = dict(state)
        edit(bad)
        with pytest.raises(ValueError, match=message):
            hs.load_state_dict(model, opts, bad)
    stranger = hs.optim.SGD([("stranger", nn.Parameter(torch.ones(1)))], lr=0.1)
    with pytest.raises(ValueError, match="'stranger' of SGD is not a parameter of the model"):
        hs.load_state_dict(model, [*opts, stranger], {k: v * 2 for k, v in state.items()})
    assert same(before, bytes_of(model)) and all(torch.equal(a, b) for a, b in zip(masters, masters_of(opts)))
