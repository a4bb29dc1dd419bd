"""AccuracyGuard: what training in 16 bits computes is checked against FP32 on the exact weights, and something is done about it."""

import math
from dataclasses import dataclass, field

import torch

from . import _decisions
from ._islands import Islands, bare, layers
from ._report import parse_delta, unit_of
from ._room import SIXTEEN, warn
from ._runstate import RunState, has_scheduler, lower_lr, unseen
from ._shares import shares
from ._worker import _metrics
from .amp import GradScaler, autocast
from .cast import evaluate_in
from .optim import Masters, Optimizer

FORMAT = "halfstep-guard"
ACTIONS = ("warn", "island", "rewind", "lower_lr", "stop")  # parts of one action are taken in this order
MOST_ISLANDS = 16  # layers tried for one decision


@dataclass(frozen=True)
class GuardDecision:
    """What AccuracyGuard decided at one check."""

    step: int     #: calls of step() so far
    action: str   #: "warn", "lower_lr", "island", "rewind", "stop", or several joined by +
    why: str      #: what the check found
    details: dict = field(default_factory=dict)  #: of the action: layers, to_step, lr, factor

    def __str__(self):
        done = {"warn": "nothing was changed", "stop": "training should stop"}
        if "layers" in self.details:
            done["island"] = f"{', '.join(map(repr, self.details['layers']))} in FP32 from now on"
        if "to_step" in self.details:
            done["rewind"] = f"back to the state of step {self.details['to_step']}"
        if "lr" in self.details:
            done["lower_lr"] = f"learning rate {', '.join(f'{lr:g}' for lr in dict.fromkeys(self.details['lr']))}"
        return f"step {self.step}: {self.why}; {', '.join(done[part] for part in self.action.split('+'))}"


class AccuracyGuard:
    """Every `every` steps the model is evaluated as it is trained and, on its exact weights, in FP32; when that goes wrong, it acts.

        guard = hs.AccuracyGuard(model, optimizer, scaler, evaluate=evaluate, every=500, margin="1pp")
        for batch in batches:
            ...
            scaler.update()
            guard.step()
            if guard.stopped:
                break

    evaluate(model) -> a number or {metric: number}, of which `metric` (None: the first) counts; better: "higher" or "lower". It is called
    in eval() and no_grad(), inside hs.autocast (`dtype`; None: that of the 16-bit weights, else float16) and once more with hs.evaluate_in,
    so it must enter no autocast itself. Random numbers and train() are afterwards what they were.

    margin: as compare's delta: "1pp", or a number in the metric's unit. A check is bad when a value or a weight is not finite; when as trained is worse
    than FP32 by more than the margin, which is the precision's doing; or when FP32 is worse than the best good check by more than it.
    So is one while the scaler takes no step any more (stats().diagnosis); that is seen at once.

    actions: one for the first bad check in a row, the next for the second, …, the last again and again; a good check begins anew. One that
    cannot help is passed over. "warn" (all warn); "island": the fewest `layers` in FP32 (None: all innermost) that bring as
    trained within the margin of FP32, found by trying; "lower_lr": times `lr_factor`, in groups and schedulers; "rewind": weights, optimizers,
    scaler, schedulers and random numbers of the last good check, to the bit; "stop": `stopped` is set. "rewind+lower_lr" is both.
    The last good state is kept only where an action rewinds; it takes as much memory as weights, buffers and optimizer states.

    log: a file for every check and decision, JSON, whole at any time. replay: such a file: its decisions are taken again at their steps, and
    nothing is evaluated.
    """

    def __init__(self, model, optimizers, scaler=None, *, evaluate, every=500, margin="1pp", actions=("warn", "island", "lower_lr", "rewind+lower_lr", "stop"), metric=None,
                 better="higher", schedulers=None, lr_factor=0.5, layers=None, dtype=None, log=None, replay=None):
        self._model, self._given = bare(model), layers
        self._optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        self._schedulers = [] if schedulers is None else list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
        self._scaler, self._evaluate, self._metric, self._better = scaler, evaluate, metric, better
        self.every, self.actions = _decisions.whole("every", every, "AccuracyGuard"), self._parsed(actions)
        self._factor, (self._margin, self._points) = _decisions.fraction("lr_factor", lr_factor, "AccuracyGuard"), _margin(margin)
        self._check_arguments(dtype)
        self._islands, self._log = Islands(self._model, self._optimizers), _decisions.check_path(log, replay, "AccuracyGuard")
        self._dtype = dtype or self._islands.dtype or torch.float16
        self._candidates()
        self._step, self._rung, self._best, self._stuck = 0, 0, None, None
        self.stopped, self.decisions, self.checks = False, [], []
        self._replay = None if replay is None else self._read(replay)
        self._keep(0)

    def _parsed(self, actions):
        actions = (actions,) if isinstance(actions, str) else tuple(actions)
        if not actions:
            raise ValueError("AccuracyGuard: actions is empty; expected at least one")
        for action in actions:
            unknown = [part for part in str(action).split("+") if part not in ACTIONS]
            if unknown:
                raise ValueError(f"AccuracyGuard: actions has {action!r}; expected {', '.join(ACTIONS)}, or several joined by +")
        return actions

    def _check_arguments(self, dtype):
        if not callable(self._evaluate):
            raise TypeError(f"AccuracyGuard: evaluate is {type(self._evaluate).__name__}; expected a function of the model")
        if self._better not in ("higher", "lower"):
            raise ValueError(f"AccuracyGuard: better is {self._better!r}; expected 'higher' or 'lower'")
        if dtype not in (None, *SIXTEEN, torch.float32):
            raise ValueError(f"AccuracyGuard: dtype is {dtype}; expected torch.float16, torch.bfloat16 or torch.float32")
        for i, optimizer in enumerate(self._optimizers):
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"AccuracyGuard: optimizers[{i}] is {type(optimizer).__name__}; expected an optimizer")
        self._check_schedulers()

    def _check_schedulers(self):
        for i, optimizer in enumerate(self._optimizers):
            if self._does("lower_lr") and not self._schedulers and has_scheduler(optimizer):
                raise ValueError(f"AccuracyGuard: optimizers[{i}] has a learning-rate scheduler, which would write over a lowered lr; pass schedulers=")

    def _does(self, part):
        return any(part in action.split("+") for action in self.actions)

    def _candidates(self):
        return layers(self._model, self._given, "AccuracyGuard: layers")

    # -- the step ----------------------------------------------------------------------------------
    def step(self):
        """After each update of the scaler (or step of the optimizer). Returns the GuardDecision of a bad check, or None; once stopped, that decision."""
        if self.stopped:
            return self.decisions[-1]
        if not self._step:
            self._check_schedulers()  # one may have been made after the guard
        self._step += 1
        if self._replay is not None:
            return self._again()
        stuck = self._newly_stuck()
        return None if self._step % self.every and not stuck else self._check()

    def _newly_stuck(self):
        """Whether the scaler has just said why no step is taken any more. Costs no synchronisation."""
        before, self._stuck = self._stuck, self._diagnosis()
        return self._stuck is not None and before is None

    def _diagnosis(self):
        return next((entry._history._diagnosis for entry in self._scaler._entries() if entry._history._diagnosis), None) if isinstance(self._scaler, GradScaler) else None

    def _check(self):
        trained, exact = self._as_trained(), self._in_fp32()
        why = self._judge(trained, exact)
        self.checks.append({"step": self._step, "trained": trained, "fp32": exact, "good": why is None})
        decision = None
        if why is None:
            self._rung, self._best = 0, exact if self._best is None else self._better_of(self._best, exact)
            self._keep(self._step)
        else:
            decision = self._decide(why, trained, exact)
        self._write()
        return decision

    # -- what is measured --------------------------------------------------------------------------
    def _number(self):
        value = self._evaluate(self._model)
        numbers = _metrics(value if isinstance(value, dict) else {"value": value})[0]
        if self._metric is not None and self._metric not in numbers:
            raise ValueError(f"AccuracyGuard: metric is {self._metric!r}, but evaluate() returned {', '.join(numbers)}")
        self._name = self._metric or next(iter(numbers))
        return numbers[self._name]

    def _as_trained(self):
        with unseen(self._model), torch.no_grad(), autocast(self._islands.device, self._dtype if self._dtype in SIXTEEN else torch.float16, enabled=self._dtype in SIXTEEN):
            self._model.eval()
            return self._number()

    def _in_fp32(self):
        ours = [o for o in self._optimizers if isinstance(o, (Masters, Optimizer))]
        with unseen(self._model), evaluate_in(self._model, ours, torch.float32):
            return self._number()

    def _better_of(self, a, b):
        return max(a, b) if self._better == "higher" else min(a, b)

    def _lead(self, a, b):
        """How much better a is than b, in the margin's unit; and that unit."""
        try:
            factor, unit = unit_of(self._name, [a, b], self._points)
        except ValueError:
            raise ValueError(f"AccuracyGuard: margin is in percentage points, but {self._name} is {a:g} and {b:g}, which is no share; give margin in its own unit") from None
        return (a - b if self._better == "higher" else b - a) * factor, " points" if unit else ""

    def _judge(self, trained, exact):
        """Why a check is bad, or None."""
        bad = next((name for name, param in self._model.named_parameters() if not param.detach().isfinite().all()), None)
        if bad is not None:
            return f"{bad!r} holds inf or NaN"
        stuck = self._diagnosis()
        if stuck is not None:
            return f"no step is taken any more: {stuck}"
        if not math.isfinite(exact):
            return f"{self._name} in FP32 is {exact}"
        if not math.isfinite(trained):
            return f"{self._name} as trained is {trained}, {exact:g} in FP32"
        gap, unit = self._lead(trained, exact)
        if gap < -self._margin:
            return f"{self._name} as trained is {trained:g}, {-gap:.3g}{unit} worse than the {exact:g} of the same weights in FP32"
        drop = 0.0 if self._best is None else self._lead(exact, self._best)[0]
        if drop < -self._margin:
            return f"{self._name} in FP32 is {exact:g}, {-drop:.3g}{unit} worse than the {self._best:g} of a check before"
        return None

    def _within(self, trained, exact):
        return math.isfinite(trained) and self._lead(trained, exact)[0] >= -self._margin

    # -- what is done ------------------------------------------------------------------------------
    def _decide(self, why, trained, exact):
        first = min(self._rung, len(self.actions) - 1)
        for rung in range(first, len(self.actions)):
            details = self._details(self.actions[rung].split("+"), trained, exact)
            if details is not None:
                self._rung = rung + 1
                return self._take(GuardDecision(self._step, self.actions[rung], why, details))
        return self._take(GuardDecision(self._step, "warn", why))

    def _details(self, parts, trained, exact):
        """What the parts of an action need to know, or None where one of them cannot help."""
        details = {}
        if "island" in parts:
            details["layers"] = self._needed_islands(trained, exact)
            if not details["layers"]:
                return None
        if "rewind" in parts:
            details["to_step"] = self._kept_at
        if "lower_lr" in parts:
            details["factor"] = self._factor
        return details

    def _take(self, decision):
        parts = decision.action.split("+")
        if "island" in parts:
            for name in decision.details["layers"]:
                self._islands.put(name)
        if "rewind" in parts:
            self._kept.restore()
        if "lower_lr" in parts:
            decision.details["lr"] = lower_lr(self._optimizers, self._schedulers, decision.details["factor"])
        self.stopped = "stop" in parts
        self.decisions.append(decision)
        warn(f"AccuracyGuard: {decision}")
        return decision

    def _keep(self, step):
        if self._does("rewind"):
            self._kept, self._kept_at = RunState(self._model, self._optimizers, self._scaler, self._schedulers), step

    def _needed_islands(self, trained, exact):
        """The fewest layers found whose FP32 brings as trained within the margin: added by what FP16 does to their outputs, then each left out again that can be."""
        if not math.isfinite(exact) or self._within(trained, exact):
            return []
        added = []
        try:
            for name in self._by_loss()[:MOST_ISLANDS]:
                self._islands.put(name)
                added.append(name)
                if self._within(self._as_trained(), exact):
                    break
            else:
                return []
            for name in added[:-1]:
                self._islands.take(name)
                if not self._within(self._as_trained(), exact):
                    self._islands.put(name)
            return [name for name in added if name in self._islands.names]
        finally:
            for name in added:
                self._islands.take(name)

    def _by_loss(self):
        """Names of the layers that are no islands yet: first those near whose FP32 inputs and outputs FP16 overflows most, then those where most vanishes."""
        found = {}

        def look(name):
            def hook(module, args, output):
                for tensor in (*args, output):
                    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                        s = shares(tensor)
                        now = (s.overflow / max(s.count, 1), (s.underflow + s.subnormal) / max(s.nonzero, 1))
                        found[name] = tuple(map(max, found.get(name, (0.0, 0.0)), now))
            return hook

        there = set(self._islands.names)
        candidates = {name: module for name, module in self._candidates().items() if name not in there}
        handles = [module.register_forward_hook(look(name)) for name, module in candidates.items()]
        try:
            self._in_fp32()
        finally:
            for handle in handles:
                handle.remove()
        return sorted(found, key=lambda name: found[name], reverse=True)

    # -- logs, replays, checkpoints ----------------------------------------------------------------
    def _write(self):
        if self._log is not None:
            _decisions.write(self._log, FORMAT, self._content())

    def _content(self):
        return {"settings": {"every": self.every, "margin": self._margin, "points": self._points, "actions": list(self.actions), "better": self._better, "lr_factor": self._factor},
                "checks": self.checks, "decisions": [vars(d) for d in self.decisions]}

    def _read(self, path):
        data, where = _decisions.read(path, FORMAT, {"checks": list, "decisions": list}, "AccuracyGuard: replay"), f"AccuracyGuard: replay: {path}"
        _decisions.check_decisions(data["decisions"], {"step": int, "action": str, "why": str, "details": dict}, where)
        for i, check in enumerate(data["checks"]):
            if not isinstance(check, dict) or not isinstance(check.get("step"), int) or not isinstance(check.get("good"), bool):
                raise ValueError(f"{where}: checks[{i}] has no good 'step' and 'good'; expected a whole number, and true or false")
        known = dict(self._model.named_modules())
        for d in data["decisions"]:
            parts, details = self._parsed([d["action"]])[0].split("+"), d["details"]
            stray = [name for name in details.get("layers", ()) if name not in known]
            if stray:
                raise ValueError(f"{where}: layer {stray[0]!r} is not in this model")
            lacks = [key for part, key in (("island", "layers"), ("rewind", "to_step"), ("lower_lr", "factor")) if part in parts and key not in details]
            if lacks:
                raise ValueError(f"{where}: the decision of step {d['step']} has no {lacks[0]!r}")
            if "rewind" in parts and not self._does("rewind"):
                raise ValueError(f"{where}: step {d['step']} rewinds, but actions has no rewind: nothing would be kept")
        return {"checks": {c["step"]: c for c in data["checks"]}, "decisions": {d["step"]: GuardDecision(d["step"], d["action"], d["why"], dict(d["details"])) for d in data["decisions"]}}

    def _again(self):
        """The logged decision of this step, taken again."""
        check = self._replay["checks"].get(self._step)
        if check is not None:
            self.checks.append(check)
        if check is not None and check["good"]:
            self._keep(self._step)
        decision = self._replay["decisions"].get(self._step)
        if decision is not None:
            self._take(decision)
        if decision is not None or check is not None:
            self._write()
        return decision

    def state_dict(self):
        """Counts, checks, decisions and islands. The last good state is not in it: after loading, it is the state at that moment."""
        return {"format": 1, "step": self._step, "rung": self._rung, "best": self._best, "stopped": self.stopped, "islands": self._islands.names,
                "checks": [dict(c) for c in self.checks], "decisions": [dict(vars(d)) for d in self.decisions]}

    def load_state_dict(self, state_dict):
        """Goes on where state_dict() was taken; model, optimizers and scaler are loaded before."""
        _decisions.check_state(state_dict, ("step", "rung", "best", "stopped", "islands", "checks", "decisions"), "AccuracyGuard")
        known = dict(self._model.named_modules())
        stray = [name for name in state_dict["islands"] if name not in known]
        if stray:
            raise ValueError(f"AccuracyGuard state has the island {stray[0]!r}, which is not in the model")
        self._step, self._rung, self._best, self.stopped = (state_dict[key] for key in ("step", "rung", "best", "stopped"))
        self.checks, self.decisions = [dict(c) for c in state_dict["checks"]], [GuardDecision(**d) for d in state_dict["decisions"]]
        for name in set(self._islands.names) - set(state_dict["islands"]):
            self._islands.take(name)
        for name in state_dict["islands"]:
            self._islands.put(name)
        self._keep(self._step)


def _margin(margin):
    try:
        return parse_delta(margin)
    except ValueError:
        raise ValueError(f"AccuracyGuard: margin is {margin!r}; expected a number above 0, or percentage points such as 0.5pp") from None
