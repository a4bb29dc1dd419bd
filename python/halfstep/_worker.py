"""One arm and one seed, trained and measured in a process of its own; the other side of _compare.py.

Run as `main(spec file, progress descriptor)`. Writes the result, or the error, as JSON to the path that the spec names.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import torch

from . import _recording
from ._energy import Meter
from ._file import replacing
from ._job import Arm, Job, fingerprint, tensors
from ._ledger import ledger
from ._measure import Clock, Memory
from ._recording import number
from ._shares import against_fp32, packed_samples, rng_state
from .cast import evaluate_in
from .optim import Masters, Optimizer

running = False  # whether this process is a run of compare()
MATRIX = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class CannotLoad(Exception):
    """The script, or make in it, cannot be used at all; its text says why."""


def load_make(file, name):
    """`name` of the script `file`, which is run as a module, so that what it keeps under `if __name__ == "__main__"` does not run."""
    file = Path(file).resolve()
    if not file.is_file():
        raise CannotLoad(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise CannotLoad(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        traceback.print_exc()
        raise CannotLoad(f"{file}: {last_line(error)}") from None
    make = getattr(module, name, None)
    if not callable(make):
        raise CannotLoad(f"{file} has no {name!r}" if make is None else f"{file}: {name} is {type(make).__name__}; expected a function make(arm, seed)")
    return make


def last_line(error):
    """The line of a traceback that says what happened."""
    return traceback.format_exception_only(error)[-1].strip()


def sources(folder):
    """{path: hash} of the modules that came from the script's folder."""
    paths = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None) and str(m.__file__).endswith(".py")}
    return {str(p): file_hash(p) for p in sorted(paths) if p.is_relative_to(folder) and "site-packages" not in p.parts}


def file_hash(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


# -- the run ---------------------------------------------------------------------------------------
class Run:
    """Trains one Job and keeps what the report wants to know. `look`: this seed is also recorded and compared with FP32 every `every` steps."""

    def __init__(self, arm, job, device, every, look, trace, tell):
        self.arm, self.job, self.every, self.look, self.trace, self._tell = arm, job, every, look, trace, tell
        self.clock, self.memory, self.scaler = Clock(device), None, arm.scaler()
        self.samples, self.ledger, self.count, self.examples, self.losses, self.data = [], None, 0, 0, [], []
        try:
            per_epoch = len(job.batches)
        except TypeError:
            per_epoch = 0
        self.total = per_epoch * job.epochs

    def train(self, memory):
        recorder = None
        if self.look and self.scaler.is_enabled():
            with self.clock.aside():
                recorder = _recording.record(self.scaler, self.trace, self.every)
            self._set_aside(recorder)
        for optimizer in self.job.optimizers:
            if isinstance(optimizer, (Optimizer, Masters)):
                optimizer._gather_stats = self.clock.checking(optimizer._gather_stats)
        self.scaler._unscale = self.clock.checking(self.scaler._unscale)
        try:
            for epoch in range(self.job.epochs):
                batches = self.job.epoch(epoch)
                while self._step(batches, memory):
                    pass
        finally:
            if recorder is not None:
                recorder.close()
        if not self.count:
            raise ValueError("Job: batches is empty")
        self.memory = self.memory or memory.peak()

    def _set_aside(self, recorder):
        for name in ("begin", "look", "updated"):
            def timed(*args, method=getattr(recorder, name), **kwargs):
                with self.clock.aside():
                    return method(*args, **kwargs)
            setattr(recorder, name, timed)

    def _step(self, batches, memory):
        job, clock, optimizers = self.job, self.clock, self.job.optimizers
        marks = [clock.time()]
        try:
            batch = next(batches)
        except StopIteration:
            return False
        marks.append(clock.time())
        with clock.aside():
            rng = rng_state() if self._looks() else None
            self.examples += next((t.shape[0] for t in tensors(batch) if t.dim()), 0)
            if self.count < 3:
                self.data.append(fingerprint(batch))
        for optimizer in optimizers:
            optimizer.zero_grad()
        with self.arm.autocast():
            loss = job.loss(job.model, batch)
        marks.append(clock.time())
        self.scaler.scale(loss).backward()
        marks.append(clock.time())
        if self._looks():
            with clock.aside():
                self.memory = self.memory or memory.peak()
                self._look(batch, rng)
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        marks.append(clock.time())
        self.scaler.update()
        marks.append(clock.time())
        clock.step(marks)
        self.count += 1
        if job.scheduler is not None:
            job.scheduler.step()
        if self.count == 2:
            self.ledger = ledger(job.model, optimizers)
        if self.look or self.count % 10 == 0:
            self.losses.append((self.count, float(loss.detach())))
        self._tell(self.count, self.total)
        return True

    def _looks(self):
        return self.look and self.arm.compute == "fp16" and (self.count + 1) % self.every == 0

    def _look(self, batch, rng):
        self.clock.looked = True
        scale = self.scaler.get_scale()
        with self.arm._widely():
            found = against_fp32(self.job.model, self.job.optimizers, self.job.loss, batch, scale, rng)
        self.samples.append((self.count + 1, scale, found))


def _metrics(found):
    """(numbers, correct, labels, logits) of what evaluate() returned."""
    if not isinstance(found, dict):
        raise TypeError(f"evaluate() returned {type(found).__name__}; expected a dict of numbers")
    correct, labels, logits = (found.get(k) for k in ("correct", "labels", "logits"))
    numbers = {k: float(v) for k, v in found.items() if k not in ("correct", "labels", "logits")}
    if not numbers:
        raise ValueError("evaluate() returned no number; expected a dict such as {'accuracy': 0.97}")
    listed = lambda v: v.tolist() if isinstance(v, torch.Tensor) or hasattr(v, "tolist") else list(v)
    return numbers, None if correct is None else [int(bool(c)) for c in listed(correct)], None if labels is None else listed(labels), logits


def evaluated(arm, job):
    """As trained: weights as they are, under the arm's autocast."""
    job.model.eval()
    with torch.no_grad(), arm.autocast():
        return _metrics(job.evaluate(job.model))


def matrix(arm, job):
    """{dtype: metrics and the errors of the logits against FP64} of the exact weights; a dtype that does not work has the reason."""
    ours = [o for o in job.optimizers if isinstance(o, (Optimizer, Masters))]
    found, logits = {}, {}
    for name, dtype in MATRIX.items():
        try:
            with arm._widely(), evaluate_in(job.model, ours, dtype):
                numbers, _, _, given = _metrics(job.evaluate(job.model))
                given = job.predict(job.model) if job.predict is not None else given
            found[name] = {"metrics": {k: number(v) for k, v in numbers.items()}}
            if given is not None:
                logits[name] = given.detach().double().cpu()
        except Exception as error:  # an op without this dtype, a weight beyond FP16
            found[name] = {"reason": last_line(error)}
    if "float64" in logits:
        for name, value in logits.items():
            error = (value - logits["float64"]).abs()
            found[name].update(max_error=number(float(error.max())), mean_error=number(float(error.mean())))
    return found


STABLE = 50  # updates in a row that are applied: the scale has settled


def trajectory(path):
    """The scale as change points, the skipped steps, and from where on it was stable, from a trace."""
    trace = _recording.read(path)
    points, skipped, clean, stable = [], [], 0, None
    for step in trace.steps:
        if not points or points[-1][1] != step.scale:
            points.append([step.step, step.scale])
        if step.found_inf:
            skipped.append(step.step)
        clean = 0 if step.found_inf else clean + 1
        if clean == STABLE and stable is None:
            stable = step.step - STABLE + 1
    return {"steps": len(trace.steps), "points": points, "skipped": skipped, "longest": _longest(skipped), "stable_from": stable}


def _longest(steps):
    best = now = 0
    before = None
    for step in steps:
        now = now + 1 if before == step - 1 else 1
        best, before = max(best, now), step
    return best


def measure(spec, tell):
    """The result of a spec, as a dict."""
    arm = Arm(**spec["arm"], device=spec["device"])
    file = Path(spec["file"]).resolve()
    make = load_make(file, spec["make"])
    memory = Memory()
    memory.start(spec["device"])
    seed_all(spec["seed"])
    job = make(arm, spec["seed"])
    if not isinstance(job, Job):
        raise CannotLoad(f"{file}: {spec['make']}() returned {type(job).__name__}; expected a halfstep.Job")
    if arm.fingerprint is None:
        raise CannotLoad(f"{file}: {spec['make']}() did not call arm.apply(model), so that every arm would train alike")
    run = Run(arm, job, spec["device"], spec["every"], spec["look"], spec["trace"], tell)
    meter = Meter(spec["device"])
    meter.idle()
    seed_all(spec["seed"])
    job.model.train()
    meter.start()
    start = time.perf_counter()
    run.train(memory)
    seconds = time.perf_counter() - start
    energy = meter.stop()
    numbers, correct, labels, _ = evaluated(arm, job)
    stats = run.scaler.stats() if arm.scales else None
    result = {"seed": spec["seed"], "metrics": {k: number(v) for k, v in numbers.items()}, "metric": job.metric or next(iter(numbers)), "better": job.better,
              "correct": None if correct is None else "".join(map(str, correct)), "labels": labels if spec["look"] else None,
              "steps": run.count, "examples": run.examples, "seconds": seconds, "time": run.clock.report(), "memory": run.memory, "ledger": run.ledger, "energy": energy,
              "losses": [[s, number(v)] for s, v in run.losses[:: max(1, len(run.losses) // 500)]],
              "skipped": stats.steps_skipped if stats else 0, "final_scale": number(stats.scale) if stats else None, "overflowed": stats.overflowed if stats else 0,
              "diagnosis": stats.diagnosis if stats else None, "scale": trajectory(spec["trace"]) if stats and spec["look"] else None,
              "matrix": matrix(arm, job) if spec["look"] else None, "shares": packed_samples(run.samples, spec["every"]) if run.samples else None,
              "optimizers": [f"{type(o).__module__.partition('.')[0]} {type(o).__name__}" for o in job.optimizers],
              "weights_fingerprint": arm.fingerprint, "data_fingerprint": fingerprint_of(run.data), "sources": sources(file.parent)}
    if result["metric"] not in numbers:
        raise CannotLoad(f"{file}: Job.metric is {job.metric!r}, but evaluate() returned {', '.join(numbers)}")
    return result


def fingerprint_of(texts):
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def write(path, value):
    """Atomically: whoever reads sees all of it or nothing."""
    with replacing(path, text=True) as file:
        json.dump(value, file, allow_nan=False, separators=(",", ":"))


class Teller:
    """Progress to the parent, a line now and then."""

    def __init__(self, descriptor):
        self._descriptor, self._last = descriptor, 0.0

    def __call__(self, done, total):
        now = time.monotonic()
        if now - self._last > 0.1 or done == total:
            self._last = now
            with contextlib.suppress(OSError):  # a parent that was killed listens no more
                os.write(self._descriptor, f"{done} {total}\n".encode())


def main(path, descriptor):
    global running
    running = True
    spec = json.loads(Path(path).read_text())
    try:
        result = {"key": spec["key"], **measure(spec, Teller(descriptor))}
    except BaseException as error:
        if not isinstance(error, CannotLoad):
            traceback.print_exc()
        write(spec["result"], {"key": spec["key"], "error": {"line": str(error) if isinstance(error, CannotLoad) else last_line(error), "load": isinstance(error, CannotLoad)}})
        sys.exit(1)
    write(spec["result"], result)
