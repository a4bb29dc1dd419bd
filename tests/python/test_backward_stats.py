"""stats_in_backward: the rows made by the hooks are those of the separate pass, whatever happens to the gradients between."""

import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import halfstep as hs
import halfstep._backward

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke


def net(dtype=torch.float16):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 70), torch.nn.Tanh(), torch.nn.Linear(70, 70), torch.nn.Tanh(), torch.nn.Linear(70, 5))
    if dtype == torch.float16:
        hs.cast_model(model)
    return model


def bits(table):
    return table.view(torch.int64).clone()


def backward(model, scale=1024.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    with hs.autocast("cpu", enabled=next(model.parameters()).dtype == torch.float16):
        loss = model(torch.randn(9, 33, generator=g)).float().square().mean()
    (loss * scale).backward()


def check(opt, model, reread):
    """The optimizer's table is that of one pass, and `reread` gradients were read for it."""
    grads = [p.grad for p in model.parameters()]
    ((room, table, _),) = opt._gather_stats()
    assert torch.equal(bits(table), bits(H.grad_stats(grads, [])))
    assert room.backward.reread == reread


@pytest.fixture(params=[torch.float16, torch.float32])
def made(request):
    model = net(request.param)
    opt = hs.optim.AdamW(model.named_parameters(), lr=1e-2)
    opt.stats_in_backward()
    return model, opt


def test_nothing_is_read_again_after_a_backward(made):
    model, opt = made
    for seed in range(3):
        opt.zero_grad()
        backward(model, seed=seed)
        check(opt, model, 0)


def test_backward_passes_in_several_threads():
    """Torch calls the hooks of one parameter at the same time there: a row that two wrote, or whose gradient was added to meanwhile, is read again."""
    model = net(torch.float32)
    opt = hs.optim.AdamW(model.named_parameters(), lr=1e-2)
    opt.stats_in_backward()
    for _ in range(5):
        losses = [model(torch.randn(9, 33)).square().mean() for _ in range(8)]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        [t.start() for t in threads]
        [t.join() for t in threads]
        ((_, table, _),) = opt._gather_stats()
        assert torch.equal(bits(table), bits(H.grad_stats([p.grad for p in model.parameters()], [])))
    model.zero_grad()
    backward(model)
    check(opt, model, 0)


def test_two_reads_at_a_time_leave_the_row_unknown(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(5))
    opt = hs.optim.AdamW([parameter], lr=1e-2)
    opt.stats_in_backward()
    parameter.sum().backward()
    ((room, _, _),) = opt._gather_stats()
    stats, ops = room.backward, halfstep._backward.H
    op = ops.grad_stats_row_
    for meanwhile in (lambda: stats.see(0, parameter.grad), lambda: parameter.grad.add_(1)):
        once = [meanwhile]

        def row(*args):
            op(*args)
            if once:
                once.pop()()

        monkeypatch.setattr(ops, "grad_stats_row_", row)
        stats.see(0, parameter.grad)
        assert 0 not in stats.known
        stats.see(0, parameter.grad)
        assert 0 in stats.known and not stats.readers[0]
        monkeypatch.undo()


def test_accumulation_is_that_of_the_sum(made):
    model, opt = made
    for seed in range(4):
        backward(model, seed=seed)
        check(opt, model, 0)
    opt.zero_grad(set_to_none=False)
    check(opt, model, 6)
    backward(model)
    check(opt, model, 0)


def test_fp32_accumulation_of_fp16_parameters():
    model = net()
    opt = hs.optim.SGD(model.named_parameters(), lr=1e-2, grad_dtype="fp32")
    opt.stats_in_backward()
    for seed in range(2):
        backward(model, seed=seed)
        check(opt, model, 0)


EDITS = {
    "in place": lambda p: p.grad.mul_(0.5),
    "replaced": lambda p: setattr(p, "grad", p.grad * 2),
    "replaced by its equal": lambda p: setattr(p, "grad", p.grad.clone()),
    "other memory": lambda p: setattr(p.grad, "data", p.grad.data * 3),
    "set by hand": lambda p: p.grad.__setitem__(0, float("inf")),
    "through a view": lambda p: p.grad.view(-1)[1:].zero_(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_gradient_is_read_again(made, edit):
    model, opt = made
    backward(model)
    EDITS[edit](model[2].weight)
    check(opt, model, 1)


def test_a_tensor_in_the_memory_of_a_freed_gradient_is_not_taken_for_it(made):
    model, opt = made
    backward(model)
    p = model[2].weight
    for _ in range(20):  # the allocator gives freed memory out again, with version 0
        p.grad = p.grad * 1.5
        check(opt, model, 1)


def test_a_gradient_that_vanishes_and_one_that_appears(made):
    model, opt = made
    backward(model)
    model[0].weight.grad = None
    check(opt, model, 0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    check(opt, model, 1)
    opt.zero_grad()
    assert opt._gather_stats() == []


def test_a_step_uses_a_row_once(made):
    model, opt = made
    backward(model)
    opt.step()
    check(opt, model, 6)  # a step may have written the gradients


def test_unscaling_and_torchs_clip_are_seen(made):
    model, opt = made
    scaler = hs.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    backward(model)
    scaler.unscale_(opt)
    check(opt, model, 6)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    check(opt, model, 6)


def test_frozen_parameters_groups_added_later_and_sparse_gradients():
    model = net()
    model[0].weight.requires_grad_(False)
    opt = hs.optim.SGD(model.named_parameters(), lr=1e-2)
    opt.stats_in_backward()
    backward(model)
    check(opt, model, 0)
    model[0].weight.requires_grad_(True)
    backward(model)
    check(opt, model, 1)
    backward(model)
    check(opt, model, 0)
    extra = torch.nn.Parameter(torch.ones(4))
    opt.add_param_group({"params": [("extra", extra)]})
    (extra * 3).sum().backward()
    assert opt._rooms[1].backward.known.keys() == {0}
    table = torch.nn.Embedding(5, 2, sparse=True)
    sparse = hs.optim.SGD([("emb", table.weight)], lr=1.0)
    sparse.stats_in_backward()
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="'emb' has a sparse gradient"):
        sparse.step()


def test_it_can_be_turned_off_and_does_not_outlive_the_optimizer(made):
    model, opt = made
    again = pickle.loads(pickle.dumps(opt))
    assert all(room.backward is None for room in again._rooms)
    opt.stats_in_backward(False)
    backward(model)
    assert all(room.backward is None for room in opt._rooms) and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    opt.stats_in_backward()
    opt.stats_in_backward()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    del opt, made
    backward(model)  # the hooks find nobody


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_bits_with_it_as_without(accumulate):
    runs = []
    for on in (False, True):
        model = net()
        opt = hs.optim.AdamW(model.named_parameters(), lr=1e-2, max_grad_norm=0.5)
        scaler = hs.GradScaler(policy=hs.policies.Dynamic(init_scale=2.0**24, growth_interval=3))
        if on:
            opt.stats_in_backward()
        g = torch.Generator().manual_seed(0)
        skips = 0
        for step in range(20):
            opt.zero_grad()
            for _ in range(accumulate):
                with hs.autocast("cpu"):
                    loss = model(torch.randn(9, 33, generator=g)).float().square().mean() / accumulate
                scaler.scale(loss).backward()
            scaler.step(opt), scaler.update()
            skips += scaler.step_was_skipped()
        runs.append([*opt.master_params(), scaler._state.clone(), torch.tensor(scaler.stats().grad_norm), *[torch.tensor(s.norm) for s in scaler.tensor_stats().values()]])
        assert 2 < skips < 18
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(*runs))


DDP = textwrap.dedent("""
    import sys, torch, torch.distributed as dist, halfstep as hs
    from torch.nn.parallel import DistributedDataParallel
    rank, port, view = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "view"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    H = torch.ops.halfstep
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(33, 70), torch.nn.Tanh(), torch.nn.Linear(70, 5))
        opt = hs.optim.AdamW(model.named_parameters(), lr=1e-2, max_grad_norm=0.5)
        scaler = hs.GradScaler("cpu", init_scale=1024.0)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        if on:
            opt.stats_in_backward()
        g = torch.Generator().manual_seed(rank)
        for step in range(8):
            opt.zero_grad(set_to_none=step % 2 == 0)
            for micro in range(2):  # the first is not reduced
                with wrapped.no_sync() if micro == 0 else torch.enable_grad():
                    loss = wrapped(torch.randn(9, 33, generator=g)).square().mean()
                    scaler.scale(loss).backward()
            ((_, table, grads),) = opt._gather_stats()
            assert torch.equal(table.view(torch.int64), H.grad_stats(grads, []).view(torch.int64)), step
            scaler.step(opt); scaler.update()
        results.append([p.detach().clone() for p in opt.master_params()] + [scaler._state.clone()])
        other = [torch.empty_like(results[-1][0]) for _ in range(2)]
        dist.all_gather(other, results[-1][0])
        assert torch.equal(*other)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    # a collective by hand counts no version
    p = torch.nn.Parameter(torch.ones(4))
    opt = hs.optim.SGD([p], lr=0.0)
    opt.stats_in_backward()
    (p * (rank + 1)).sum().backward()
    dist.all_reduce(p.grad)
    ((_, table, _),) = opt._gather_stats()
    assert table[0, 2] == 3
    dist.destroy_process_group()
    print("the same")
""")


@pytest.mark.slow
@pytest.mark.parametrize("view", ["view", "copy"])
def test_two_processes_under_ddp_have_the_same_bits(view):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(hs.__file__)), OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", DDP, str(r), str(port), view], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for done in ranks:
        out, error = done.communicate(timeout=120)
        assert done.returncode == 0 and "the same" in out, error[-3000:]
