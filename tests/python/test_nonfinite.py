"""hs.find_nonfinite: ten faults planted, each named; nothing reported on healthy runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep as hs


class Planted(nn.Module):
    """x, but what `fault` makes of it."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        return x if self.fault is None else self.fault(x)


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return (grad + 1e4) * 1e36


def net(where=None, fault=None, layers=4):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Planted(fault if i == where else None)) for i in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(8, 2))


def iteration(model, x=None, loss=None, step=None):
    x = torch.randn(5, 8) if x is None else x

    def run():
        model.zero_grad()
        out = model(x)
        (out.pow(2).mean() if loss is None else loss(out)).backward()
        if step is not None:
            step()

    return run


def test_a_forward_infinity_in_layer_k():
    for k in range(4):
        model = net(k, lambda x: (x + 1) * 1e39)
        found = hs.find_nonfinite(model, iteration(model))
        assert (found.producer, found.phase, found.module, found.op, found.role, found.value) == (True, "forward", f"{k}.2", "aten::mul", "activation", "inf")
        assert found.index == (0, 0) and found.dtype == "float32" and found.largest_input >= 1


def test_b_infinity_that_arises_only_in_the_backward():
    model = net(2, BadBackward.apply)
    found = hs.find_nonfinite(model, iteration(model))
    assert found.producer and found.phase == "backward" and found.module == "2.2" and found.op == "aten::mul" and "BadBackward" in found.node and found.role == "activation gradient"


def test_b_a_weight_gradient_that_overflows_fp16_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).half()
    found = hs.find_nonfinite(model, iteration(model, x=torch.randn(5, 8).half() * 100, loss=lambda out: out.float().sum() * 3e4))
    assert found.producer and found.phase == "backward" and found.role == "weight gradient" and found.tensor in ("1.weight", "0.weight") and found.dtype == "float16"


def test_c_nan_from_zero_by_zero_while_the_loss_is_finite():
    model = net(1, lambda x: x + 0 * torch.nan_to_num((x - x) / (x - x)).sum())
    found = hs.find_nonfinite(model, iteration(model))
    assert found.producer and found.module == "1.2" and found.op == "aten::div" and found.value == "nan" and found.swallowed_by == "aten::nan_to_num"


def test_d_a_mask_of_minus_infinity_is_meant():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            q = self.q(x)
            scores = q @ q.t()
            mask = torch.full((5, 5), float("-inf")).triu(1)
            a = (scores + mask).softmax(-1) + scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
            return a @ q + F.scaled_dot_product_attention(q[None], q[None], q[None], is_causal=True)[0]

    torch.manual_seed(0)
    model = Attention()
    assert hs.find_nonfinite(model, iteration(model)) is None
    # A row that is masked wholly is not.
    fully = nn.Sequential(nn.Linear(8, 8), Planted(lambda x: x.masked_fill(torch.ones_like(x).bool(), float("-inf")).softmax(-1)))
    found = hs.find_nonfinite(fully, iteration(fully))
    assert found.producer and found.module == "1" and "softmax" in found.op and found.value == "nan"


def test_e_outputs_that_are_nested_or_no_tensors():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return {"n": 3, "parts": [(self.f(x), None), {"deep": self.f(x).abs().log() * 0 + (x * 0).log()}]}

    model = Nested()
    found = hs.find_nonfinite(model, lambda: model(torch.randn(5, 8))["parts"][1]["deep"].sum())
    assert found.producer and found.op == "aten::log" and found.value == "-inf" and found.module == ""


def test_f_a_shared_module_names_the_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return self.f(self.f(x) * 1e20)

    torch.manual_seed(0)
    model = Shared().half()
    found = hs.find_nonfinite(model, iteration(model, x=torch.ones(5, 8).half(), loss=lambda out: out.float().sum()))
    assert found.module == "" and found.op == "aten::mul"  # between the calls

    class Grows(Shared):
        def forward(self, x):
            return self.f(self.f(x))

    model = Grows().half()
    with torch.no_grad():
        model.f.weight.fill_(100.0)
    found = hs.find_nonfinite(model, iteration(model, x=torch.full((5, 8), 60.0).half(), loss=lambda out: out.float().sum()))
    assert found.module == "f" and found.call == 1 and "call 1" in str(found)


def _rank(rank, file, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(net(1, lambda x: x * (1e39 if rank == 1 else 1.0)))
    found = hs.find_nonfinite(model, iteration(model, x=torch.ones(5, 8)))
    queue.put((rank, found.rank, found.producer, found.phase, found.module, found.op, str(found)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_g_on_one_rank_only(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(r, tmp_path / "rendezvous", queue)) for r in range(2)]
    [p.start() for p in processes]
    found = sorted(queue.get() for _ in processes)
    [p.join() for p in processes]
    assert found[1][1:6] == (1, True, "forward", "module.1.2", "aten::mul") and found[1][6].startswith("rank 1: ")
    assert found[0][1] == 0 and not found[0][2] and found[0][3] == "backward"  # it came from the other rank


def test_a_collective_that_ends_within_its_call_did_not_make_what_it_brings():
    model = net()

    def run():
        gradient = torch.ones(8)
        torch.ops.c10d.halfstep_test_allreduce_(gradient)
        gradient.mul_(0.5)
        return model(torch.randn(5, 8)).sum()

    with torch.library._scoped_library("c10d", "FRAGMENT") as library:
        library.define("halfstep_test_allreduce_(Tensor(a!) x) -> Tensor(a!)")
        library.impl("halfstep_test_allreduce_", lambda x: x.fill_(float("inf")), "CPU")
        found = hs.find_nonfinite(model, run)
    assert not found.producer and found.op == "aten::mul_" and found.value == "inf"


@pytest.mark.parametrize("ours", [True, False])
def test_h_overflow_in_the_optimizer(ours):
    model = net()
    opt = hs.optim.AdamW(model.named_parameters()) if ours else torch.optim.AdamW(model.parameters(), foreach=False)

    def step():
        model[1][0].weight.grad.fill_(1e22)  # finite; its square is not
        opt.step()

    found = hs.find_nonfinite(model, iteration(model, step=step), optimizers=opt)
    assert found.producer and found.phase == "optimizer" and found.value == "inf" and found.role in ("optimizer state", "weight"), str(found)
    if ours:
        assert found.op == "halfstep::adamw_step_" and found.tensor.startswith("states[")


def test_i_inside_torch_compile():
    model = net(2, lambda x: x.exp().exp().exp())
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(5, 8))
    found = hs.find_nonfinite(model, iteration(model, x=torch.full((5, 8), 30.0)))
    direct = hs.find_nonfinite(compiled, lambda: compiled(torch.full((5, 8), 30.0)).sum())
    assert found.module == "2.2" and found.op == direct.op == "aten::exp" and direct.module.endswith("2.2")


def test_j_swallowed_by_a_later_op():
    model = net(0, lambda x: ((x + 1) * 1e39).clamp(-1.0, 1.0))
    found = hs.find_nonfinite(model, iteration(model, x=torch.ones(5, 8)))
    assert found.producer and found.op == "aten::mul" and found.module == "0.2" and found.swallowed_by == "aten::clamp" and "made it finite again" in str(found)


def test_what_came_from_outside_is_passed_on():
    model = net()
    x = torch.randn(5, 8)
    x[3, 2] = float("nan")
    found = hs.find_nonfinite(model, iteration(model, x=x))
    assert not found.producer and found.role == "input" and found.index == (3, 2) and found.module == "0.0"
    with torch.no_grad():
        model[2][0].weight[1, 4] = float("inf")
    found = hs.find_nonfinite(model, iteration(model))
    assert not found.producer and found.role == "weight" and found.tensor == "2.0.weight" and found.index == (1, 4) and "from outside" in str(found)


def test_another_model_than_the_one_that_runs_gives_no_module():
    found = hs.find_nonfinite(net(), iteration(net(1, lambda x: (x + 1) * 1e39)))
    assert found.producer and found.op == "aten::mul" and found.module == ""


@pytest.mark.parametrize("kind", ["fp32", "mixed"])
def test_nothing_on_a_healthy_run(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 10))
    mixed = kind == "mixed"
    if mixed:
        hs.cast_model(model)
    opt, scaler = hs.optim.AdamW(model.parameters(), lr=1e-3), hs.GradScaler(init_scale=2.0**10, enabled=mixed)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))

    def run():
        opt.zero_grad()
        with hs.autocast("cpu", enabled=mixed):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()

    for _ in range(10):
        assert hs.find_nonfinite(model, run, opt) is None


def test_the_search_ends_with_an_error_of_the_run_and_leaves_no_hooks():
    model = net()
    with pytest.raises(ZeroDivisionError):
        hs.find_nonfinite(model, lambda: 1 // 0)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert hs.find_nonfinite(model, iteration(model)) is None
    with pytest.raises(RuntimeError, match="another one is at work in this process"):
        hs.find_nonfinite(model, lambda: hs.find_nonfinite(model, iteration(model)))
