"""`halfstep explain` and `halfstep size`: what each layer computes, accumulates and stores in, and where every byte is."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ._ledger import ledger
from ._table import table

_SHORT = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64"}
_CASTS = {"aten::_to_copy"}


def short(dtype):
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


@dataclass
class Layer:
    """What one module did itself, its children apart."""

    name: str
    kind: str
    stored: set = field(default_factory=set)      #: dtypes of its own parameters
    computes: set = field(default_factory=set)    #: dtypes that its products and other ops read
    gives: set = field(default_factory=set)       #: dtypes of its outputs
    casts: int = 0                                #: tensors changed from one floating dtype to another
    cast_bytes: int = 0                           #: read and written by them
    flops: dict = field(default_factory=lambda: defaultdict(int))  #: {dtype: operations} of products, forward
    backward_flops: dict = field(default_factory=lambda: defaultdict(int))

    @property
    def accumulates(self):
        """FP32 for 16-bit products, on the CPU and in the tensor cores; else the dtype itself."""
        return {torch.float32 if d in (torch.float16, torch.bfloat16) else d for d in self.flops}


def _floats(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _floats(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _floats(item)]
    return []


def _products(count, wanted):
    """`count` operations for each wanted result; a bias's gradient is a sum, not a product."""
    return count * sum(map(bool, wanted))


def _linear(x, weight, *rest, **_):
    return 2 * x.numel() * weight.shape[0]


def _linear_loss(x, weight, *rest, **_):
    return _linear(x, weight) * (1 + sum(map(bool, rest[-1][:2])))  # the logits, and what is wanted of the gradients


def _convolution(x, weight, grad, transposed):
    return conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed=transposed)


def _attention(count, tensors):
    return count(*[list(t.shape) for t in tensors])


# Of ops that torch's table lacks: ours, and attention on the CPU. Arguments as in the schema, and the result.
_FLOPS = {
    "halfstep::linear": _linear,
    "halfstep::linear_forward": _linear,
    "halfstep::linear_backward": lambda dy, x, weight, saved, activation, wanted, *_, out: _products(_linear(x, weight), wanted[:2]),
    "halfstep::linear_wgrad_": lambda into, dz, x, *_, out: 2 * x.numel() * dz.shape[-1],
    "halfstep::linear_cross_entropy_forward": _linear_loss,
    "halfstep::linear_cross_entropy_backward": lambda grad, x, weight, *rest, out: _linear_loss(x, weight, *rest),
    "halfstep::convolution": lambda x, weight, *rest, out: _convolution(x, weight, out, rest[4]),
    "halfstep::convolution_backward": lambda grad, x, weight, *rest, out: _products(_convolution(x, weight, grad, rest[4]), (rest[-1][0], True)),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_, out: _attention(sdpa_flop_count, (q, k, v)),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda grad, q, k, v, *_, out: _attention(sdpa_backward_flop_count, (grad, q, k, v)),
}


class Watch(TorchDispatchMode):
    """Sees every op of a forward and backward, and to which module it belongs."""

    def __init__(self, model):
        super().__init__()
        self.layers = {name: Layer(name, type(module).__name__, {p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()})
                       for name, module in model.named_modules()}
        self._stack, self._handles, self._model = [], [], model

    def __enter__(self):
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda m, args, name=name: self._stack.append(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def _leave(self, module, args, output):
        if self._stack:
            self.layers[self._stack.pop()].gives.update(t.dtype for t in _floats(output))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        layer = self.layers[self._stack[-1] if self._stack else ""]
        name, packet = func._schema.name, func._overloadpacket
        read = _floats(args)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        else:
            flops = _FLOPS[name](*args, out=out) if name in _FLOPS else 0
        if flops:
            backward = torch._C._current_autograd_node() is not None
            dtype = min((t.dtype for t in read if t.dim() >= 2), key=lambda d: d.itemsize)  # the operands': beside them may stand a wider bias
            (layer.backward_flops if backward else layer.flops)[dtype] += flops
        if name in _CASTS and read and isinstance(out, torch.Tensor) and out.is_floating_point() and out.dtype != read[0].dtype:
            layer.casts += 1
            layer.cast_bytes += read[0].nbytes + out.nbytes
        elif read and self._stack:
            layer.computes.update(t.dtype for t in read)
        return out


def _names(dtypes):
    return "+".join(sorted(short(d) for d in dtypes)) or "–"


def amount(value, unit="B"):
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.0f} {prefix}{unit}" if prefix == "" else f"{value:.1f} {prefix}{unit}"
        value /= 1000
    return f"{value:.1f} P{unit}"


def explain_table(layers):
    """One line a module that has parameters or products: dtypes of weights, of what it computes with, of sums and of its output, and its casts."""
    shown = [layer for layer in layers.values() if layer.stored or layer.flops]
    rows = [(layer.name or "(model)", layer.kind, _names(layer.stored), _names(set(layer.flops) or layer.computes), _names(layer.accumulates), _names(layer.gives), layer.casts, amount(layer.cast_bytes))
            for layer in shown]
    return table([("layer", "kind", "weights", "computes", "sums", "gives", "casts", "cast bytes"), *rows])


class Look:
    """One training iteration of a job, watched: what `halfstep explain` and `halfstep size` print.

    layers {module path: Layer}; activations: bytes that autograd kept between forward and backward; ledger {role: bytes} after a step.
    """

    def __init__(self, arm, job):
        self.arm, self.job = arm, job
        batch = next(iter(job.batches(0) if callable(job.batches) else job.batches))
        optimizers, scaler = job.optimizers, arm.scaler()
        own = {t.untyped_storage().data_ptr() for t in [*job.model.parameters(), *job.model.buffers()]}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        job.model.train()
        with Watch(job.model) as seen:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), arm.autocast():
                loss = job.loss(job.model, batch)
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        if scaler.is_enabled():
            scaler.update()
        self.layers, self.activations, self.ledger = seen.layers, sum(kept.values()), ledger(job.model, optimizers)

    def flops(self):
        """{dtype name: (forward, backward)} of all products."""
        total = defaultdict(lambda: [0, 0])
        for layer in self.layers.values():
            for part, found in enumerate((layer.flops, layer.backward_flops)):
                for dtype, count in found.items():
                    total[short(dtype)][part] += count
        return {name: tuple(counts) for name, counts in sorted(total.items())}

    def explain(self):
        return explain_table(self.layers)

    def size(self):
        """The ledger as text: bytes by role and per parameter, activations of the batch, operations by dtype."""
        count = sum(p.numel() for p in self.job.model.parameters())
        rows = [(role, amount(held), f"{held / count:.2f}") for role, held in self.ledger.items() if held]
        held = sum(self.ledger.values())
        rows += [("held between steps", amount(held), f"{held / count:.2f}"), ("activations of a batch", amount(self.activations), f"{self.activations / count:.2f}")]
        lines = [f"{count:,} parameters, arm {self.arm.name}", table([("", "bytes", "per parameter"), *rows]), ""]
        return "\n".join(lines + [f"{name}: {amount(f, 'FLOP')} forward, {amount(b, 'FLOP')} backward" for name, (f, b) in self.flops().items()])
