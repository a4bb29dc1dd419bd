"""The CPU kernels give the same bits on every instruction set and for every number of threads."""

import hashlib
import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import hashlib, numpy, sys, torch, halfstep
H = torch.ops.halfstep
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
def add(*tensors):
    for t in tensors:
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"-")
rng = numpy.random.default_rng(0)  # torch.randn itself differs between instruction sets
random = lambda n, s=1.0: torch.from_numpy((rng.standard_normal(n) * s).astype(numpy.float32))
for n in (1, 15, 16, 17, 4095, 4097, 300_001):
    for scale in (1e-8, 1e-5, 1.0, 3e4):
        grads = [random(n, scale).to(d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
        add(H.grad_stats(grads, []), H.grad_histogram(grads, torch.tensor(3.7)), H.grad_histogram(grads, torch.tensor(1024.0)))
        found = torch.zeros(())
        for x in grads:
            y = x.clone(); H.unscale_([y], torch.tensor(1 / 3), found, []); add(y)
        add(found)
modes = [(torch.float16, None), (torch.float16, torch.int16), (torch.float16, torch.float32), (torch.float16, torch.float64),
         (torch.bfloat16, torch.int16), (torch.bfloat16, torch.float32), (torch.float32, None), (torch.float64, None)]
for dtype, kind in modes:
    n = 70_003
    value = random(n, 0.05); value[:100] *= 1e-6; value[100] = 65000.0
    p = torch.zeros(n, dtype=dtype); m = torch.zeros(n if kind else 0, dtype=kind or torch.float32)
    c = torch.float64 if torch.float64 in (dtype, kind) else torch.float32
    o = torch.zeros(1, dtype=torch.int64); s = torch.zeros(1, dtype=torch.int64); lr = torch.tensor(1e-2, dtype=torch.float64)
    H.write_masters_([value], [p], [m], o)
    a, v, x, b = (torch.zeros(n, dtype=c) for _ in range(4))
    for step in range(5):
        grad = random(n, 10.0 ** -step).to(dtype)
        control = H.step_control([H.grad_stats([grad], [])], torch.tensor(8.0), None, None, 1.0)
        H.adamw_step_([p], [grad], [m], [a], [v], [x], s, o, lr, control, [], beta1=.9, beta2=.999, eps=1e-8, weight_decay=.01, amsgrad=True, maximize=False)
        H.adam_step_([p], [grad], [m], [a], [v], [], s, o, lr, control, [], beta1=.9, beta2=.999, eps=1e-8, weight_decay=.01, amsgrad=False, maximize=True)
        H.sgd_step_([p], [grad], [m], [b], s, o, lr, control, [], momentum=.9, dampening=.1, weight_decay=.01, nesterov=False, maximize=False)
        add(p, m, a, v, x, b, o, s)
    add(*H.read_masters([p], [m]))
    q = p + 1; H.refresh_masters_([q], [m], o, False); add(m, o)
print(digest.hexdigest())
"""


def run(capability, threads):
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_bit_equal_across_instruction_sets_and_threads():
    # An instruction set that this CPU lacks falls back to a narrower one, so the test never skips.
    reference = run("default", 1)
    assert len(reference) == len(hashlib.sha256().hexdigest())
    for capability, threads in (("avx2", 1), ("avx512", 1), ("avx512", 2)):
        assert run(capability, threads) == reference, f"{capability} with {threads} threads differs"
