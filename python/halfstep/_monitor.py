"""monitor(): what compare() reports, of a run while it runs (docs/monitor.md)."""

import atexit
import collections
import contextlib
import fnmatch
import json
import math
import os
import platform
import socket
import time
import weakref

import torch

from . import _monitor_schema, _report, _report_events
from ._decisions import whole
from ._file import replacing
from ._recording import number
from ._room import capturing, names_of, warn
from ._shadow import Shadow
from ._shares import Shares, of_counts, packed_samples
from ._stats import CONSECUTIVE, LAST_BAD, LOSS, SCALE, SKIPPED, ScalerStats, send
from ._stats import _AMAX, _COUNT, _NONFINITE, _NORM, _SQUARES, _ZEROS
from ._tensorboard import Writer
from .amp import GradScaler

SAMPLES, LOSSES, SKIPS = 2_000, 2_000, 10_000  # so many of the newest are kept; what a report sums up is of all
LIVE_SECONDS = 1.0
STABLE = 50  # steps in a row that were taken: the scale has settled
ALIASES = {"megatron": ("loss-scale", "num-zeros"), "deepspeed": ("Train/Samples/loss_scale",), "fairseq": ("loss_scale",)}
_WHOLE = (torch.nn.MultiheadAttention,)  # computes with parameters of its children, whose forward it does not call


def layers_of(model, patterns=None):
    """{name: module} of what is sampled: the innermost modules that own parameters, or those that the names or globs fit."""
    found, inside = {}, []
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer in inside):
            continue
        whole = isinstance(module, _WHOLE)
        if whole:
            inside.append(name)
        own = any(True for _ in module.parameters(recurse=whole))
        below = any(True for child in module.children() for _ in child.parameters())
        if own and (whole or not below) if patterns is None else any(fnmatch.fnmatchcase(name, p) for p in patterns):
            found[name or "(model)"] = module
    unused = [p for p in patterns or () if not any(fnmatch.fnmatchcase(name, p) for name, _ in model.named_modules())]
    if unused:
        raise ValueError(f"monitor: layers has {unused[0]!r}, which fits no module (modules: {', '.join(repr(n) for n, _ in model.named_modules() if n) or 'none'})")
    return found


class Trajectory:
    """The scale as change points, and the skipped steps."""

    def __init__(self, scale):
        self.now, self.points, self.longest, self.stable, self.steps, self._row, self._clean = scale, [], 0, None, 0, 0, 0
        self.skipped = collections.deque(maxlen=SKIPS)

    def add(self, step, skipped, after):
        """`step` was made with the scale that is now; `after` is that of the next."""
        if step <= self.steps:  # an earlier state was loaded
            self.points = [p for p in self.points if p[0] < step]
            self.skipped = collections.deque((s for s in self.skipped if s < step), SKIPS)
        self.steps = step
        if not self.points or self.points[-1][1] != self.now:
            self.points.append([step, self.now])
        if skipped:
            self.skipped.append(step)
        self._row, self._clean = (self._row + 1, 0) if skipped else (0, self._clean + 1)
        self.longest = max(self.longest, self._row)
        if self._clean == STABLE and self.stable is None:
            self.stable = step - STABLE + 1
        self.now = after

    def report(self):
        return {"steps": self.steps, "points": [[s, number(v)] for s, v in self.points], "skipped": list(self.skipped), "longest": self.longest, "stable_from": self.stable} if self.points else None


class Monitor:
    """What monitor() returns. Also a context manager, which closes it."""

    def __init__(self, model, optimizers, scaler, every, layers, live, tensorboard, aliases):
        self._model, self._optimizers, self._scaler, self._every = model, optimizers, scaler if scaler is not None and scaler.is_enabled() else None, every
        self._layers = list(layers_of(model, layers).items())
        self._names = {id(p): name for name, p in model.named_parameters()}
        owners = [id(p) for _, module in self._layers for p in {id(p): p for p in module.parameters()}.values()]
        self._shared = frozenset(p for p in owners if owners.count(p) > 1) if len(set(owners)) < len(owners) else frozenset()
        self._next, self._shadow, self._failed, self._sampled, self._pending, self._free = 0, None, {}, set(), [], []
        self._samples, self._totals, self._newest, self._losses, self._gradients, self._least = [], {}, {}, [], None, {}
        self._ticks, self._closed, self._state, self._error = 0, False, "running", None
        self._started = time.time()
        self._window = self._last_live = time.monotonic()
        self._window_step, self._rate = 0, None
        self._live, self._aliases = None if live is None else os.fspath(live), aliases
        self._writer = None if tensorboard is None else Writer(tensorboard)
        self._stats, self._loss, self._handles = None, None, []
        self._trajectory = None if self._scaler is None else Trajectory(scaler.get_scale())
        self._base = 0 if self._scaler is None else scaler._updates
        if self._live is not None:
            self._write_live()  # a path that cannot be written is told now
            ref = weakref.ref(self)
            self._at_exit = lambda: ref() is not None and ref().close()
            atexit.register(self._at_exit)
        if self._scaler is not None:
            scaler._history.watchers.append(self)
        elif optimizers:
            self._handles.append(optimizers[0].register_step_post_hook(lambda *_: self.updated()))
        self._arm()

    # -- what the scaler calls ---------------------------------------------------------------------
    def arrived(self, step, numbers, totals, update):
        """An update's numbers are on the host."""
        scale, found = self._trajectory.now, bool(numbers[LAST_BAD])
        changed = bool(self._trajectory.points) and self._trajectory.points[-1][1] != scale
        self._trajectory.add(step, found, numbers[SCALE])
        self._stats, self._loss = numbers, numbers[LOSS]
        if step % self._every == 0:
            self._losses.append([step, number(numbers[LOSS])])
            if len(self._losses) > LOSSES:
                self._losses = self._losses[::2]
            self._take_gradients(step, scale, update, found)
        if self._writer is not None and (found or changed or step % self._every == 0 or step == self._base + 1):
            self._write_events(step, scale, numbers, totals, found)

    def restart(self):
        """Another state was loaded into the scaler."""
        self._trajectory.now = self._scaler._init_scale

    def updated(self):
        """After the scaler's update; without a scaler, after the optimizer's step."""
        if self._closed or torch.compiler.is_compiling() or capturing():
            return
        self._ticks += 1
        if self._trajectory is not None and self._scaler._scale is not None and self._scaler._scale.device.type == "cpu":
            self._trajectory.now = float(self._scaler._scale)  # the user, or a policy on the host, may have set it
        if self._shadow is not None:
            self._collect()
        self._drain()
        if (self._ticks + 1) % self._every == 0:
            self._arm()
        now = time.monotonic()
        if now - self._window >= LIVE_SECONDS:
            self._rate, self._window, self._window_step = (self._ticks - self._window_step) / (now - self._window), now, self._ticks
        if self._live is not None and now - self._last_live >= LIVE_SECONDS:
            self._last_live = now
            self._write_live()

    def step(self):
        """Looks at the counters now: for steps that run outside Python, as one graph of torch.compile or a captured CUDA graph, which nothing can notice."""
        if self._scaler is not None:
            self._scaler.stats()
        self.updated()

    # -- the sampled layer -------------------------------------------------------------------------
    def _arm(self):
        """Hooks the next layer, if the coming step is one to sample."""
        if self._shadow is not None or (self._ticks + 1) % self._every:
            return
        for _ in range(len(self._layers)):
            name, module = self._layers[self._next % len(self._layers)]
            self._next += 1
            if name not in self._failed:
                try:
                    self._shadow = Shadow(name, module, self._names, self._optimizers, self._scale_now, self._shared)
                except Exception as error:  # a module that takes no hooks
                    self._failed[name] = f"{type(error).__name__}: {error}"
                    continue
                return

    def _scale_now(self):
        """What gradients carry in this backward: a copy, on its device."""
        return 1.0 if self._scaler is None else self._scaler._init_scale if self._scaler._scale is None else self._scaler._scale.detach().double().clone()

    def _now(self):
        """The number of the newest update, whether or not it arrived."""
        if self._scaler is None:
            return self._ticks
        return (self._base if self._stats is None else self._trajectory.steps) + len(self._scaler._history._pending)

    def _collect(self):
        shadow, self._shadow = self._shadow, None
        found = shadow.finish()
        if shadow.error is not None:
            self._failed[shadow.name] = shadow.error
        if not found:
            return
        self._sampled.add(shadow.name)
        rows = torch.stack([row for _, _, row in found])
        scale = shadow.scale if shadow.scale is not None else self._scale_now()
        scale = scale.to(rows.device).reshape(1) if isinstance(scale, torch.Tensor) else torch.full((1,), float(scale), dtype=torch.float64, device=rows.device)
        self._pending.append((self._now(), [(name, kind) for name, kind, _ in found], *send(torch.cat([scale, rows.flatten()]), self._free)))

    def _drain(self, wait=False):
        while self._pending and (self._pending[0][3] is None or wait or self._pending[0][3].query()):
            step, keys, host, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            numbers, found = host.tolist(), {}
            if event is not None:
                self._free = [*self._free, host][-4:]
            for i, key in enumerate(keys):
                found[key] = found.get(key, Shares()) + of_counts(numbers[1 + 8 * i:9 + 8 * i])
            self._samples = [*self._samples[-SAMPLES + 1:], (step, numbers[0], found)]
            for (name, kind), shares in found.items():
                self._totals[name, kind] = self._totals.get((name, kind), Shares()) + shares
                self._newest[name, kind] = shares
                if self._writer is not None:
                    with self._output("tensorboard"):
                        _report_events.sample(self._writer, step, name, kind, shares, headroom=self._scaler is None)

    # -- the free counters -------------------------------------------------------------------------
    def _take_gradients(self, step, scale, update, found_inf):
        """Each gradient's numbers, with its headroom at the loss scale."""
        names, tensors = self._model_names(), []
        for entry_names, rows, carried in update.rows():
            for name, row in zip(entry_names, rows):
                if not row[_COUNT]:
                    continue
                name = names.get(name, name)
                amax = row[_AMAX] * (scale / carried) if carried > 0 else row[_AMAX]
                bits = math.log2(65504.0 / amax) if 0 < amax < math.inf and not row[_NONFINITE] else None
                if bits is not None:
                    self._least[name] = min(bits, self._least.get(name, math.inf))
                nonzero = row[_COUNT] - row[_ZEROS]
                tensors.append({"name": name, "amax": number(amax), "norm": number(math.sqrt(row[_SQUARES]) / carried if carried > 0 else math.nan), "zero_share": row[_ZEROS] / row[_COUNT],
                                "subnormal_share": row[4] / nonzero if nonzero else 0.0, "nonfinite": int(row[_NONFINITE]), "headroom": bits, "least_headroom": self._least.get(name)})
        self._gradients = {"step": step, "tensors": tensors}
        if self._writer is not None:
            with self._output("tensorboard"):
                for tensor in tensors:
                    if tensor["headroom"] is not None:
                        self._writer.scalar(f"amp/headroom_bits/{tensor['name']}", tensor["headroom"], step)

    def _model_names(self):
        """{what an optimizer calls a parameter: what the model does}, of those that only one optimizer calls so."""
        found, twice = {}, set()
        for optimizer in self._optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for param, name in zip(group["params"], names_of(group, index)):
                    if name in found:
                        twice.add(name)
                    found[name] = self._names.get(id(param), name)
        return {name: model_name for name, model_name in found.items() if name not in twice}

    def _write_events(self, step, scale, numbers, totals, found):
        zeros = sum(row[_ZEROS] for row in totals)
        with self._output("tensorboard"):
            for tag, value in (("amp/loss_scale", scale), ("amp/loss_scale_log2", math.log2(scale) if scale > 0 else -math.inf), ("amp/skipped_total", numbers[SKIPPED]),
                               ("amp/consecutive_skips", numbers[CONSECUTIVE]), ("amp/found_inf", float(found)), ("amp/grad_norm_unscaled", numbers[_NORM]), ("train/loss", numbers[LOSS])):
                self._writer.scalar(tag, value, step)
            for alias in self._aliases:
                for tag in ALIASES[alias]:
                    self._writer.scalar(tag, zeros if tag == "num-zeros" else scale, step)
            self._writer.flush()

    @contextlib.contextmanager
    def _output(self, what):
        """A disk that is full ends this output, not the training."""
        try:
            yield
        except OSError as error:
            warn(f"monitor: {what} cannot be written any more ({error}); the training and the monitor go on without it")
            if what == "live":
                self._live = None
            else:
                self._writer = None

    # -- what is known -----------------------------------------------------------------------------
    def stats(self):
        """ScalerStats of the scaler; None without one."""
        return None if self._scaler is None else self._scaler.stats()

    def status(self):
        """The status as `halfstep watch` shows it: a dict."""
        stats = self.stats() or ScalerStats(self._ticks, 1.0, 0, self._ticks, 0, 0, False, None, math.nan, 0.0, 0.0, 0.0, 0)
        scaled = self._scaler is not None
        tensors = [t for t in (self._gradients or {}).get("tensors", ()) if t["headroom"] is not None]
        worst = min(tensors, key=lambda t: t["headroom"], default=None)
        under = max(((s.underflow / s.nonzero, name) for (name, kind), s in self._newest.items() if kind == "weight gradient" and s.nonzero), default=None)
        elapsed = time.monotonic() - self._window
        rate = self._rate if self._rate is not None else self._ticks / elapsed if elapsed > 0 and self._ticks else None
        return {"state": self._state, "error": self._error, "pid": os.getpid(), "host": socket.gethostname(), "started": self._started, "time": time.time(), "step": stats.step,
                "scale": number(stats.scale) if scaled else None, "skipped": stats.steps_skipped, "consecutive_skips": stats.consecutive_skips,
                "grad_norm": number(stats.grad_norm) if scaled and self._stats is not None else None, "loss": None if self._loss is None else number(self._loss), "steps_per_second": rate,
                "headroom": worst and {"name": worst["name"], "bits": worst["headroom"]}, "underflow": under and {"name": under[1], "share": under[0]},
                "diagnosis": stats.diagnosis, "first_bad_param": stats.first_bad_param}

    def report(self):
        """All that is known by now, in the fields of docs/monitor.md: a dict that JSON can hold."""
        self._drain()
        missing = {name: self._failed.get(name, "not called in a sampled step") for name, _ in self._layers if name not in self._sampled}
        return {"format": _monitor_schema.FORMAT, "version": _monitor_schema.VERSION, "every": self._every, "status": self.status(),
                "scale": None if self._trajectory is None else self._trajectory.report(), "losses": [list(row) for row in self._losses], "gradients": self._gradients,
                "layers": _report.layer_rows(self._totals), "shares": packed_samples(self._samples, self._every) if self._samples else None, "unsampled": missing,
                "environment": {"host": platform.node(), "python": platform.python_version(), "torch": torch.__version__}}

    def write_json(self, path):
        """report() into a file, which is whole or as it was."""
        self._write(path, self.report())

    def _write(self, path, data, sync=True):
        with replacing(path, text=True, sync=sync) as file:
            json.dump(data, file, allow_nan=False, separators=(",", ":"))
            file.write("\n")

    def _write_live(self):
        data = {"format": _monitor_schema.FORMAT, "version": _monitor_schema.VERSION, "every": self._every, "status": self.status()}
        if self._ticks == 0:
            return self._write(self._live, data, sync=False)
        with self._output("live"):
            self._write(self._live, data, sync=False)

    # -- the end -----------------------------------------------------------------------------------
    def close(self):
        """Takes every hook away, waits for what the device has not finished, and says in the live file that the job ended."""
        if self._closed:
            return
        self._closed, self._state = True, "failed" if self._error is not None else "ended"
        for handle in self._handles:
            handle.remove()
        if self._shadow is not None:
            self._shadow.remove()
            self._shadow = None
        try:
            if self._scaler is not None:
                self._scaler._history.wait()
            self._drain(wait=True)
        finally:
            if self._scaler is not None:
                self._scaler._history.watchers[:] = [w for w in self._scaler._history.watchers if w is not self]
            if self._live is not None:
                atexit.unregister(self._at_exit)
                self._write_live()
            if self._writer is not None:
                self._writer.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and not isinstance(error, GeneratorExit):
            self._error = f"{kind.__name__}: {error}".strip(": ")
        self.close()


def monitor(model, optimizers, scaler=None, every=50, *, layers=None, live=None, tensorboard=None, aliases=()):
    """Watches a training run as it runs, and changes nothing of it. Returns a Monitor, to close() or to use in `with`.

    model: a torch.nn.Module. optimizers: one or several. scaler: a halfstep.GradScaler of one loss, or None: then a step is a step of the first optimizer
    and there are no counters of the scale. From the scaler's counters, which are free: scale, skips, norm, loss of every step, and in every `every`-th each
    gradient's headroom. In every `every`-th step one layer, the next in turn, is computed once more in FP32: shares of underflow, subnormal and overflow.

    layers: names or globs of the modules to sample, [] for none; None: the innermost with parameters. live: a file for `halfstep watch`, written at most once
    a second. tensorboard: a folder for events. aliases: further tags, of "megatron", "deepspeed", "fairseq". Errors name the argument: TypeError, ValueError,
    OSError where a file cannot be written at the start; one that cannot be written later ends with a warning.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"monitor: model is {type(model).__name__}; expected a torch.nn.Module")
    optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [] if optimizers is None else [optimizers]
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"monitor: optimizers has {type(optimizer).__name__}; expected optimizers")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"monitor: scaler is {type(scaler).__module__}.{type(scaler).__name__}; expected a halfstep.GradScaler, or None where the loss is not scaled")
    if scaler is not None and scaler.losses > 1:
        raise ValueError(f"monitor: the GradScaler has losses={scaler.losses}; a monitor shows the scale of one")
    if not optimizers and (scaler is None or not scaler.is_enabled()):
        raise ValueError("monitor: neither optimizers nor an enabled scaler, so that no step can be noticed")
    whole("every", every, "monitor")
    aliases = [aliases] if isinstance(aliases, str) else list(aliases)
    unknown = [a for a in aliases if a not in ALIASES]
    if unknown:
        raise ValueError(f"monitor: aliases has {unknown[0]!r}; expected of {', '.join(ALIASES)}")
    return Monitor(model, optimizers, scaler, every, [layers] if isinstance(layers, str) else layers, live, tensorboard, aliases)
