"""DynamicPrecision: each layer is in FP16 or an island in FP32, and moves by what was measured (docs/precision.md)."""

import collections
import math
import sys
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _decisions, policies
from ._islands import Islands, bare, layers
from ._job import tensors
from ._nonfinite import find_nonfinite
from ._room import SIXTEEN, capturing
from ._runstate import unseen
from ._recording import OVERFLOW
from ._shares import Shares, against_fp32, rng_state, with_rng
from ._stats import LOSS
from ._table import table
from .amp import GradScaler, autocast

FORMAT = "halfstep-precision"
FEWEST = 100  # non-zero gradients of a layer; the share of fewer says nothing


@dataclass(frozen=True)
class PrecisionDecision:
    """One layer changed its precision."""

    step: int   #: calls of step() so far
    layer: str  #: name of the module
    to: str     #: "float32": it became an island; "float16": it went back
    why: str

    def __str__(self):
        return f"step {self.step}: '{self.layer}' to {self.to}: {self.why}"


@dataclass
class Signals:
    """What one check measured of a layer, in FP32 on the exact weights."""

    underflow: float = 0.0      #: share of its weights' non-zero gradients that FP16 would hold as 0 at this scale
    overflow: float = 0.0       #: largest finite magnitude of its inputs, outputs and weights, where FP16 would hold it as inf
    headroom: float = math.inf  #: bits to the end of FP16: of inputs, outputs and weights, and of gradients at the floor scale


@dataclass
class LayerPrecision:
    """Where one layer is, and how it came there."""

    precision: str = "float16"  #: or "float32"
    bad: int = 0                #: checks in a row that underflowed
    clean: int = 0              #: checks in a row that would have been well in FP16, as an island
    returns: int = 0            #: times it went back to FP16
    transitions: int = 0
    since: int = 0              #: step of its last move
    held: bool = False          #: an island that others made, which stays
    signals: Signals = field(default_factory=Signals)  #: of the newest check


def _largest(values):
    """The largest finite magnitude in the floating tensors of nested `values`; infinities are meant (masks), or not FP16's doing."""
    found = 0.0
    for tensor in tensors(values):
        if tensor.is_floating_point() and tensor.numel():
            size = tensor.detach().abs()
            found = max(found, float(torch.where(size.isfinite(), size, 0).max()))
    return found


@dataclass
class _Seen:
    """Largest finite magnitudes of one layer in an FP32 run; `inside`: of every op in it, where it is an island."""

    arrives: float = 0.0
    leaves: float = 0.0
    inside: float = 0.0
    gradient: float = 0.0  #: of the loss, unscaled, at its output


class _Look(TorchDispatchMode):
    """Inside, {layer: _Seen} of the layers that run. Ops are looked at in islands only: what made one may lie between its modules."""

    def __init__(self, modules, islands):
        super().__init__()
        self.seen, self._modules, self._islands, self._running, self._handles = {}, modules, islands, [], []

    def __enter__(self):
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(name)))
        return super().__enter__() if self._islands else self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*exception) if self._islands else None

    def _enter(self, name):
        def hook(module, args, kwargs):
            seen = self.seen.setdefault(name, _Seen())
            # What is neither the first argument nor has a gradient is a mask: where it is very negative, -inf serves as well.
            seen.arrives = max(seen.arrives, _largest([args[:1], [t for t in tensors([args[1:], kwargs]) if t.requires_grad]]))
            if name in self._islands:
                self._running.append(seen)
        return hook

    def _leave(self, name):
        def hook(module, args, output):
            seen = self.seen[name]
            seen.leaves = max(seen.leaves, _largest(output))
            if name in self._islands:
                self._running.pop()
            for tensor in tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: setattr(seen, "gradient", max(seen.gradient, _largest(grad))))
        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._running:
            largest = _largest(result)
            for seen in self._running:
                seen.inside = max(seen.inside, largest)
        return result


class DynamicPrecision:
    """FP16 where it works and FP32 where it does not, layer by layer, while training.

        precision = hs.DynamicPrecision(model, optimizer, scaler, loss)
        for batch in batches:
            optimizer.zero_grad()
            with hs.autocast("cpu"):
                value = loss(model, batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            precision.step(batch)

    A layer becomes an island when (a) it makes the first inf or NaN of a step whose loss is not finite, or of one that was skipped with the
    scale at the floor (the policy's, a fixed scale, or `floor`); (b) a check finds that FP16 cannot hold what it computes; (c) in `checks` checks in a row more
    than `underflow` of its weights' gradients would be 0 in FP16. It goes back after `hold` steps and `clean` checks in a row with at most half of
    that share, no overflow and at least `headroom` bits; each return doubles both for the next one. So no layer moves more than twice in `hold` steps.

    (a) is read from the numbers that the scaler has anyway; only then is the step run again, op by op. A check, every `every` steps, is one FP32
    forward and backward of the batch on the exact weights. Both leave weights, gradients, buffers and random numbers alone. loss(model, batch) ->
    scalar tensor; it is called inside autocast and must enter none itself. batch: that of the step just made.

    model: FP32 weights trained under hs.autocast, or cast by hs.cast_model. layers: names, globs or classes (None: all innermost modules; a
    container is added when it makes an infinity itself). log, replay: files as of AccuracyGuard; a replay measures nothing.
    """

    def __init__(self, model, optimizers, scaler, loss, *, every=50, underflow=0.05, checks=3, clean=10, hold=2000, headroom=2.0, floor=1.0, layers=None, log=None, replay=None):
        if not isinstance(scaler, GradScaler):
            raise TypeError(f"DynamicPrecision: scaler is {type(scaler).__module__}.{type(scaler).__name__}; expected a halfstep.GradScaler, whose numbers say what overflowed")
        if not scaler.is_enabled():
            raise ValueError("DynamicPrecision: scaler is disabled; FP16 needs a loss scale, and without FP16 there is nothing to decide")
        if scaler.losses != 1:
            raise ValueError(f"DynamicPrecision: scaler has losses={scaler.losses}; expected 1")
        if not callable(loss):
            raise TypeError(f"DynamicPrecision: loss is {type(loss).__name__}; expected a function (model, batch) -> scalar")
        self._model, self._scaler, self._loss, self._given = bare(model), scaler, loss, layers is not None
        self._optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        counts = {"every": every, "checks": checks, "clean": clean, "hold": hold}
        self.every, self.checks, self.clean, self.hold = (_decisions.whole(name, value, "DynamicPrecision") for name, value in counts.items())
        self.underflow = _decisions.fraction("underflow", underflow, "DynamicPrecision")
        for name, value in (("headroom", headroom), ("floor", floor)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"DynamicPrecision: {name} is {value!r}; expected a number above 0")
        self.headroom, self.floor = float(headroom), float(floor)
        self._islands, self._log = Islands(self._model, self._optimizers), _decisions.check_path(log, replay, "DynamicPrecision")
        if self._islands.dtype == torch.bfloat16:
            raise ValueError("DynamicPrecision: the model is in BF16, whose range is FP32's: there is nothing to decide")
        self.layers = {name: LayerPrecision() for name in self._candidates(layers)}
        self.decisions, self._step, self._graphs = [], 0, None
        self._begin()
        self._replay = None if replay is None else self._read(replay)

    def _begin(self):
        stats = self._scaler.stats()
        self._updates, self._scale, self._base, self._in_vain = stats.step, stats.scale, stats.step - self._step, False
        self._recent = collections.deque([(self._step, None, rng_state())], maxlen=4)  # (step, its batch, random numbers before the next)

    def _candidates(self, rules):
        """Modules that can be moved; what cast_model kept in FP32 has no FP16 to go to."""
        kept = lambda module: self._islands.dtype is not None and any(True for _ in module.parameters()) and not any(p.dtype in SIXTEEN for p in module.parameters())
        return [name for name, module in layers(self._model, rules, "DynamicPrecision: layers").items() if not kept(module)]

    # -- the step ----------------------------------------------------------------------------------
    def step(self, batch):
        """After scaler.update(), with the step's batch. Returns the PrecisionDecisions that were taken, most often none."""
        if capturing():
            raise RuntimeError("DynamicPrecision.step inside a captured graph; call it outside, and capture again when it returns decisions")
        self._step += 1
        before = len(self.decisions)
        if self._replay is not None:
            for decision in self._replay.get(self._step, ()):
                self._move(decision)
        else:
            self._recent.append((self._step, batch, rng_state()))
            self._watch()
            if self._step % self.every == 0:
                self._check(batch)
        if len(self.decisions) > before and self._log is not None:
            _decisions.write(self._log, FORMAT, self._content())
        return self.decisions[before:]

    def _adopt(self):
        """Islands that others made (AccuracyGuard) are seen; they do not go back by themselves."""
        for name in self._islands.names:
            if name not in self.layers or self.layers[name].precision != "float32":
                self.layers[name] = LayerPrecision("float32", held=True)

    # -- (a): the numbers that the scaler has anyway -----------------------------------------------
    def _watch(self):
        stats, before = self._scaler.stats(), self._scale
        if stats.step < self._updates:  # an earlier state was loaded, by a rewind or by hand
            self._base = stats.step - self._step
        new, self._updates, self._scale = stats.step > self._updates, stats.step, stats.scale
        if not new or not stats.last_found_inf:
            self._in_vain = self._in_vain and not new
            return
        loss_is_bad = not math.isfinite(self._scaler._history._newest.numbers()[0][LOSS])
        at_floor = isinstance(self._scaler.policy, policies.Static) or before <= max(self.floor, self._scaler._history.floor)
        if self._in_vain or not (loss_is_bad or at_floor):
            return  # searched already; or the scale still finds its place
        steps = [step for step, _, _ in self._recent]
        if stats.step - self._base in steps[1:]:  # on a GPU the numbers are those of a step or two before
            at = steps.index(stats.step - self._base)
            self._in_vain = not self._search(self._recent[at][1], self._recent[at - 1][2], before, loss_is_bad)

    def _search(self, batch, rng, scale, loss_is_bad):
        """The layer that makes the first inf or NaN of this batch becomes an island. Returns whether there is one."""
        buffers, grads = [(b, b.clone()) for b in self._model.buffers()], [(p, p.grad) for p in self._model.parameters()]

        def run():
            with autocast(self._islands.device):
                value = self._loss(self._model, batch)
            (value.float() * scale).backward()

        try:
            with unseen(self._model), with_rng(rng), torch.enable_grad():
                for param, _ in grads:
                    param.grad = None
                found = find_nonfinite(self._model, run)
        finally:
            with torch.no_grad():
                for param, grad in grads:
                    param.grad = grad
                for buffer, value in buffers:
                    buffer.copy_(value)
        if found is None or not found.producer or found.dtype != "float16":
            return False  # gone, or from outside, or not FP16's doing
        name = self._layer_of(found.module)
        if name is not None:
            where = "the loss is not finite" if loss_is_bad else f"gradients overflow at scale {scale:g}"
            self._decide(name, "float32", f"{where}: {found.value} in {found.phase} made by {found.op}, of inputs at most {found.largest_input:g}")
        return name is not None

    def _layer_of(self, path):
        """The layer that a module belongs to, going outwards where it is an island already; None for the whole model, and outside of given layers."""
        while path:
            owner = next((name for name in self.layers if path == name or path.startswith(name + ".")), None if self._given else path)
            if owner is not None and owner not in self._islands.names:
                return owner
            path = (owner or path).rpartition(".")[0]
        return None

    # -- (b), (c) and the way back: a check against FP32 ---------------------------------------------
    def _check(self, batch):
        self._adopt()
        for name, signals in self._measure(batch).items():
            layer = self.layers[name]
            layer.signals = signals
            if layer.precision == "float16":
                self._judge_narrow(name, layer, signals)
            else:
                self._judge_wide(name, layer, signals)

    def _judge_narrow(self, name, layer, signals):
        layer.bad = layer.bad + 1 if signals.underflow > self.underflow else 0
        if signals.overflow:
            self._decide(name, "float32", f"FP16 cannot hold its largest value {signals.overflow:g}")
        elif layer.bad >= self.checks:
            self._decide(name, "float32", f"{100 * signals.underflow:.3g} % of its gradients would be 0 in FP16, above {100 * self.underflow:g} % in {layer.bad} checks in a row")

    def _judge_wide(self, name, layer, signals):
        well = signals.underflow <= self.underflow / 2 and not signals.overflow and signals.headroom >= self.headroom
        layer.clean = layer.clean + 1 if well and not layer.held else 0
        if layer.clean >= self.clean * 2**layer.returns and self._step - layer.since >= self.hold * 2**layer.returns:
            self._decide(name, "float16", f"{layer.clean} clean checks in a row, {min(signals.headroom, 99):.3g} bits of headroom")

    def _measure(self, batch):
        """{layer: Signals}."""
        wide = {name for name, layer in self.layers.items() if layer.precision == "float32"}
        look = _Look({name: self._model.get_submodule(name) for name in self.layers}, wide)

        def watched(model, batch):
            with look:
                return self._loss(model, batch)

        with torch.compiler.set_stance("force_eager"):
            found = against_fp32(self._model, self._optimizers, watched, batch, self._scale, self._recent[-2][2])
        return {name: self._signals(name, found, seen) for name, seen in look.seen.items()}

    def _signals(self, name, found, seen):
        params = [p for p, _ in self._model.get_submodule(name).named_parameters(prefix=name)]
        of = lambda kind: sum((found[p, kind] for p in params if (p, kind) in found), Shares())
        grads, weight = of("weight gradient"), of("weight").amax
        # A layer without weights passes on what came to it too large; one with weights would cast it.
        beyond = [x for x in ((seen.arrives, seen.leaves, seen.inside, weight) if params or seen.arrives < OVERFLOW else (seen.inside,)) if x >= OVERFLOW]
        largest = max(seen.arrives, seen.leaves, seen.inside, weight, grads.amax / self._scale * self.floor, seen.gradient * self.floor)
        return Signals(grads.underflow / grads.nonzero if grads.nonzero >= FEWEST else 0.0, max(beyond, default=0.0), math.log2(65504.0 / largest) if largest else math.inf)

    # -- decisions ---------------------------------------------------------------------------------
    def _decide(self, name, to, why):
        self._move(PrecisionDecision(self._step, name, to, why))

    def _move(self, decision):
        if self._graphs is None:
            self._graphs = _graphs()
        layer = self.layers.setdefault(decision.layer, LayerPrecision())
        if decision.to == "float32":
            self._islands.put(decision.layer)
        else:
            self._islands.take(decision.layer)
            layer.returns += 1
        layer.precision, layer.bad, layer.clean, layer.since = decision.to, 0, 0, decision.step
        layer.transitions += 1
        self.decisions.append(decision)

    @property
    def islands(self):
        """Names of the layers that compute in FP32 now."""
        return self._islands.names

    @property
    def transitions(self):
        """Moves of all layers so far. Each asks for a recapture where the step is captured in a CUDA graph."""
        return sum(layer.transitions for layer in self.layers.values())

    @property
    def recompiles(self):
        """Graphs that torch.compile made in this process since the first move: the recompilations that the moves cost."""
        return 0 if self._graphs is None else _graphs() - self._graphs

    def __str__(self):
        percent = lambda share: f"{100 * share:.2g} %"
        bits = lambda b: "" if math.isinf(b) else f"{b:.1f}"
        rows = [("layer", "precision", "moves", "underflow", "headroom, bits")]
        rows += [(name, s.precision, s.transitions, percent(s.signals.underflow), bits(s.signals.headroom)) for name, s in self.layers.items()]
        return f"{table(rows, left=(0, 1))}\n{len(self.islands)} of {len(self.layers)} layers in FP32, {self.transitions} moves, {self.recompiles} recompilations in {self._step} steps"

    # -- logs, replays, checkpoints ----------------------------------------------------------------
    def _content(self):
        settings = {key: getattr(self, key) for key in ("every", "underflow", "checks", "clean", "hold", "headroom", "floor")}
        return {"settings": settings, "decisions": [vars(d) for d in self.decisions], "islands": self.islands, "transitions": self.transitions, "recompiles": self.recompiles}

    def _read(self, path):
        where, known, found = f"DynamicPrecision: replay: {path}", dict(self._model.named_modules()), {}
        data = _decisions.read(path, FORMAT, {"decisions": list}, "DynamicPrecision: replay")
        for d in _decisions.check_decisions(data["decisions"], {"step": int, "layer": str, "to": str, "why": str}, where):
            if d["layer"] not in known or not d["layer"]:
                raise ValueError(f"{where}: layer {d['layer']!r} is not in this model")
            if d["to"] not in ("float16", "float32"):
                raise ValueError(f"{where}: the decision of step {d['step']} goes to {d['to']!r}; expected float16 or float32")
            found.setdefault(d["step"], []).append(PrecisionDecision(d["step"], d["layer"], d["to"], d["why"]))
        return found

    def state_dict(self):
        """Counts and decisions, for a checkpoint."""
        states = {name: {key: getattr(s, key) for key in ("precision", "bad", "clean", "returns", "transitions", "since", "held")} for name, s in self.layers.items()}
        return {"format": 1, "step": self._step, "layers": states, "decisions": [dict(vars(d)) for d in self.decisions]}

    def load_state_dict(self, state_dict):
        """Goes on where state_dict() was taken; model, optimizers and scaler are loaded before."""
        _decisions.check_state(state_dict, ("step", "layers", "decisions"), "DynamicPrecision")
        known = dict(self._model.named_modules())
        stray = [name for name in state_dict["layers"] if name not in known]
        if stray:
            raise ValueError(f"DynamicPrecision state has the layer {stray[0]!r}, which is not in the model")
        self._step, self.decisions = state_dict["step"], [PrecisionDecision(**d) for d in state_dict["decisions"]]
        self.layers = {name: LayerPrecision(**s) for name, s in state_dict["layers"].items()}
        self._begin()
        for name, layer in self.layers.items():
            (self._islands.put if layer.precision == "float32" else self._islands.take)(name)


def _graphs():
    """Graphs that torch.compile has made in this process; 0 where it was never used."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]
