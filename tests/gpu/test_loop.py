"""The training loop on the GPU: no synchronisation, capture and replay, side streams, real training."""

import pytest
import torch

import halfstep as hs


def make(device, sizes=(3, 4096, 70_000), seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).half().to(device)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).half().to(device)
    opt = hs.optim.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, max_grad_norm=1.0)
    scaler = hs.GradScaler(init_scale=4.0, growth_interval=3)
    scaler.scale(torch.ones((), device=device))
    return params, opt, scaler


@pytest.mark.needs_gpu
def test_step_and_update_never_wait_for_the_device(device):
    params, opt, scaler = make(device)
    scaler.step(opt), scaler.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            scaler.step(opt)
            scaler.update()
            scaler.stats()
            for p in params:
                p.grad = p.grad.clone()  # other pointers
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert scaler.stats().steps_applied == 4


@pytest.mark.needs_gpu
def test_a_captured_step_replays_with_changed_contents(device):
    twin_params, twin, twin_scaler = make(device)
    params, opt, scaler = make(device)
    for o, s in ((twin, twin_scaler), (opt, scaler)):
        s.step(o), s.update()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        scaler.step(opt)
        scaler.update()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    for replay in range(20):
        for p, q in zip(params, twin_params):
            grad = torch.randn_like(p)
            if replay % 3 == 1:
                grad[0] = float("inf")
            p.grad.copy_(grad), q.grad.copy_(grad)
        graph.replay()
        twin_scaler.step(twin), twin_scaler.update()
        for p, q in zip(params, twin_params):
            assert torch.equal(p, q), replay
        assert float(scaler.scale_tensor) == float(twin_scaler.scale_tensor), replay


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_equals_eager_steps(device, mode):
    """20 compiled steps, or replays of the CUDA graph that inductor made of them, with found_inf toggled between them."""
    twin_params, twin, twin_scaler = make(device)
    params, opt, scaler = make(device)

    @torch.compile(fullgraph=True, mode=mode)
    def tail():
        scaler.step(opt)
        scaler.update()

    for replay in range(20):
        for p, q in zip(params, twin_params):
            grad = torch.randn_like(p)
            if replay % 3 == 1:
                grad[0] = float("inf")
            p.grad.copy_(grad), q.grad.copy_(grad)
        tail()
        twin_scaler.step(twin), twin_scaler.update()
        for p, q in zip(params, twin_params):
            assert torch.equal(p, q), replay
        assert float(scaler.scale_tensor) == float(twin_scaler.scale_tensor), replay
        assert scaler.step_was_skipped(opt) == (replay % 3 == 1)


@pytest.mark.needs_gpu
def test_on_a_side_stream(device):
    params, opt, scaler = make(device)
    twin_params, twin, twin_scaler = make(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            scaler.step(opt), scaler.update()
            torch.empty(10_000_000, device=device)  # allocator traffic
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(10):
        twin_scaler.step(twin), twin_scaler.update()
    for p, q in zip(params, twin_params):
        assert torch.equal(p, q)


def test_the_table_follows_moving_vanishing_and_retyped_gradients(device):
    params, opt, scaler = make(device)
    twin_params, twin, twin_scaler = make("cpu")
    for step in range(6):
        for i, (p, q) in enumerate(zip(params, twin_params)):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            dtype = torch.float32 if (step + i) % 3 == 0 else torch.float16
            for x in (p, q):
                x.grad = None
                x.grad_dtype = dtype
                x.grad = None if (step, i) in ((2, 0), (3, 2)) else grad.to(dtype).to(x.device)
        for o, s in ((opt, scaler), (twin, twin_scaler)):
            s.step(o), s.update()
    for p, q in zip(params, twin_params):
        difference = (p.detach().cpu().float() - q.detach().float()).abs().max()
        assert difference <= 2e-3, difference  # the clip norm is a sum: the last bits of FP64 may differ


def test_a_network_trains_as_in_fp32(device):
    def train(mixed):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(device)
        x = torch.randn(256, 32).to(device)
        y = (x[:, :4].prod(1, keepdim=True) > 0).float()
        if mixed:
            hs.cast_model(net)
        opt = (hs.optim.AdamW if mixed else torch.optim.AdamW)(net.parameters(), lr=5e-3)
        scaler = hs.GradScaler(enabled=mixed)
        for _ in range(150):
            opt.zero_grad()
            with hs.autocast(device.type, enabled=mixed):
                loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        return float(loss)

    fp32, mixed = train(False), train(True)
    assert mixed < 0.4 and abs(mixed - fp32) < 0.1, (fp32, mixed)


def test_the_first_bad_parameter_is_named(device):
    params, opt, scaler = make(device)
    params[1].grad[5] = float("nan")
    scaler.step(opt)
    assert scaler.step_was_skipped(opt)
    scaler.update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert scaler.stats().first_bad_param == "p1"


def test_tensor_stats_and_diagnosis_of_the_device(device):
    params, opt, scaler = make(device)
    norms = [float(p.grad.float().norm()) / 4 for p in params]
    scaler.step(opt), scaler.update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    stats = scaler.tensor_stats()
    assert list(stats) == ["p0", "p1", "p2"] and [t.norm for t in stats.values()] == pytest.approx(norms, rel=1e-4) and [t.count for t in stats.values()] == [3, 4096, 70_000]
    scaler = hs.GradScaler(policy=hs.policies.Dynamic(init_scale=1.0, min_scale=1.0))
    with pytest.warns(UserWarning, match="the loss itself is inf or NaN"):
        for _ in range(3):
            scaler.scale(torch.full((), float("nan"), device=device))
            params[0].grad = torch.full_like(params[0], float("inf"))
            scaler.step(opt), scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert scaler.stats().diagnosis == "loss is not finite"


def test_a_trace_is_written_without_waiting_and_replays_as_it_was(device, tmp_path):
    params, opt, scaler = make(device)
    scales = []
    with hs.record(scaler, tmp_path / "t", every=2):
        for step in range(12):
            scaler.scale(torch.ones((), device=device))
            if step in (3, 8):
                params[1].grad[7] = float("inf")
            else:
                params[1].grad = torch.ones_like(params[1])
            strict = device.type == "cuda" and step > 1  # the first rows name the tensors
            if strict:
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(opt), scaler.update()
            finally:
                if strict:
                    torch.cuda.set_sync_debug_mode("default")
            scales.append(scaler.get_scale())
    result = hs.simulate(tmp_path / "t")
    assert result.scale == [4.0, *scales[:-1]] and [i for i, bad in enumerate(result.skipped) if bad] == [3, 8] and [f is None for f in result.flushed] == [False, True] * 6


def test_statistics_in_the_backward_are_the_bits_of_the_step(device):
    runs = []
    for on in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, 8)).to(device).half()
        opt, scaler = hs.optim.AdamW(net.named_parameters(), lr=1e-2, max_grad_norm=0.1), hs.GradScaler(init_scale=256.0)
        if on:
            opt.stats_in_backward()
        for seed in range(5):
            opt.zero_grad()
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).to(device).half()
            scaler.scale(net(x).float().square().mean()).backward()
            ((room, table, grads),) = opt._gather_stats()
            assert torch.equal(table.view(torch.int64), torch.ops.halfstep.grad_stats(grads, []).view(torch.int64)) and (not on or room.backward.reread == 0)
            scaler.step(opt), scaler.update()
        runs.append(opt.master_params())
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.needs_gpu
def test_scales_of_several_losses_never_wait_for_the_device(device):
    params, first, _ = make(device)
    others, second, _ = make(device, seed=1)
    scaler = hs.GradScaler(init_scale=4.0, growth_interval=3, losses=2)
    for which in (0, 1):
        scaler.scale(torch.ones((), device=device), which)
    scaler.step(first, which=0), scaler.step(second, which=1), scaler.update()
    torch.cuda.synchronize()
    others[0].grad[0] = float("inf")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            scaler.step(first, which=0), scaler.step(second, which=1)
            scaler.update()
            scaler.stats(0), scaler.stats(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scaler.scales.tolist() == [8.0, 0.5]
    assert [scaler.stats(which).steps_skipped for which in (0, 1)] == [0, 3]
