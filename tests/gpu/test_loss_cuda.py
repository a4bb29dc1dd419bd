"""Cross entropy on the GPU against the CPU kernels; nothing waits; the linear layer's chunks against FP64."""

import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-16, torch.float64: 1e-12}


def problem(rows, classes, dtype):
    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=random, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=random)
    target[::7] = -100
    return logits, target, torch.rand(classes, generator=random) + 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 33, 1000, 20_483, 128_257])
def test_the_device_agrees_with_the_cpu(device, dtype, classes):
    logits, target, weight = problem(16, classes, dtype)
    for reduction, smoothing, z, w in (("mean", 0.0, 0.0, None), ("none", 0.1, 1e-3, weight), ("sum", 0.0, 0.0, weight)):
        for scale in (None, torch.tensor(512.0)):
            up = torch.full((16,), 512.0) if reduction == "none" else torch.tensor(512.0)
            results = []
            for place in ("cpu", device):
                leaf = logits.to(place, copy=True).requires_grad_()
                loss = hs.functional.cross_entropy(leaf, target.to(place), None if w is None else w.to(place), reduction=reduction, label_smoothing=smoothing, z_loss=z,
                                                   grad_scale=None if scale is None else scale.to(place))
                loss.backward(up.to(place, loss.dtype))
                results.append((loss.detach().cpu().double(), leaf.grad.cpu().double()))
            (loss, grad), (loss_there, grad_there) = results
            torch.testing.assert_close(loss_there, loss, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(grad_there, grad, rtol=STEP[dtype], atol=1e-4 * STEP[dtype] * 512)


@pytest.mark.needs_gpu
def test_a_label_out_of_range_is_nan_and_found_by_the_scaler(device):
    logits = torch.randn(4, 10, device=device).half().requires_grad_()
    loss = hs.functional.cross_entropy(logits, torch.tensor([0, 10, -1, 9], device=device), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    loss.backward(torch.ones(4, device=device))
    assert logits.grad.isnan().all(1).tolist() == [False, True, True, False]
    assert H.grad_stats([logits.grad], [])[-1, 7] == 1


@pytest.mark.needs_gpu
def test_nothing_waits_and_two_runs_agree(device):
    logits, target, weight = (t.to(device) for t in problem(64, 5000, torch.float16))
    scale, x, head = torch.tensor(1024.0, device=device), torch.randn(64, 32, device=device).half(), torch.randn(5000, 32, device=device).half()

    def step():
        grads = []
        for hint in (None, scale):
            leaf, leaf_x, leaf_head = logits.clone().requires_grad_(), x.clone().requires_grad_(), head.clone().requires_grad_()
            loss = hs.functional.cross_entropy(leaf, target, weight, label_smoothing=0.1, grad_scale=hint)
            (loss + hs.functional.linear_cross_entropy(leaf_x, leaf_head, target, grad_scale=hint)).backward(scale)
            grads += [leaf.grad, leaf_x.grad, leaf_head.grad]
        return grads

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_against_fp64(device, dtype, reduction):
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=random, dtype=torch.float64).to(dtype) for s in ((5000, 32), (700, 32), (700,)))
    target, classes = torch.randint(0, 700, (5000,), generator=random), torch.rand(700, generator=random) * 8 + 0.5
    results = []
    for wide in (True, False):
        given = [t.to(torch.float64, copy=True).requires_grad_() if wide else t.to(device, copy=True).requires_grad_() for t in (x, w, b)]
        place = "cpu" if wide else device
        loss = hs.functional.linear_cross_entropy(given[0], given[1], target.to(place), given[2], classes.to(place), reduction=reduction)
        loss.backward(torch.full_like(loss, 1024.0 if reduction == "mean" else 1.0))
        results.append([loss.detach().cpu().double()] + [t.grad.cpu().double() for t in given])
    for exact, got in zip(*results):
        assert ((got - exact).norm() / exact.norm()).item() <= {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def test_32768_rows_of_fp16_keep_their_gradients(device):
    x, w = torch.randn(32768, 64, device=device).half().requires_grad_(), torch.randn(512, 64, device=device).half().requires_grad_()
    target = torch.randint(0, 512, (32768,), device=device)
    hs.functional.linear_cross_entropy(x, w, target).backward(torch.tensor(65536.0, device=device))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target).backward(torch.tensor(65536.0, dtype=torch.float64, device=device))
    for a, b in zip((x, w), wide):
        assert torch.nn.functional.cosine_similarity(a.grad.double().flatten(), b.grad.flatten(), dim=0) >= 0.9999


@pytest.mark.needs_gpu
def test_rows_beyond_2_to_the_32_logits(device):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB")
    rows = 2**32 // 65536 + 2
    logits = torch.zeros(rows, 65536, dtype=torch.float16, device=device)
    logits[-1, 5] = 4.0
    target = torch.full((rows,), 5, device=device)
    loss, stats, total, grad = H.cross_entropy_forward(logits, target, None, -100, "none", 0.0, 0.0, torch.tensor(1024.0, device=device))
    want = hs.functional.cross_entropy(logits[-1:].cpu(), target[-1:].cpu(), reduction="none")
    assert abs(loss[-1].item() - want.item()) < 1e-5 and grad[-1, 5] < grad[-2, 5] + 20 and grad[-1, 4] != grad[-2, 4]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_of_ignored_labels_has_no_gradient(device, reduction):
    x, w = torch.randn(4, 8, device=device).half().requires_grad_(), torch.randn(16, 8, device=device).half().requires_grad_()
    loss = hs.functional.linear_cross_entropy(x, w, torch.full((4,), -100, device=device), reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    loss.backward(torch.ones_like(loss))
    assert not x.grad.any() and not w.grad.any() and x.grad.isfinite().all() and w.grad.isfinite().all()


def test_a_large_z_loss_leaves_the_gradient_finite(device):
    results = []
    for dtype, place in ((torch.float16, device), (torch.float64, "cpu")):
        x, w = (torch.full((4, 100), 0.65, dtype=torch.float16).to(place, dtype).requires_grad_() for _ in range(2))
        hs.functional.linear_cross_entropy(x, w, torch.arange(4, device=place), z_loss=1.0).backward()
        results.append([x.grad.double().cpu(), w.grad.double().cpu()])
    for got, exact in zip(*results):
        assert got.isfinite().all() and ((got - exact).norm() / exact.norm()).item() < 2e-3
