"""Bad input: the error names what and both values, and not a byte has changed."""

import copy

import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke
NONE = torch.empty(0)


def adam_args():
    """Two parameters: FP16 with split16, and FP32; states: exp_avgs, exp_avg_sqs, max_exp_avg_sqs."""
    params = [torch.ones(4).half(), torch.ones(4, 3)]
    return dict(params=params, grads=[torch.ones(4).half(), torch.ones(4, 3)], masters=[torch.zeros(4, dtype=torch.int16), NONE], 
                states=[torch.zeros(s) for _ in range(3) for s in ((4,), (4, 3))], emas=[], zeroed=[], steps=torch.zeros(2, dtype=torch.int64),
                overflowed=torch.zeros(2, dtype=torch.int64), lr=torch.tensor(0.1, dtype=torch.float64), control=torch.tensor([0.0, 1, 1, 1], dtype=torch.float64), table=[],
                ema_decay=0.0, stochastic=False, seed=0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=True, maximize=False)


def adamw_args():
    return dict(adam_args(), max_lr=0.0, decay_in_update=False)


def sgd_args():
    args = adam_args()
    keep = {k: v for k, v in args.items() if k not in ("beta1", "beta2", "eps", "amsgrad")}
    return dict(keep, states=args["states"][:2], momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)


def put(key, value, index=None):
    def edit(args):
        if index is None:
            args[key] = value
        else:
            args[key] = list(args[key])
            args[key][index] = value
    return edit


COMMON = [
    (put("grads", [torch.ones(4).half()]), r"grads has 1 entries but params has 2"),
    (put("zeroed", [torch.ones(4).half()]), r"grads has 2 entries and zeroed has 1; expected one of the two"),
    (put("emas", [torch.zeros(4)]), r"emas has 1 entries but params has 2"),
    (put("emas", [torch.zeros(4), torch.zeros(4, 3).half()]), r"emas\[1\] is torch.float16\[4, 3\]; expected torch.float32"),
    (put("masters", [NONE]), r"masters has 1 entries but params has 2"),
    (put("grads", torch.ones(4, 2), 1), r"grads\[1\] is torch.float32\[4, 2\] but params\[1\] is torch.float32\[4, 3\]"),
    (put("grads", torch.ones(4, 3, dtype=torch.int32), 1), r"grads\[1\] is \S*\[4, 3\]; expected float16, bfloat16, float32 or float64"),
    (put("grads", torch.ones(4, 3, device="meta"), 1), r"grads\[1\] is on meta but params\[1\] is on cpu"),
    (put("params", torch.ones(4, 3, device="meta"), 1), r"params\[1\] is on meta but params\[0\] is on cpu"),
    (put("params", torch.ones(4, 3, dtype=torch.int64), 1), r"params\[1\] is torch.int64\[4, 3\]; expected float16"),
    (put("params", torch.zeros(1).expand(4, 3), 1), r"params\[1\] is torch.float32\[4, 3\] with strides \[0, 0\]: its elements overlap or leave gaps"),
    (put("params", torch.zeros(4, 6)[:, ::2], 1), r"params\[1\] is torch.float32\[4, 3\] with strides \[6, 2\]: its elements overlap or leave gaps"),
    (put("grads", torch.ones(4, 3).to_sparse(), 1), r"grads\[1\] is sparse or of another layout"),
    (put("masters", torch.zeros(4, 3, dtype=torch.int16), 1), r"masters\[1\] is torch.int16\[4, 3\] but params\[1\] is torch.float32\[4, 3\]"),
    (put("masters", torch.zeros(3, dtype=torch.int16), 0), r"masters\[0\] is torch.int16\[3\] but params\[0\] is torch.float16\[4\]"),
    (put("masters", torch.zeros(4, device="meta"), 0), r"masters\[0\] is on meta but params\[0\] is on cpu"),
    (put("steps", torch.zeros(1, dtype=torch.int64)), r"steps is torch.int64\[1\] but params has 2 entries; expected contiguous torch.int64\[2\]"),
    (put("steps", torch.zeros(2)), r"steps is torch.float32\[2\]"),
    (put("overflowed", torch.zeros(2, dtype=torch.int64, device="meta")), r"overflowed is on meta but params\[0\] is on cpu"),
    (put("lr", torch.tensor(0.1)), r"lr is torch.float32\[\]; expected one element of torch.float64"),
    (put("lr", torch.zeros(2, dtype=torch.float64)), r"lr is torch.float64\[2\]; expected one element"),
    (put("control", torch.zeros(3, dtype=torch.float64)), r"control is torch.float64\[3\]; expected torch.float64\[4\]"),
]
ADAM = COMMON + [
    (put("states", [torch.zeros(4)]), r"states has 1 entries but params has 2; expected 3 states a parameter"),
    (put("states", torch.zeros(3, 4), 1), r"exp_avgs\[1\] is torch.float32\[3, 4\] but params\[1\] is torch.float32\[4, 3\]"),
    (put("states", torch.zeros(4, 3).double(), 3), r"exp_avg_sqs\[1\] is torch.float64\[4, 3\] but params\[1\] \(torch.float32\[4, 3\]\) is updated in torch.float32"),
    (put("states", torch.zeros(3, 4).t(), 3), r"exp_avg_sqs\[1\] has strides \[1, 4\] but params\[1\] has \[3, 1\]"),
    (put("states", NONE, 4), r"max_exp_avg_sqs\[0\] is torch.float32\[0\] but params\[0\] is torch.float16\[4\]"),
    (put("states", torch.zeros(4, device="meta"), 0), r"exp_avgs\[0\] is on meta but params\[0\] is on cpu"),
    (put("states", torch.zeros(4, 3).bfloat16(), 5), r"max_exp_avg_sqs\[1\] is torch.bfloat16\[4, 3\] but exp_avgs\[1\] is torch.float32\[4, 3\]"),
    (put("states", torch.zeros(4, 3, dtype=torch.int8), 1), r"exp_avgs\[1\] is torch.int8\[4, 3\] but states has no scales after it"),
]
SGD = COMMON + [(put("states", torch.zeros(5), 0), r"momentum_buffers\[0\] is torch.float32\[5\] but params\[0\] is torch.float16\[4\]"),
                (put("states", []), r"states has 0 entries but params has 2; expected 1 states a parameter")]
CASES = [(op, make, edit, message) for op, make, cases in (("adamw_step_", adamw_args, ADAM), ("adam_step_", adam_args, ADAM), ("sgd_step_", sgd_args, SGD)) for edit, message in cases]


def tensors_of(args):
    return [t for v in args.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided]


@pytest.mark.parametrize("op,make,edit,message", CASES, ids=[f"{c[0]}{i}" for i, c in enumerate(CASES)])
def test_steps_refuse_before_anything_is_written(op, make, edit, message):
    args = make()
    getattr(H, op)(**copy.deepcopy(args))  # right as it is
    edit(args)
    before = [t.clone() for t in tensors_of(args)]
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(H, op)(**args)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(args)))


def test_a_parameter_without_a_gradient_may_have_empty_states():
    args = adamw_args()
    args["grads"][1] = None
    for row in (1, 3, 5):
        args["states"][row] = NONE
    H.adamw_step_(**args)
    assert (args["params"][1] == 1).all() and args["steps"].tolist() == [1, 0]


ones, half, flag = torch.ones, torch.ones(2).half(), torch.zeros(())
OTHER_OPS = [
    (lambda: H.grad_stats([ones(2), ones(3, dtype=torch.int64)], []), r"grad_stats: grads\[1\] is torch.int64\[3\]; expected float16"),
    (lambda: H.grad_stats([ones(2), ones(3, device="meta")], []), r"grad_stats: grads\[1\] is on meta but"),
    (lambda: H.grad_stats([ones(2), ones(3).to_sparse()], []), r"grad_stats: grads\[1\] is sparse or of another layout"),
    (lambda: H.unscale_([ones(2)], torch.tensor(1.0, dtype=torch.float64), flag, []), r"unscale_: inv_scale is torch.float64\[\]; expected one element of torch.float32"),
    (lambda: H.unscale_([ones(2)], ones(2), flag, []), r"unscale_: inv_scale is torch.float32\[2\]; expected one element"),
    (lambda: H.unscale_([ones(1).expand(2)], ones(()), flag, []), r"its elements overlap or leave gaps"),
    (lambda: H.unscale_to_([ones(3)], [half], ones(()), flag, []), r"unscale_to_: outputs\[0\] is torch.float32\[3\] but grads\[0\] is torch.float16\[2\]"),
    (lambda: H.unscale_to_([], [half], ones(()), flag, []), r"unscale_to_: outputs has 0 entries but grads has 1"),
    (lambda: H.step_control([ones(3, 8)], None, None, None, 1.0), r"step_control: stats\[0\] is torch.float32\[3, 8\]; expected torch.float64\[n \+ 1, 8\]"),
    (lambda: H.step_control([], ones(2), None, None, 1.0), r"step_control: scale is torch.float32\[2\]; expected one element"),
    (lambda: H.write_masters_([ones(3)], [ones(2)], [NONE], torch.zeros(1, dtype=torch.int64)), r"write_masters_: values\[0\] is torch.float32\[3\] but params\[0\] is torch.float32\[2\]"),
    (lambda: H.write_masters_([ones(2)], [ones(2)], [], torch.zeros(1, dtype=torch.int64)), r"write_masters_: masters has 0 entries but params has 1"),
    (lambda: H.read_masters([ones(2)], [torch.zeros(2, dtype=torch.int16)]), r"read_masters: masters\[0\] is torch.int16\[2\] but params\[0\] is torch.float32\[2\]"),
    (lambda: H.refresh_masters_([half], [torch.zeros(2, dtype=torch.int16)], torch.zeros(2, dtype=torch.int64), False), r"refresh_masters_: changed is torch.int64\[2\] but params has 1 entries"),
    (lambda: H.update_scale_(ones(()), torch.zeros(16), flag, torch.zeros(16)), r"update_scale_: state is torch.float32\[16\]; expected contiguous torch.float64\[32\]"),
    (lambda: H.simulate_scale(torch.zeros(2, 2), torch.zeros(16).double(), torch.zeros(16).double()), r"simulate_scale: found_inf is torch.float32\[2, 2\]"),
    (lambda: H.init_scale_state(torch.zeros(3).double()), r"init_scale_state: policy is torch.float64\[3\]; expected contiguous torch.float64\[32\]"),
]


@pytest.mark.parametrize("call,message", OTHER_OPS)
def test_the_other_ops_refuse_too(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
    assert flag == 0 and (half == 1).all()


# -- optimizers --------------------------------------------------------------------------------------
def P(*shape, dtype=torch.float32, **kw):
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype, **kw))


CONSTRUCTION = [
    (lambda cls: cls([("a", P(2)), ("b", P(2, device="meta"))]), ValueError, "'b' is on meta but 'a' of the same group is on cpu; give each device its own group"),
    (lambda cls: cls([("w", torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False))]), ValueError, "'w' is torch.int32; expected float16, bfloat16, float32 or float64"),
    (lambda cls: cls([("w", P(2, dtype=torch.complex64))]), ValueError, "'w' is torch.complex64"),
    (lambda cls: cls([("w", torch.nn.Parameter(torch.ones(2, 2).to_sparse()))]), ValueError, "'w' is torch.sparse_coo; expected a dense tensor"),
    (lambda cls: cls([("w", torch.nn.Parameter(torch.tensor([1.0, 65520.0]).half()))]), ValueError, "'w' holds a non-finite value; a torch.float16 weight must be below 65520 in magnitude"),
    (lambda cls: cls([("w", torch.nn.Parameter(torch.tensor([torch.nan]).bfloat16()))]), ValueError, "'w' holds a non-finite value; a torch.bfloat16 weight must be below 3.396e38"),
    (lambda cls: cls([{"params": [("a", P(2))]}, {"params": [("b", P(4)[::2].detach().requires_grad_())]}]), ValueError, r"'b' has strides \(2,\) for shape \(2,\): its elements overlap or leave gaps"),
    (lambda cls: cls(P(2)), TypeError, r"params is a tensor \(torch.float32\[2\]\); expected an iterable"),
    (lambda cls: cls([("w", 3.0)]), TypeError, "'w' is float; expected a tensor"),
    (lambda cls: cls([]), ValueError, "empty parameter list"),
    (lambda cls: cls([P(2)], master="split4"), ValueError, "master is 'split4'; expected one of auto, fp32, fp64, split16"),
    (lambda cls: cls([{"params": [P(2)], "master": "split4"}]), ValueError, "master is 'split4'"),
    (lambda cls: cls([P(2)], grad_dtype="fp16"), ValueError, "grad_dtype is 'fp16'; expected 'param' or 'fp32'"),
    (lambda cls: cls([P(2)], max_grad_norm=-1.0), ValueError, "max_grad_norm is -1.0; expected a number >= 0 or None"),
    (lambda cls: cls([P(2)], lr=-1.0), ValueError, "lr is -1.0; expected a number >= 0"),
    (lambda cls: cls([P(2)], lr=float("nan")), ValueError, "lr is nan"),
    (lambda cls: cls([P(2)], lr=torch.ones(2)), ValueError, r"lr is a tensor of shape \[2\]; expected one element"),
    (lambda cls: cls([{"params": [P(2)], "lr": -2.0}]), ValueError, "lr is -2.0"),
    (lambda cls: cls([P(2)], weight_decay=-0.1), ValueError, "weight_decay is -0.1; expected a number >= 0"),
]


@pytest.mark.parametrize("cls", [hs.optim.AdamW, hs.optim.Adam, hs.optim.SGD], ids=["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("make,kind,message", CONSTRUCTION)
def test_construction_is_refused(cls, make, kind, message):
    with pytest.raises(kind, match=message):
        make(cls)


OPTIONS = [
    (lambda: hs.optim.AdamW([P(2)], betas=(0.9, 1.0)), r"betas\[1\] is 1.0; expected 0 <= beta < 1"),
    (lambda: hs.optim.Adam([{"params": [P(2)], "betas": (-0.1, 0.9)}]), r"betas\[0\] is -0.1"),
    (lambda: hs.optim.Adam([P(2)], betas=(0.9,)), r"betas is \(0.9,\); expected two numbers"),
    (lambda: hs.optim.Adam([P(2)], eps=-1.0), "eps is -1.0; expected a number >= 0"),
    (lambda: hs.optim.SGD([P(2)], momentum=-0.5), "momentum is -0.5; expected a number >= 0"),
    (lambda: hs.optim.SGD([P(2)], nesterov=True), "nesterov needs momentum > 0 and dampening 0; momentum is 0.0, dampening is 0.0"),
    (lambda: hs.optim.SGD([P(2)], momentum=0.9, dampening=0.5, nesterov=True), "momentum is 0.9, dampening is 0.5"),
]


@pytest.mark.parametrize("make,message", OPTIONS)
def test_options_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_group_takes_nothing_from_any_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    hs.cast_model(model)
    model[1].weight.data[0, 0] = torch.inf
    groups = [{"params": [("first", model[0].weight)]}, {"params": [("second", model[1].weight)]}]
    with pytest.raises(ValueError, match="'second' holds a non-finite value"):
        hs.optim.AdamW(groups, grad_dtype="fp32")
    assert all(hasattr(p, "_halfstep_exact") and p.grad_dtype == torch.float16 for p in model.parameters())
    model[1].weight.data[0, 0] = 0.0
    opt = hs.optim.AdamW(groups[:1])
    with pytest.raises(ValueError, match="betas"):
        opt.add_param_group({"params": [("second", model[1].weight)], "betas": (2, 2)})
    assert len(opt.param_groups) == len(opt._rooms) == 1 and hasattr(model[1].weight, "_halfstep_exact")
    hs.cast_model(model[1])  # still free


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kw", [{}, dict(skip_nonfinite=False)], ids=["checked", "unchecked"])
@pytest.mark.parametrize("cls", [hs.optim.AdamW, hs.optim.Adam, hs.optim.SGD], ids=["AdamW", "Adam", "SGD"])
def test_a_sparse_gradient_is_refused_by_name_in_the_step(cls, kw, scaled):
    a, b = P(3), P(3, 2, dtype=torch.float16)
    opt, scaler = cls([{"params": [("dense", a)]}, {"params": [("table", b)]}], lr=0.1, **kw), hs.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    a.grad = torch.ones(3)
    b.grad = torch.ones(3, 2).half().to_sparse()
    before = [a.detach().clone(), b.detach().clone(), *(t.clone() for s in opt.state.values() for t in s.values())]
    with pytest.raises(RuntimeError, match="'table' has a sparse gradient; this optimizer supports dense gradients only"):
        scaler.step(opt) if scaled else opt.step()
    after = [a.detach(), b.detach(), *(t for s in opt.state.values() for t in s.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


def test_set_master_params_checks_all_values_first():
    opt = hs.optim.SGD([("a", P(2, dtype=torch.float16)), ("b", P(3, dtype=torch.float16))], lr=0.1)
    before = opt.master_params()
    for values, message in [([torch.zeros(2)], "values has 1 entries but the optimizer has 2 parameters"), ([torch.zeros(2), torch.zeros(4)], r"'b' is \[3\] but the value is \[4\]"),
                            ([torch.zeros(2), torch.tensor([0.0, 7e4, -8e4])], r"'b' does not fit torch.float16: 2 of 3 elements are at or beyond 65520 \(largest 80000\)")]:
        with pytest.raises(ValueError, match=message):
            opt.set_master_params(values)
    assert all(torch.equal(x, y) for x, y in zip(before, opt.master_params()))


def test_scaler_arguments():
    scaler, opt = hs.GradScaler("cpu"), hs.optim.SGD([P(2)], lr=0.1)
    scaler.scale(torch.ones(()))
    for call, kind, message in [(lambda: scaler.clip_grad_norm_(opt, -1.0), ValueError, "max_norm is -1.0; expected a number >= 0"), (lambda: scaler.scale("x"), ValueError, "outputs is str"),
                                (lambda: scaler.update(torch.ones(2)), ValueError, "new_scale is"), (lambda: scaler.update(torch.ones((), requires_grad=True)), ValueError, "requires no grad")]:
        with pytest.raises(kind, match=message):
            call()
    assert scaler.clip_grad_norm_(opt, 1.0) == 0  # nothing to clip
