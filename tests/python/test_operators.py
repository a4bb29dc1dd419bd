"""How steps reach their ops: halfstep._C.Operator gives what torch.ops.halfstep gives, and a kept list follows the Python list."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import halfstep as hs
from halfstep._library import _C, H, TensorList, pointers, versions

pytestmark = pytest.mark.smoke
stats = _C.Operator("grad_stats")


def numbers(n=3):
    return [torch.randn(5).half() for _ in range(n)]


def test_it_gives_what_torch_ops_gives():
    grads = [*numbers(), None]
    assert torch.equal(stats(grads, []), H.grad_stats(grads, []))
    assert torch.equal(stats(grads=tuple(grads), table=TensorList()), H.grad_stats(grads, []))
    control = _C.Operator("step_control")
    args = ([stats(grads, [])], torch.tensor(4.0), None, None, 1.0)
    assert torch.equal(control(*args), H.step_control(*args))
    assert torch.equal(control(args[0], torch.tensor(4.0), None, clip=None, max_norm=1), H.step_control(*args))
    assert _C.Operator("unscale_")(numbers(), torch.ones(1), torch.zeros(1), []) is None


@pytest.mark.parametrize("args, kwargs, error, text", [
    ((), {}, TypeError, "halfstep::grad_stats: argument 'grads' is missing"),
    (([],), {}, TypeError, "argument 'table' is missing"),
    (([], [], 1), {}, TypeError, "takes 2 arguments but was given 3"),
    (([], []), {"scale": 1}, TypeError, "was given an argument it does not take"),
    ((torch.zeros(2), []), {}, TypeError, "grads is Tensor; expected a list"),
    (([torch.zeros(2), 1.0], []), {}, TypeError, r"grads\[1\] is float; expected a tensor"),
    ((1.0, []), {}, TypeError, "grads is float; expected a list"),
    ((iter([]), []), {}, TypeError, "grads is list_iterator; expected a list"),
    (([None], [None]), {}, TypeError, r"table\[0\] is NoneType; expected a tensor"),
    (([torch.zeros(2, dtype=torch.int64)], []), {}, RuntimeError, r"grads\[0\] is torch.int64\[2\]"),
])
def test_wrong_arguments_are_named(args, kwargs, error, text):
    with pytest.raises(error, match=text) as raised:
        stats(*args, **kwargs)
    assert "Exception raised from" not in str(raised.value)  # no C++ stack


@pytest.mark.parametrize("changed, text", [
    ({"weight_decay": "0.1"}, "weight_decay is '0.1'; expected a number"), ({"momentum": None}, "momentum is None; expected a number"),
    ({"seed": 1.5}, "seed is 1.5; expected an integer"), ({"nesterov": None}, "nesterov is None; expected a bool"), ({"maximize": "no"}, "maximize is 'no'; expected a bool")])
def test_wrong_numbers_are_named(changed, text):
    group = {"ema_decay": 1.0, "stochastic": False, "seed": 0, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    counts = torch.zeros(1, dtype=torch.int64)
    args = [torch.ones(2)], [torch.ones(2)], [torch.empty(0)], [], [], [], counts, counts.clone(), torch.zeros((), dtype=torch.float64), None, []
    _C.Operator("sgd_step_")(*args, **group)
    with pytest.raises(TypeError, match=text):
        _C.Operator("sgd_step_")(*args, **{**group, **changed})


def test_an_unknown_op_is_named():
    with pytest.raises(RuntimeError, match="halfstep::none_such"):
        _C.Operator("none_such")


def test_dispatch_modes_see_it():
    class Seen(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **kwargs or {})

    with Seen():
        stats(numbers(), [])
    assert Seen.names[-1] == "halfstep.grad_stats.default"


def test_a_kept_list_follows_the_python_list():
    kept, tensors, one = TensorList(), numbers(), torch.ones(1)
    unscale = lambda: _C.Operator("unscale_")(kept.of(tensors), one / 2, torch.zeros(1), [])
    for change in (lambda: None, lambda: tensors.__setitem__(1, torch.full((5,), 8.0).half()), lambda: tensors.append(torch.ones(2)), lambda: tensors.pop(0), tensors.clear):
        change()
        before = [t.clone() for t in tensors]
        unscale()
        assert all(torch.equal(t, b / 2) for t, b in zip(tensors, before, strict=True))
    gone = weakref.ref(torch.nn.Parameter(torch.ones(3)))
    assert gone() is None  # nothing else holds one
    held = torch.nn.Parameter(torch.ones(3))
    gone = weakref.ref(held)
    kept.of([held])
    del held
    assert gone() is not None
    kept.of([])
    gc.collect()
    assert gone() is None
    with pytest.raises(TypeError, match=r"tensors\[1\] is int"):
        kept.of([torch.ones(1), 2])


def test_a_step_uses_the_tensors_that_a_group_holds_now():
    """Masters and states that were replaced, moved or loaded since the last step are those of the next."""
    def after(disturb):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(40).half()) for _ in range(3)]
        opt = hs.optim.AdamW(params, lr=1e-2)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(40).half()
            opt.step()
            disturb(opt, params)
        return params, opt

    def reload(opt, params):
        opt.load_state_dict(opt.state_dict())

    def replace(opt, params):
        room = opt._rooms[0]
        room.masters[1] = room.masters[1].clone()
        room.states["exp_avg"][2] = room.states["exp_avg"][2].clone()

    plain, opt = after(lambda *_: None)
    for disturb in (reload, replace):
        params, other = after(disturb)
        assert all(torch.equal(a, b) for a, b in zip(params, plain))
        assert all(torch.equal(a, b) for a, b in zip(opt.master_params(), other.master_params()))


def test_what_was_replaced_is_given_up_before_the_next_step():
    param = torch.nn.Parameter(torch.randn(6, 4).half())
    opt = hs.optim.AdamW([param])
    param.grad = torch.randn(6, 4).half()
    opt.step()
    room = opt._rooms[0]
    old = [weakref.ref(t) for t in (room.raw[0], room.masters[0], room.states["exp_avg"][0])]
    param.data = param.detach().t().contiguous().t()  # other strides
    opt.state_dict()
    gc.collect()
    assert not any(ref() is not None for ref in old)


def test_versions_and_addresses_are_torchs():
    tensors = [*numbers(), torch.empty(0), torch.nn.Parameter(torch.ones(2))]
    tensors[1].add_(1)
    assert list(versions(tensors)) == [t._version for t in tensors] and list(pointers(tensors)) == [t.data_ptr() for t in tensors]
    assert versions(tensors) == versions(tensors) and not len(versions([]))
    with torch.inference_mode():
        frozen = torch.ones(1)
    with pytest.raises(RuntimeError, match="version counter"):
        versions([frozen])
