"""hs.evaluate, hs.export and hs.bench of what lives on the device."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import _bench_cases


@pytest.fixture
def trained(device):
    torch.manual_seed(0)
    net = nn.Sequential(hs.nn.Linear(16, 32, activation="gelu"), hs.nn.LayerNorm(32), nn.Linear(32, 4)).to(device)
    hs.cast_model(net)
    opt, scaler, x = hs.optim.AdamW(net.named_parameters(), lr=1e-2), hs.GradScaler(), torch.randn(64, 16, device=device)
    for _ in range(5):
        with hs.autocast(device.type):
            loss = nn.functional.cross_entropy(net(x).float(), x[:, :4].argmax(1))
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return net, opt, x


def test_the_table(trained, device):
    net, opt, x = trained
    found = hs.evaluate(net, opt, x.split(32), (torch.float16, torch.bfloat16, torch.float32))
    assert found.deploy and 0 < found.rows["float16"].max_error < 0.05 and found.rows["float32"].max_error < 1e-2  # TF32 where the user allows it
    assert all(p.device.type == device.type for p in net.parameters())


def test_a_hidden_overflow_is_found(device):
    class Normalise(nn.Module):
        def forward(self, x):
            return x / x.square().sum(-1, keepdim=True).sqrt()

    torch.manual_seed(0)
    found = hs.evaluate(nn.Sequential(Normalise(), nn.Linear(16, 5)).to(device), None, [255 * torch.randn(40, 16, device=device)])
    assert found.rows["float16"].nonfinite == 0 and found.islands == ["0"] and "with '0' in FP32: yes" in found.verdict


def test_files_load_on_a_machine_without_the_device(trained, tmp_path):
    net, opt, x = trained
    hs.export(net, opt, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(t.device.type == "cpu" for t in state.values()) and torch.equal(state["2.weight"], hs.export_state_dict(net, opt)["2.weight"].cpu())
    report = hs.export(net, opt, tmp_path / "a.pt2", torch.float16, example=(x,))
    assert report.max_error < 0.05


def test_the_bench_measures_every_arm(device, monkeypatch):
    for size in _bench_cases.SIZES:
        monkeypatch.setitem(_bench_cases.SIZES, size, dict(parameters=4000, product=32, rows=16, batch=2))
    found = hs.bench(device.type, rounds=2)
    assert all(r["ms"] > 0 for r in found.rows if "reason" not in r) and {r["section"] for r in found.rows} == {"step", "layers", "products"}
    assert set(hs.bench(device.type, widths=[16], rounds=1).break_even) == {"mixed", "autocast"}
