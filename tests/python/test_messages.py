"""docs/troubleshooting.md, both ways: every message that is provoked here is in its tables, every line of them is provoked."""

import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import halfstep as hs
from halfstep import _library

pytestmark = pytest.mark.smoke
DOCS = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
ROWS = [re.match(r"\| `(.*?)` \| (.+?) \| (.+) \|$", line).groups() for line in DOCS.read_text().splitlines() if line.startswith("| `")]


def pattern(message):
    return ".*?".join(map(re.escape, message.split("…")))


def P(*values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values or (1.0, 1.0), dtype=dtype))


def half(*values):
    return P(*values, dtype=torch.float16)


def ready(cls=hs.GradScaler):
    scaler = cls("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    return scaler


def given(p, *values):
    p.grad = torch.tensor(values, dtype=p.dtype)
    return p


def cast_without_autocast():
    model = torch.nn.Linear(2, 2)
    hs.cast_model(model)
    model(torch.ones(1, 2))


def too_large():
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1e6)
    hs.cast_model(model)


def overflow():
    p = given(half(65000.0, 1.0), -1.0, 0.0)
    hs.optim.SGD([("fc.weight", p)], lr=1000.0).step()


def two_losses(unscale):
    p = P()
    opt, scaler = hs.optim.SGD([p], lr=1.0), hs.GradScaler(losses=2)
    for which in (0, 1):
        scaler.scale(p.sum(), which).backward()
        if unscale:
            scaler.unscale_(opt, which)
    scaler.step(opt, which=1)
    scaler.update()


def cast_late():
    model = torch.nn.Linear(2, 2)
    opt = hs.optim.SGD(model.parameters(), lr=0.1)
    hs.cast_model(model)
    return opt


def edited():
    p = half()
    opt = hs.optim.SGD([("w", p)], lr=0.1)
    with torch.no_grad():
        p.mul_(2)
    given(p, 1.0, 1.0)
    opt.step()


def converted():
    model = torch.nn.Linear(2, 2).half()
    opt = hs.optim.SGD(model.named_parameters(), lr=0.1)
    model.float()
    opt.step()


def twice(p):
    return hs.optim.SGD([{"params": [("a", p)]}, {"params": [("b", p)]}], lr=0.1)


def all_zero():
    p, scaler = half(), ready()
    opt = hs.optim.SGD([p], lr=0.1)
    for _ in range(2):
        given(p, 0.0, 0.0)
        scaler.step(opt), scaler.update()


def flushed():
    p, scaler = half(), hs.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    given(p, 2.0**-14, 1.0)
    scaler.step(torch.optim.SGD([p], lr=0.1)), scaler.update()


def sparse():
    p = P()
    p.grad = torch.ones(2).to_sparse()
    hs.optim.SGD([("table", p)], lr=0.1).step()


def stepped_twice():
    p, scaler = given(P(), 1.0, 1.0), ready()
    opt = hs.optim.SGD([p], lr=0.1)
    scaler.step(opt), scaler.step(opt)


def unscaled_twice():
    p, scaler = given(P(), 1.0, 1.0), ready()
    opt = hs.optim.SGD([p], lr=0.1)
    scaler.unscale_(opt), scaler.unscale_(opt)


def unscaled_closure():
    p, scaler = given(P(), 1.0, 1.0), ready()
    opt = hs.optim.SGD([p], lr=0.1)
    scaler.unscale_(opt), scaler.step(opt, lambda: None)


def captured(change, lr):
    def provoke(monkeypatch):
        p = given(half(), 1.0, 1.0)
        opt = hs.optim.SGD([("w", p)], lr=lr)
        opt.step()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        change(p, opt)
        opt.step()
    return provoke


def unfrozen_in_a_graph(monkeypatch):
    p = half().requires_grad_(False)
    opt = hs.optim.SGD([("w", p)], lr=0.1)
    given(p.requires_grad_(), 1.0, 1.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    opt.step()


def captured_after_compiled_steps(monkeypatch):
    p = given(half(), 1.0, 1.0)
    opt = hs.optim.SGD([("w", p)], lr=torch.tensor(0.1))
    torch.compile(lambda: opt.step(), backend="aot_eager", fullgraph=True)()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    opt.step()


def other_weights():
    state = hs.optim.SGD([("w", half())], lr=0.1).state_dict()
    hs.optim.SGD([("w", half(3.0, 4.0))], lr=0.1).load_state_dict(state)


def no_masters():
    p = half()
    saved = hs.optim.SGD([("w", p)], master="stochastic").state_dict()
    hs.optim.SGD([("w", p)]).load_state_dict(saved)


def other_names():
    saved = hs.optim.SGD([("a", P()), ("b", P())]).state_dict()
    hs.optim.SGD([("b", P()), ("x", P())]).load_state_dict(saved)


def no_max_lr():
    hs.optim.AdamW([P()], lr=0.0, decouple_lr=True)


def to_torch_in_half():
    p = given(half(), 1.0, 1.0)
    opt = hs.optim.AdamW([("w", p)])
    opt.step()
    hs.optim.to_torch(opt)


def missing_library(monkeypatch):
    monkeypatch.setattr(_library, "PACKAGE", Path("/nowhere"))
    _library._load()


def other_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    _library._load()


def broken_file():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.pt").write_bytes(b"not a checkpoint")
        hs.load(Path(folder) / "run.pt")


PROVOKE = {
    "cast without autocast": cast_without_autocast,
    "too large at the cast": too_large,
    "too large for set_master_params": lambda: hs.optim.SGD([("w", half())], lr=0.1).set_master_params([torch.full((2,), 1e6)]),
    "non-finite at construction": lambda: hs.optim.SGD([("w", half(1.0, torch.inf))], lr=0.1),
    "non-finite BF16": lambda: hs.optim.SGD([("w", P(1.0, torch.inf, dtype=torch.bfloat16))], lr=0.1),
    "overflow in the step": overflow,
    "cast after the optimizer": cast_late,
    "keep_fp32 with a slip": lambda: hs.cast_model(torch.nn.Sequential(torch.nn.Linear(1, 1)), keep_fp32=["hed"]),
    "edited weights": edited,
    "converted after the optimizer": converted,
    "sliced parameter": lambda: hs.optim.SGD([("w", torch.nn.Parameter(torch.ones(4)[::2]))], lr=0.1),
    "two devices in a group": lambda: hs.optim.SGD([("a", P()), ("b", torch.nn.Parameter(torch.ones(1, device="meta")))], lr=0.1),
    "two groups": lambda: twice(P()),
    "state dict of another model": lambda: hs.load_state_dict(torch.nn.Linear(1, 1), None, {"x": torch.ones(1)}),
    "stock optimizer in evaluate_in": lambda: hs.evaluate_in(torch.nn.Linear(1, 1), torch.optim.SGD([P()], lr=0.1)).__enter__(),
    "all gradients zero": all_zero,
    "flushed": flushed,
    "sparse": sparse,
    "stock unscale_": lambda: ready(torch.amp.GradScaler).unscale_(hs.optim.SGD([given(half(), 1.0, 1.0)], lr=0.1)),
    "no gradient": lambda: ready().step(hs.optim.SGD([P()], lr=0.1)),
    "update without a step": lambda: ready().update(),
    "two steps": stepped_twice,
    "two unscales": unscaled_twice,
    "unscaled closure": unscaled_closure,
    "another device": lambda: hs.GradScaler("cuda").scale(torch.ones(())),
    "scale_tensor too early": lambda: hs.GradScaler().scale_tensor,
    "step too early": lambda: hs.GradScaler().step(hs.optim.SGD([P()], lr=0.1)),
    "policy and number": lambda: hs.GradScaler(init_scale=2.0, policy=hs.policies.Static(2.0)),
    "unknown preset": lambda: hs.policies.preset("nope"),
    "SkipAware on torch's scaler": lambda: hs.lr_scheduler.SkipAware(None, torch.amp.GradScaler("cpu")),
    "no such loss": lambda: hs.GradScaler(losses=2).scale(torch.ones(()), which=2),
    "two losses in one optimizer": lambda: two_losses(unscale=True),
    "a loss that nothing was stepped with": lambda: two_losses(unscale=False),
    "state of another number of losses": lambda: hs.GradScaler().load_state_dict(hs.GradScaler(losses=2).state_dict()),
    "scale of another size": lambda: hs.functional.scale_gradient(torch.ones(2), torch.ones(2)),
    "float lr under capture": captured(lambda p, opt: None, 0.1),
    "frozen under capture": captured(lambda p, opt: opt.add_param_group({"params": [P()]}), torch.tensor(0.1)),
    "edited under capture": captured(lambda p, opt: p.detach().mul_(2), torch.tensor(0.1)),
    "moved under capture": captured(lambda p, opt: setattr(p, "data", p.data.clone()), torch.tensor(0.1)),
    "state of other weights": other_weights,
    "state of another optimizer": lambda: hs.optim.SGD([P()], lr=0.1).load_state_dict(hs.optim.AdamW([P()]).state_dict()),
    "file without masters": no_masters,
    "file with other names": other_names,
    "max_lr of 0": no_max_lr,
    "no running mean": lambda: hs.optim.SGD([P()]).ema_params(),
    "moments in half": to_torch_in_half,
    "rule that torch lacks": lambda: hs.optim.to_torch(hs.optim.Lion([P()])),
    "rule that is not ours": lambda: hs.optim.from_torch(torch.optim.RMSprop([P()])),
    "broken file": broken_file,
    "another torch": other_torch,
    "not built": missing_library,
    "unfrozen in a compiled step": unfrozen_in_a_graph,
    "captured after compiled steps": captured_after_compiled_steps,
}


def message_of(name, monkeypatch):
    """The text of the error, or of the warning, that the case provokes."""
    provoke = PROVOKE[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            provoke(monkeypatch) if provoke.__code__.co_argcount == 1 else provoke()
        except Exception as error:
            return str(error)
    texts = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
    assert texts, f"{name}: nothing was raised"
    return texts[-1]


@pytest.mark.parametrize("name", PROVOKE)
def test_the_message_is_in_the_docs(name, monkeypatch):
    text = message_of(name, monkeypatch)
    assert any(re.match(pattern(row[0]), text) for row in ROWS), text


def test_every_line_of_the_docs_is_raised(monkeypatch):
    texts = []
    for name in PROVOKE:
        with monkeypatch.context() as context:
            texts.append(message_of(name, context))
    assert [row[0] for row in ROWS if not any(re.match(pattern(row[0]), t) for t in texts)] == []


def test_messages_of_cpp_are_expected_by_its_tests():
    lines = re.findall(r"\| C\+\+: `(.*?)`", DOCS.read_text())
    text = "".join(path.read_text() for path in sorted((DOCS.parents[1] / "tests" / "cpp").glob("*.cpp")))
    for message in lines:
        assert max(message.split("…"), key=len).split(" 4-byte")[0].strip() in text, message
    assert lines


def test_every_line_has_a_cause_and_a_fix():
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ") and not line.startswith(("| message", "| ---", "| C++"))]
    assert len(lines) == len(ROWS) > 30 and all(cause.strip() and fix.strip() for _, cause, fix in ROWS)
