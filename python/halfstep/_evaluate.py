"""Whether FP16 is good enough for a trained model: an error table against FP64, and the modules that must stay in FP32 (docs/export.md)."""

import json
import math
from dataclasses import asdict, dataclass, field

import torch

from ._deploy import DTYPES, deployable, islands_asked
from ._job import tensors
from ._recording import OVERFLOW, number
from ._room import dtype_name
from ._shares import Shares, shares
from ._table import table

MODULE_ERROR = 0.05  # of a module's output: root mean square of the error over that of the output. FP16 alone is a hundred times better

@dataclass
class Precision:
    """What a model gives in one dtype, against FP64. Errors are over results that are finite in both."""

    max_error: "float | None" = None       #: largest |result - FP64's|
    mean_error: "float | None" = None      #: its mean
    relative_error: "float | None" = None  #: the mean over the root mean square of FP64's results
    nonfinite: int = 0                     #: results that are inf or NaN and finite in FP64
    results: int = 0                       #: how many there are
    items: int = 0                         #: rows of logits; 0 where there are no classes
    flips: int = 0                         #: of these, with another class than in FP64
    widest_flip: float = 0.0               #: of these, the largest distance in FP64 of the two classes' logits
    loss: "float | None" = None
    metrics: "dict | None" = None
    reason: "str | None" = None            #: why it could not run


class _Tally:
    """Sums over batches."""

    def __init__(self, class_dim):
        self.row, self._dim = Precision(), class_dim
        self._sum, self._squares, self._compared, self._losses, self._examples = 0.0, 0.0, 0, 0.0, 0

    def add(self, found, reference):
        """Takes a batch in; returns how bad it is: (results that are not finite, mean error)."""
        row = self.row
        if found.shape != reference.shape:
            raise ValueError(f"predict gives {list(found.shape)} where FP64 gives {list(reference.shape)}")
        found = found.detach().to(torch.float64)
        both = found.isfinite() & reference.isfinite()
        error = (found - reference).abs()[both]
        row.results += found.numel()
        bad = int((~found.isfinite() & reference.isfinite()).sum())
        row.nonfinite += bad
        self._compared += error.numel()
        self._sum, self._squares = self._sum + float(error.sum()), self._squares + float(reference[both].square().sum())
        row.max_error = max(row.max_error or 0.0, float(error.max()) if error.numel() else 0.0)
        if self._dim is not None and reference.dim() >= 2 and reference.shape[self._dim] > 1:
            best, chosen = reference.argmax(self._dim, keepdim=True), found.argmax(self._dim, keepdim=True)
            gap = (reference.gather(self._dim, best) - reference.gather(self._dim, chosen))[best != chosen]
            row.items, row.flips = row.items + best.numel(), row.flips + gap.numel()
            row.widest_flip = max(row.widest_flip, float(gap.max()) if gap.numel() else 0.0)
        return bad, float(error.mean()) if error.numel() else 0.0

    def lose(self, loss, examples):
        self._losses, self._examples = self._losses + float(loss) * examples, self._examples + examples

    def done(self, model, evaluate):
        row = self.row
        row.mean_error = self._sum / self._compared if self._compared else None
        if self._compared:  # results that are 0 throughout are right or infinitely wrong
            row.relative_error = self._sum / math.sqrt(self._squares * self._compared) if self._squares else math.inf if self._sum else 0.0
        row.loss = self._losses / self._examples if self._examples else None
        if evaluate is not None:
            row.metrics = {k: float(v) for k, v in evaluate(model).items() if k not in ("correct", "labels", "logits")}


@dataclass
class Evaluation:
    """What hs.evaluate found."""

    rows: dict                                    #: {dtype name: Precision}; "float16 with FP32 islands" where FP16 alone does not hold
    deploy: bool                                  #: whether FP16 as asked for is good enough
    verdict: str                                  #: "deploy in FP16: yes|no, because …"
    islands: "list | None"                        #: modules that must compute in FP32, for cast_model or hs.export; None: no set of modules helps
    layers: dict = field(default_factory=dict)    #: {innermost module: Shares of its output in FP64, as FP16 would hold it}
    weights: dict = field(default_factory=dict)   #: {parameter: Shares of its exact value}

    def __str__(self):
        form = lambda v, f="{:.2g}": "–" if v is None else f.format(v)
        extra = [n for n in next((r.metrics for r in self.rows.values() if r.metrics), None) or {}]
        lines = [["", "max error", "mean error", "relative", "not finite", "other class", "loss", *extra]]
        for name, r in self.rows.items():
            if r.reason is not None:
                lines.append([name, *["–"] * (6 + len(extra))])
                continue
            lines.append([name, form(r.max_error), form(r.mean_error), form(r.relative_error), f"{r.nonfinite} of {r.results}", f"{r.flips} of {r.items}" if r.items else "–",
                          form(r.loss, "{:.5g}"), *(form((r.metrics or {}).get(n), "{:.5g}") for n in extra)])
        shown = [i for i in range(len(lines[0])) if i < 4 or any(line[i] != "–" for line in lines[1:])]
        lines = [[line[i] for i in shown] for line in lines]
        notes = [f"{name}: {r.reason}" for name, r in self.rows.items() if r.reason is not None]
        near = sorted(((s.headroom, name) for name, s in self.layers.items() if s.headroom is not None))[:3]
        if near:
            notes.append("least headroom: " + ", ".join(f"{name} {bits:.1f} bits" for bits, name in near))
        return "\n".join([table(lines), *notes, self.verdict])

    __repr__ = __str__

    def to_json(self):
        """The table as JSON text: rows, verdict, islands, and the largest magnitude of each layer."""
        clean = lambda v: {k: clean(x) for k, x in v.items()} if isinstance(v, dict) else number(v) if isinstance(v, float) else v
        return json.dumps({"format": "halfstep-evaluation", "version": 1, "deploy": self.deploy, "verdict": self.verdict, "islands": self.islands,
                           "rows": {name: clean(asdict(row)) for name, row in self.rows.items()}, "amax": {name: number(s.amax) for name, s in self.layers.items()}}, indent=1)


def _predict(model, batch):
    """The default: batches are inputs, (inputs, …) or keyword arguments."""
    found = model(**batch) if isinstance(batch, dict) else model(batch[0] if isinstance(batch, (list, tuple)) else batch)
    return found if isinstance(found, torch.Tensor) else getattr(found, "logits", found)


def evaluate(model, optimizers, batches, dtypes=(torch.float16, torch.float32, torch.float64), *, predict=None, loss=None, evaluate=None, class_dim=-1, keep_fp32=None, weights="master",
             max_flips=0.005, max_error=0.01):
    """Runs the exact weights of `model` in each of `dtypes` over `batches` and compares with FP64; returns an Evaluation, which prints as a table.

    model, optimizers: as in evaluate_in; they are left as they are. Each dtype gets a copy of its own, built as hs.export builds it: 16 bits
    without autocast, the modules of `keep_fp32` in FP32 (None: those that cast_model kept; all norms if it was never cast).
    batches: tensors, tuples whose first is the input, or dicts of keyword arguments; on the model's device. predict(model, batch) -> logits or any
    other results, where that is not model(batch). loss(model, batch) -> scalar and evaluate(model) -> {metric: number} add columns.
    class_dim: the dimension of the logits that an item's class is the largest of; None, or one result an item: no classes.

    FP16 is good enough if it runs, if every result that is finite in FP64 is finite, and if the class differs for at most `max_flips` of the
    items (0.005); without classes, if the mean error is at most `max_error` (0.01) of the results' root mean square. Else the modules that must
    compute in FP32 are looked for: the first whose output is inf, NaN or off by 5 % in FP16, again until none is, and those whose weights do not
    fit. FP16 with them is a row of its own.
    """
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"evaluate: dtypes holds {dtype}; expected some of {', '.join(map(str, DTYPES))}")
    for name, value in (("max_flips", max_flips), ("max_error", max_error)):
        if not 0 <= value < 1:
            raise ValueError(f"evaluate: {name} is {value}; expected a share from 0 to 1")
    if isinstance(batches, (torch.Tensor, dict)):
        raise TypeError(f"evaluate: batches is one {type(batches).__name__}; expected several batches: a list, a DataLoader, x.split(128)")
    batches = list(batches) if iter(batches) is batches else batches
    run = _Evaluate(model, optimizers, batches, predict or _predict, loss, evaluate, class_dim, weights, islands_asked(model, keep_fp32))
    rows = run.rows({dtype_name(d): (d, run.kept) for d in (*dtypes, torch.float64, torch.float16)})
    wanted = [dtype_name(d) for d in dtypes]
    ok, why = _judge(rows["float16"], max_flips, max_error)
    kept, verdict = list(run.kept), f"deploy in FP16: {'yes' if ok else 'no'}, because {why}"
    islands = kept if ok else run.islands()
    if islands is None:
        verdict += "; no set of modules in FP32 helps"
    elif not ok and islands == kept:
        verdict += f"; no module alone is off by {MODULE_ERROR:.0%}"
    elif not ok:
        name = "float16 with FP32 islands"
        rows[name] = run.rows({name: (torch.float16, islands)})[name]
        helped, because = _judge(rows[name], max_flips, max_error)
        added = ", ".join(repr(n) for n in islands if n not in kept)
        verdict, wanted = f"{verdict}; with {added} in FP32: {'yes' if helped else 'no'}, because {because}", [*wanted, name]
    return Evaluation({name: rows[name] for name in dict.fromkeys(wanted)}, ok, verdict, islands, run.layers, run.weights)


def _judge(row, max_flips, max_error):
    """(whether it is good enough, why)."""
    if row.reason is not None:
        return False, row.reason
    if row.nonfinite:
        return False, f"{row.nonfinite:,} of {row.results:,} results are inf or NaN that are finite in FP64"
    if row.items:
        flips = f"{row.flips:,} of {row.items:,} items have another class than in FP64" + (f", by at most {row.widest_flip:.2g} in its logits" if row.flips else "")
        return row.flips <= max_flips * row.items, f"all {row.results:,} results are finite and {flips}" if row.flips <= max_flips * row.items else f"{flips} (allowed: {max_flips:.2%})"
    if row.relative_error is None:
        return False, "no result could be compared"
    return row.relative_error <= max_error, f"the mean error is {row.relative_error:.2g} of the results' root mean square (allowed: {max_error:g})"


class _Evaluate:
    """The runs of one evaluation."""

    def __init__(self, model, optimizers, batches, predict, loss, evaluate, class_dim, weights, kept):
        self._model, self._optimizers, self._batches, self._weights = model, optimizers, batches, weights
        self._predict, self._loss, self._metrics, self._class_dim = predict, loss, evaluate, class_dim
        self.layers, self.weights, self.kept, self._worst = {}, {}, kept, ((0, -1.0), None)

    def _twin(self, dtype, keep_fp32):
        return deployable("evaluate", self._model, self._optimizers, dtype, keep_fp32, self._weights)

    @torch.no_grad()
    def _results(self, twin, batch, call=None):
        with torch.autocast(next((p.device.type for p in twin.parameters()), "cpu"), enabled=False):
            return (call or self._predict)(twin, batch)

    def rows(self, wanted):
        """{name: Precision} of {name: (dtype, keep_fp32)}, one of them float64."""
        twins, tallies = {}, {name: _Tally(self._class_dim) for name in wanted}
        reference = self._twin(torch.float64, None)
        for name, (dtype, keep_fp32) in wanted.items():
            try:
                twins[name] = reference if dtype == torch.float64 else self._twin(dtype, keep_fp32)
            except ValueError as error:  # a weight or buffer beyond 16 bits
                tallies[name].row.reason = str(error).removesuffix("; keep it in FP32")
        first = not self.layers
        if first:
            self.weights = {name: shares(p) for name, p in reference.named_parameters() if p.is_floating_point()}
        handles = [m.register_forward_hook(self._look(n)) for n, m in reference.named_modules() if first and n and not list(m.children())]
        count = 0
        for batch in self._batches:
            count += 1
            self._batch(batch, twins, tallies, reference)
        for handle in handles:
            handle.remove()
        if not count:
            raise ValueError("evaluate: batches is empty")
        for name, twin in twins.items():
            tallies[name].done(twin, self._quietly)
        return {name: tally.row for name, tally in tallies.items()}

    def _quietly(self, twin):
        return self._results(twin, None, lambda model, _: self._metrics(model)) if self._metrics is not None else {}

    def _batch(self, batch, twins, tallies, reference):
        try:
            exact = self._results(reference, batch)
        except RuntimeError as error:
            raise RuntimeError(f"evaluate: the model does not run in float64, with which the others are compared: {str(error).strip().splitlines()[0]}") from error
        if not isinstance(exact, torch.Tensor) or not exact.is_floating_point():
            found = str(exact.dtype) if isinstance(exact, torch.Tensor) else type(exact).__name__
            raise TypeError(f"evaluate: the model gives {found}; expected a floating tensor: pass predict=lambda model, batch: …")
        if self._class_dim is not None and exact.dim() >= 2 and not -exact.dim() <= self._class_dim < exact.dim():
            raise ValueError(f"evaluate: class_dim is {self._class_dim}, but the results are {list(exact.shape)}")
        exact = exact.detach().to(torch.float64)
        for name, twin in list(twins.items()):
            tally = tallies[name]
            try:
                found = exact if twin is reference else self._results(twin, batch)
                badness = tally.add(found, exact)
                if name == "float16" and badness > self._worst[0]:
                    self._worst = badness, batch
                if self._loss is not None:
                    tally.lose(self._results(twin, batch, self._loss), next((t.shape[0] for t in tensors(batch) if t.dim()), 1))
            except (RuntimeError, ValueError) as error:  # an op that lacks the dtype
                if twin is reference:  # the loss
                    raise
                tally.row.reason = str(error).strip().splitlines()[0]
                del twins[name]

    def _look(self, name):
        def look(module, args, output):
            for t in tensors(output):
                if t.is_floating_point():
                    self.layers[name] = self.layers.get(name, Shares()) + shares(t)
        return look

    # -- FP32 islands ------------------------------------------------------------------------------
    def islands(self):
        """The modules, those kept anyway among them, that must compute in FP32 for every module's output to be near FP64's; None if no set of modules does."""
        islands = list(self.kept)
        reference = self._twin(torch.float64, None)
        for name, param in reference.named_parameters():
            owner = name.rpartition(".")[0]
            if param.is_floating_point() and bool((param.abs() >= OVERFLOW).any()) and not _within(owner, islands):
                if not owner:
                    return None
                islands = _add(islands, owner)
        batch = self._worst[1] if self._worst[1] is not None else next(iter(self._batches))
        exact, amax = {}, {}
        self._outputs(reference, batch, lambda key, values: exact.setdefault(key, values))
        for (name, _), values in exact.items():
            amax[name] = max([amax.get(name, 0.0), *(float(v[v.isfinite()].abs().max()) for v in values if bool(v.isfinite().any()))])
        while True:
            bad = []
            try:
                self._outputs(self._twin(torch.float16, islands), batch, lambda key, values: bad.append(key[0]) if _off(values, exact.get(key, ())) else None)
            except (RuntimeError, ValueError):
                return None
            if not bad:
                return islands
            name = _around(bad[0], islands, amax)  # the first whose call ended: what comes after it has its error
            if name is None:
                return None
            islands = _add(islands, name)

    def _outputs(self, twin, batch, tell):
        """tell((module, number of the call), its floating outputs in FP64), in the order in which the calls end."""
        calls = {}

        def look(name):
            def hook(module, args, output):
                calls[name] = calls.get(name, 0) + 1
                tell((name, calls[name]), [t.detach().double() for t in tensors(output) if t.is_floating_point() and t.numel()])
            return hook

        handles = [module.register_forward_hook(look(name)) for name, module in twin.named_modules()]
        try:
            self._results(twin, batch)
        finally:
            for handle in handles:
                handle.remove()


def _off(values, exact):
    """Whether an output of a module is not finite where FP64's is, or off by MODULE_ERROR."""
    for v, e in zip(values, exact):
        finite = e.isfinite()
        if v.shape != e.shape or not bool(v[finite].isfinite().all()):
            return v.shape == e.shape
        if float((v - e)[finite].square().sum()) > MODULE_ERROR**2 * float(e[finite].square().sum()):
            return True
    return False


def _within(name, islands):
    return next((i for i in islands if name == i or name.startswith(i + ".")), None)


def _around(name, islands, amax):
    """The smallest module around `name` that is no island yet and whose output fits FP16; None if that is the whole model."""
    name = _within(name, islands) or name
    if name in islands or amax.get(name, 0.0) >= OVERFLOW:
        name = name.rpartition(".")[0]
        while name and amax.get(name, 0.0) >= OVERFLOW:
            name = name.rpartition(".")[0]
    return name or None


def _add(islands, name):
    return [i for i in islands if not i.startswith(name + ".")] + [name]
