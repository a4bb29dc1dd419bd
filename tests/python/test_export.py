"""hs.evaluate and hs.export: the table against an FP64 model made by hand, and files that other programs read and run."""

import importlib.util
import json
import os
import subprocess
import sys

import docs
import pytest
import torch
from torch import nn

import halfstep as hs

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers of torch and of halfstep; `head` is tied to nothing, norms stay FP32."""

    def __init__(self):
        super().__init__()
        self.fc = hs.nn.Linear(16, 32, activation="gelu")
        self.norm = hs.nn.LayerNorm(32)
        self.gate = hs.nn.SwiGLU(count_overflow=True)  # a count of the training, which no file has
        self.batch = nn.BatchNorm1d(16)
        self.softmax = hs.nn.Softmax(-1, causal=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y, residual = self.norm(self.fc(x), self.fc(x))
        y = self.batch(self.gate(y)) + 0 * residual[..., :16].to(y.dtype)
        return self.head(y + self.softmax(y @ y.transpose(-1, -2)) @ y)


def trained(cast=True, steps=5, **kw):
    torch.manual_seed(0)
    net = Net()
    if cast:
        hs.cast_model(net)
    opt, scaler = hs.optim.AdamW(net.named_parameters(), lr=1e-2, **kw), hs.GradScaler("cpu", init_scale=1024.0)
    for _ in range(steps):
        with hs.autocast("cpu"):
            loss = nn.functional.cross_entropy(net(X).float(), X[:, :5].argmax(1))
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return net, opt


@pytest.fixture(scope="module")
def net_and_opt():
    return trained()


def by_hand(net, opt, dtype=torch.float64):
    """The FP64 model, without deployable(): a fresh net that gets the exact weights."""
    fresh = Net().to(dtype).eval()
    fresh.load_state_dict(hs.export_state_dict(net, opt, dtype))
    return fresh


def bits(net):
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


# -- evaluate --------------------------------------------------------------------------------------
def test_the_table_is_the_differences_from_fp64(net_and_opt):
    net, opt = net_and_opt
    before, target = bits(net), X[:, :5].argmax(1)
    batches = [(X[:24], target[:24]), (X[24:], target[24:])]
    found = hs.evaluate(net, opt, batches, (torch.float16, torch.bfloat16, torch.float32), loss=lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1]),
                        evaluate=lambda m: {"accuracy": (m(X[:24]).argmax(1) == target[:24]).double().mean()})
    with torch.no_grad():
        parts = [by_hand(net, opt)(x.double()) for x, _ in batches]
        exact, narrow = torch.cat(parts), torch.cat([by_hand(net, opt, torch.float32)(x) for x, _ in batches]).double()
    row = found.rows["float32"]
    assert row.max_error == pytest.approx(float((narrow - exact).abs().max()), rel=0.2) and 0 < row.max_error < 1e-5
    assert row.mean_error == pytest.approx(float((narrow - exact).abs().mean()), rel=0.2)
    assert row.relative_error == pytest.approx(row.mean_error / float(exact.square().mean().sqrt()), rel=1e-6)
    assert row.loss == pytest.approx(float(nn.functional.cross_entropy(exact, target)), rel=1e-5)
    assert row.metrics["accuracy"] == float((parts[0].argmax(1) == target[:24]).double().mean())
    assert list(found.rows) == ["float16", "bfloat16", "float32"] and row.results == exact.numel() == 200 and row.items == 40
    half = found.rows["float16"]
    assert 10 * row.max_error < half.max_error < 0.05 and half.max_error < found.rows["bfloat16"].max_error < 0.5
    assert found.deploy and found.verdict.startswith("deploy in FP16: yes, because all 200 results are finite") and found.islands == ["norm", "batch"]
    assert all(torch.equal(a, b) for a, b in zip(before, bits(net))) and net.training
    assert found.weights["fc.weight"].count == 512 and found.layers["head"].amax == pytest.approx(float(exact.abs().max()), rel=1e-12)
    data = json.loads(found.to_json())
    assert data["rows"]["float16"]["flips"] == half.flips and data["deploy"] is True
    assert "least headroom" in str(found) and "float16" in str(found).splitlines()[1]


def test_classes_that_change_are_counted_with_their_distance_in_fp64():
    """Two classes 2^-13 apart: FP16 makes them equal and takes the first."""
    net = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [1.0 + 2**-13]]))
    found = hs.evaluate(net, None, [torch.ones(8, 1)])
    row = found.rows["float16"]
    assert (row.flips, row.items, row.widest_flip) == (8, 8, 2**-13) and not found.deploy
    assert "8 of 8 items have another class than in FP64, by at most 0.00012 in its logits (allowed: 0.50%)" in found.verdict
    assert found.rows["float32"].flips == 0
    assert hs.evaluate(net, None, [torch.ones(8, 1)], class_dim=None).deploy  # as numbers they are near enough


def test_without_classes_the_error_decides():
    net = nn.Linear(4, 1)
    found = hs.evaluate(net, None, [torch.ones(3, 4)], torch.float16)
    assert found.deploy and "root mean square (allowed: 0.01)" in found.verdict and found.rows["float16"].items == 0
    assert not hs.evaluate(net, None, [torch.ones(3, 4)], max_error=0.0).deploy
    assert "other class" not in str(found) and "loss" not in str(found)
    torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
    assert hs.evaluate(net, None, [torch.ones(3, 4)]).rows["float16"].relative_error == 0.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.inner(x))


def test_the_planted_layer_that_overflows_is_found_with_what_brings_it_back_into_range():
    """inner.0 gives 1e6: FP32 for it alone would be inf on the way out, so the smallest module whose result fits is the one."""
    torch.manual_seed(0)
    net = Block()
    with torch.no_grad():
        net.inner[0].weight.mul_(6e4)
    found = hs.evaluate(net, None, [X])
    assert not found.deploy and found.rows["float16"].nonfinite > 0 and found.islands == ["inner"]
    assert "results are inf or NaN that are finite in FP64; with 'inner' in FP32: yes" in found.verdict
    helped = found.rows["float16 with FP32 islands"]
    assert helped.nonfinite == 0 and helped.max_error < 0.01
    assert hs.evaluate(net, None, [X], keep_fp32=found.islands).deploy


def test_an_overflow_inside_a_module_makes_that_module_the_island():
    class Square(nn.Module):
        def forward(self, x):
            return (x * 1000).square().mean(-1, keepdim=True).sqrt() / 1000 + x  # the square does not fit, the result does

    found = hs.evaluate(nn.Sequential(nn.Linear(16, 16), Square(), nn.Linear(16, 3)), None, [X])
    assert found.islands == ["1"] and not found.deploy and found.rows["float16 with FP32 islands"].nonfinite == 0


def test_an_overflow_that_a_later_step_hides_is_found():
    """x / inf is 0: every result is finite, and wrong."""
    class Normalise(nn.Module):
        def forward(self, x):
            return x / x.square().sum(-1, keepdim=True).sqrt()

    torch.manual_seed(0)
    found = hs.evaluate(nn.Sequential(Normalise(), nn.Linear(16, 5)), None, [X, X * 255])
    assert found.rows["float16"].nonfinite == 0 and found.rows["float16"].flips > 10 and found.islands == ["0"] and "with '0' in FP32: yes" in found.verdict


def test_where_no_module_is_to_blame_it_says_so():
    net = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [1.0 + 2**-13]]))
    assert hs.evaluate(net, None, [torch.ones(8, 1)]).verdict.endswith("(allowed: 0.50%); no module alone is off by 5%")


def test_a_weight_that_does_not_fit_is_named_and_its_module_kept():
    net = Block()
    with torch.no_grad():
        net.inner[0].weight[0, 0] = 7e4
    found = hs.evaluate(net, None, [X / 100])
    assert found.rows["float16"].reason.startswith("'inner.0.weight' does not fit torch.float16") and found.islands == ["inner.1", "inner.0"]
    assert "with 'inner.0' in FP32: yes" in found.verdict and found.rows["float16"].max_error is None


def test_where_nothing_helps_it_says_so():
    net = Block()
    with torch.no_grad():
        net.head.weight.mul_(1e7)
    found = hs.evaluate(net, None, [X])
    assert not found.deploy and found.islands is None and found.verdict.endswith("no set of modules in FP32 helps")


@pytest.mark.parametrize("call, kind, message", [
    (lambda net: hs.evaluate(net, None, [X], (torch.int8,)), ValueError, "dtypes holds torch.int8"), (lambda net: hs.evaluate(net, None, []), ValueError, "batches is empty"),
    (lambda net: hs.evaluate(net, None, [X], max_flips=2), ValueError, "max_flips is 2"), (lambda net: hs.evaluate(net, None, [X], predict=lambda m, b: None), TypeError, "gives NoneType"),
    (lambda net: hs.evaluate(net, None, [X], weights="best"), ValueError, "evaluate: weights is 'best'"), (lambda net: hs.evaluate(net, torch.optim.SGD(net.parameters()), [X]), TypeError, "SGD is not a halfstep optimizer"),
    (lambda net: hs.evaluate(net, None, X), TypeError, r"batches is one Tensor; .* x.split\(128\)"), (lambda net: hs.evaluate(net, None, [X], class_dim=4), ValueError, r"class_dim is 4, but the results are \[40, 5\]"),
    (lambda net: hs.evaluate(net, None, [X[:, :3]]), RuntimeError, "does not run in float64, with which the others are compared: "),
    (lambda net: hs.evaluate(net, None, [X], keep_fp32=["nope"]), ValueError, "keep_fp32 has 'nope'")])
def test_bad_arguments_of_evaluate(call, kind, message):
    with pytest.raises(kind, match=message):
        call(Net())


# -- export: weights -------------------------------------------------------------------------------
def read(path):
    if str(path).endswith(".safetensors"):
        return pytest.importorskip("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


def needs(*modules):
    for module in modules:
        pytest.importorskip(module)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_weights_go_to_a_file_and_back(net_and_opt, ending, dtype, tmp_path):
    if ending == "safetensors":
        needs("safetensors")
    net, opt = net_and_opt
    path = tmp_path / f"net.{ending}"
    report = hs.export(net, opt, path, dtype)
    state = read(path)
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert report.tensors == {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} and report.format == ("torch" if ending == "pt" else ending)
    kept = ("norm.", "batch.") if dtype == torch.float16 else ()
    floats = {k: v for k, v in state.items() if v.is_floating_point()}
    assert all(v.dtype == (torch.float32 if k.startswith(kept) else dtype) for k, v in floats.items()) and state["batch.num_batches_tracked"].dtype == torch.int64
    assert report.islands == ({"norm": ["weight", "bias"], "batch": ["weight", "bias"]} if kept else {})
    weight_bytes = sum(v.numel() * v.element_size() for v in state.values())
    assert report.bytes == path.stat().st_size and weight_bytes < report.bytes < weight_bytes + 6000
    fresh = Net().eval()
    if dtype == torch.float16:
        assert torch.equal(state["fc.weight"], net.fc.weight)  # the very weights that were trained
        hs.cast_model(fresh, cast_inputs=True)
    fresh = fresh.double() if dtype == torch.float64 else fresh
    fresh.load_state_dict(state)
    with torch.no_grad():
        error = float((fresh(X.to(dtype)).double() - by_hand(net, opt)(X.double())).abs().max())
    assert error <= {torch.float64: 0.0, torch.float32: 1e-5, torch.float16: 0.05}[dtype]


def test_tied_weights_have_every_name_and_the_running_mean_can_be_written(tmp_path):
    needs("safetensors")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    hs.cast_model(net)
    opt = hs.optim.SGD(net.named_parameters(), lr=0.5, ema_decay=0.5)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    hs.export(net, opt, tmp_path / "a.safetensors")
    state = read(tmp_path / "a.safetensors")
    assert torch.equal(state["0.weight"], state["1.weight"]) and torch.equal(state["0.weight"], opt.master_params()[0])
    hs.export(net, opt, tmp_path / "b.pt", weights="ema")
    assert torch.equal(read(tmp_path / "b.pt")["0.weight"], opt.ema_params()[0]) and not torch.equal(opt.ema_params()[0], opt.master_params()[0])
    hs.export(net, opt, tmp_path / "c.pt", torch.float16, weights="ema")
    assert torch.equal(read(tmp_path / "c.pt")["0.weight"], opt.ema_params()[0].half())


def test_files_appear_whole_with_the_rights_of_any_new_file_or_not_at_all(tmp_path):
    from halfstep._file import staged

    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), staged(path) as name:
        open(name, "w").write("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with staged(path) as name:
        for part, text in ((name + ".data", "beside"), (name, "new")):
            os.close(os.open(part, os.O_CREAT, 0o600))
            open(part, "w").write(text)
        assert path.read_text() == "old"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.read_text() == "new" and (tmp_path / "a.data").read_text() == "beside" and path.stat().st_mode == plain.stat().st_mode


def test_bf16_weights_are_the_trained_ones_on_ties_too(tmp_path):
    net = nn.Linear(1, 1, bias=False)
    hs.cast_model(net, torch.bfloat16)
    opt = hs.optim.SGD(net.parameters(), lr=0.0)
    opt.set_master_params([torch.tensor([[1 + 2**-8]])])  # split16 rounds half away from zero
    hs.export(net, opt, tmp_path / "a.pt", torch.bfloat16)
    assert read(tmp_path / "a.pt")["weight"].item() == net.weight.item() == 1 + 2**-7


@pytest.mark.parametrize("call, kind, message", [
    (lambda net, p: hs.export(net, None, p / "a.h5"), ValueError, "names no format; expected one of .safetensors"), (lambda net, p: hs.export(net, None, p / "a.pt", format="tf"), ValueError, "format is 'tf'"),
    (lambda net, p: hs.export(net, None, p / "a.pt", torch.int8), ValueError, "dtype is torch.int8"), (lambda net, p: hs.export(net, None, p / "a.onnx"), ValueError, r"onnx traces the model .* example=\(x,\)"),
    (lambda net, p: hs.export(net, None, p / "a.pt", example=(X,)), ValueError, "example is given, but a file of torch holds weights only"),
    (lambda net, p: hs.export(net, None, p / "no" / "a.pt"), FileNotFoundError, "there is no folder"),
    (lambda net, p: hs.export(net, None, p / "a.pt", keep_fp32=["head"]), ValueError, r"keep_fp32 is \['head'\], but dtype is torch.float32"),
    (lambda net, p: hs.export(net, None, p / "a.pt", torch.float16, keep_fp32="nope*"), ValueError, "keep_fp32 has 'nope"),
    (lambda net, p: hs.export(net, None, p / "a.pt2", example=(X[:, :3],)), Exception, "shape|size|must match|3")])
def test_bad_arguments_of_export_leave_no_file(call, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        call(Net(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_does_not_fit_is_refused_by_name_and_the_old_file_stays(tmp_path):
    net, path = nn.Linear(2, 2), tmp_path / "a.pt"
    hs.export(net, None, path)
    before = path.read_bytes()
    with torch.no_grad():
        net.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="'weight' does not fit torch.float16"):
        hs.export(net, None, path, torch.float16)
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_buffer("table", torch.tensor([1e6, -torch.inf]))
    with pytest.raises(ValueError, match="'0.table' does not fit torch.float16"):
        hs.export(net, None, path, torch.float16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format, missing", [("safetensors", "safetensors.torch"), ("onnx", "onnx"), ("onnx", "onnxscript")])
def test_a_package_that_is_missing_is_named_with_its_pip_line(format, missing, tmp_path, monkeypatch):
    for module in ("safetensors.torch", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, type(sys)(module))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing.split('.')[0]} is needed .*; pip install 'halfstep\[export\]' or {missing.split('.')[0]}$"):
        hs.export(nn.Linear(1, 1), None, tmp_path / "a", format=format, example=(torch.ones(1, 1),) if format == "onnx" else None)
    assert list(tmp_path.iterdir()) == []


# -- export: programs ------------------------------------------------------------------------------
def test_a_program_runs_where_halfstep_is_not(net_and_opt, tmp_path):
    """torch.export and ONNX, FP32 and FP16, in a process that cannot import halfstep: logits within tolerance of FP64, any number of rows."""
    net, opt = net_and_opt
    exact, paths = by_hand(net, opt)(X.double()), {}
    endings = ["pt2", *(["onnx"] if all(_has(m) for m in ("onnx", "onnxscript", "onnxruntime")) else [])]
    for ending in endings:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 0.05)):
            path = str(tmp_path / f"net-{str(dtype)[6:]}.{ending}")
            report = hs.export(net, opt, path, dtype, example=(X[:7],), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=4096)},))
            assert report.max_error is not None and report.max_error < tolerance and report.note is None, report
            assert {k: v[1] for k, v in report.tensors.items()} == {k: tuple(v.shape) for k, v in net.state_dict().items() if k in report.tensors} and "head.weight" in report.tensors
            assert report.bytes == os.path.getsize(path)
            paths[path] = tolerance
            if dtype == torch.float16:  # what is FP32 in it, op by op: the islands, and what halfstep's layers compute in FP32 inside
                assert set(report.islands) >= {"norm", "batch"} and any("layer_norm" in op for op in report.islands["norm"])
                assert set(report.islands) <= {"", "norm", "batch", "fc", "gate", "softmax"} and not any("linear" in op for ops in report.islands.values() for op in ops)
    names = [name for name, _ in net.named_parameters()]
    torch.save({"x": X, "exact": exact.detach(), "paths": paths, "names": names}, tmp_path / "task.pt")
    code = """
import sys, torch
assert not any(m.startswith("halfstep") for m in sys.modules)
task = torch.load(sys.argv[1], weights_only=True)
for path, tolerance in task["paths"].items():
    if path.endswith("pt2"):
        y = torch.export.load(path).module()(task["x"])
    else:
        import onnx, onnxruntime
        made = onnx.load(path)
        onnx.checker.check_model(made, full_check=True)
        assert {node.domain for node in made.graph.node} <= {"", "ai.onnx"} and set(task["names"]) <= {i.name for i in made.graph.initializer}
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: task["x"].numpy()})[0])
    error = (y.double() - task["exact"]).abs().max().item()
    assert error < tolerance, (path, error)
print("ran", len(task["paths"]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not os.path.isdir(os.path.join(p, "halfstep")))}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "task.pt"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ran {len(paths)}" in done.stdout and [p for p in os.listdir(tmp_path) if ".tmp." in p] == []


@pytest.mark.slow
def test_a_language_model_of_halfsteps_layers_runs_for_any_batch_and_length(tmp_path):
    """The GPT of examples/python: rope, norms with a residual, gated and tied weights."""
    spec = importlib.util.spec_from_file_location("train_gpt", docs.DOCS.parent / "examples/python/train_gpt.py")
    gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpt)

    class LM(gpt.GPT):
        def forward(self, tokens):
            x = self.embedding(tokens)
            residual = torch.zeros_like(x)
            for block in self.blocks:
                x, residual = block(x, residual)
            return self.loss.logits(self.norm(x, residual)[0])

    torch.manual_seed(0)
    model, tokens, dim = LM(103, layers=2), torch.randint(0, 103, (3, 40)), torch.export.Dim
    hs.cast_model(model)
    opt = hs.optim.AdamW(model.named_parameters())
    assert hs.evaluate(model, opt, [tokens]).deploy
    with hs.evaluate_in(model, opt, torch.float64):
        other = torch.randint(0, 103, (5, 17))
        exact = model(other)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 0.01)):
        hs.export(model, opt, tmp_path / "lm.pt2", dtype, example=(tokens,), dynamic_shapes=({0: dim("batch"), 1: dim("time", max=128)},))
        with torch.no_grad():
            found = torch.export.load(tmp_path / "lm.pt2").module()(other)
        assert found.dtype == dtype and float((found - exact).abs().max()) < tolerance


def _has(module):
    try:
        return __import__(module) is not None
    except ImportError:
        return False


def test_a_large_model_has_its_weights_beside_the_onnx_file(tmp_path, monkeypatch):
    needs("onnx", "onnxscript", "onnxruntime")
    from halfstep import _export

    monkeypatch.setattr(_export, "ONE_FILE", 1000)
    net = nn.Linear(64, 32)
    report = hs.export(net, None, tmp_path / "a.onnx", example=(torch.ones(2, 64),))
    assert os.path.dirname(torch.__file__).encode() not in (tmp_path / "a.onnx").read_bytes()  # no paths of this machine
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.data"] and report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir()) and report.max_error < 1e-5


def test_what_the_runtime_cannot_run_is_written_and_said(net_and_opt, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    net, opt = nn.Sequential(nn.Conv1d(2, 2, 1)), None
    report = hs.export(net, opt, tmp_path / "a.onnx", torch.float64, example=(torch.ones(1, 2, 3),))
    assert (report.max_error is None) == (report.note is not None) and (tmp_path / "a.onnx").exists()


def test_a_program_is_traced_with_keyword_arguments_and_one_without_fp64_is_written_all_the_same(tmp_path):
    class Two(nn.Module):
        def forward(self, x, *, shift=None):
            if x.dtype == torch.float64:
                raise RuntimeError("not implemented for 'Double'")
            return x if shift is None else x + shift

    report = hs.export(Two(), None, tmp_path / "a.pt2", example=((torch.ones(2),), {"shift": torch.ones(2)}))
    assert torch.export.load(tmp_path / "a.pt2").module()(torch.ones(2), shift=torch.ones(2)).tolist() == [2.0, 2.0]
    assert report.max_error is None and report.note == "nothing to compare with, since the model does not run in float64: not implemented for 'Double'" and report.note in str(report)
    hs.export(nn.Linear(2, 1), None, tmp_path / "b.pt2", example=torch.ones(3, 2))  # one tensor is one input


def test_a_model_that_writes_into_its_arguments_is_refused_by_the_op(tmp_path):
    class Rope(nn.Module):
        def forward(self, x):
            y = x.clone()
            torch.ops.halfstep.rope_(y, torch.ones(2, 2), torch.ones(2, 2), False, False)
            return y

    with pytest.raises(ValueError, match=r"calls halfstep\.rope_"):
        hs.export(Rope(), None, tmp_path / "a.pt2", example=(torch.ones(1, 2, 4),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_page_runs():
    """docs/export.md, block by block; where a block of text follows, it is what was printed."""
    outputs = [(expected, printed) for _, expected, printed, _ in docs.run("export.md")]
    assert all(expected is None or expected == printed for expected, printed in outputs), outputs
    assert sum(expected is not None for expected, _ in outputs) == 2 and "deploy in FP16: yes" in outputs[0][1]
