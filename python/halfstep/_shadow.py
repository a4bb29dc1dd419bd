"""One layer of a training step computed once more in FP32: what FP16 loses in it (docs/monitor.md)."""

import contextlib

import torch

from ._job import tensors
from ._library import H
from ._room import capturing, is_remainder
from ._shares import counts, rng_state, with_rng
from .optim import Masters, Optimizer


@torch.no_grad()
def exact_weight(optimizers, param):
    """The weight without rounding, in FP32 or wider: from its master, or what cast_model kept; a weight that was edited since is as it is now."""
    kept, known = getattr(param, "_halfstep_exact", None), False  # known: not edited since
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            for room in optimizer._rooms:
                at = next((i for i, p in enumerate(room.params) if p is param), None)
                if at is not None and room.pointers[at] == param.data_ptr():
                    known = room.versions is not None and room.versions[at] == param._version
                    split = is_remainder(room.masters[at], param)  # what is left beside another weight says nothing of this one
                    kept = H.read_masters([room.raw[at]], [room.masters[at]])[0] if known or not split else None
        elif isinstance(optimizer, Masters):
            kept = next((master.detach().clone() for p, master in optimizer._pairs if p is param), kept)
    wide = torch.promote_types(param.dtype, torch.float32)
    if kept is None or kept.device != param.device or kept.shape != param.shape:
        return param.detach().to(wide, copy=True)
    return kept.to(wide) if known else torch.where(kept.to(param.dtype) == param, kept.to(wide), param.detach().to(wide))


def _wide(value, leaves):
    """Copies of the tensors in `value`, floating ones in FP32 or wider; those that want a gradient go to `leaves`."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value.detach().clone()
        copy = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
        if value.requires_grad:
            leaves.append(copy.requires_grad_())
        return copy
    if isinstance(value, (list, tuple)):
        items = [_wide(v, leaves) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {k: _wide(v, leaves) for k, v in value.items()} if isinstance(value, dict) else value


class _Hook:
    """A hook that stays with its module: a copy or a pickle of the model has one that does nothing."""

    def __init__(self, function=None):
        self._function = function

    def __call__(self, *args):
        return None if self._function is None or torch.compiler.is_compiling() or capturing() else self._function(*args)

    def __reduce__(self):
        return _Hook, ()


def _source(output, inputs):
    """Where the gradient of `output` is seen even if it is edited in place later: a view that is edited leaves the graph, the tensor that it shows stays in it."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.requires_grad and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if whole and not any(t is base or t._base is base for t in inputs) else output


class _Call:
    """One call of the layer: its FP32 results, and whether it is one of the training step."""

    def __init__(self, outputs, leaves, training):
        self.outputs, self.leaves, self.counts, self.training = outputs, leaves, training and not any(o.requires_grad for o in outputs), training


class Shadow:
    """Watches one layer during one step.

    Each call is computed again in FP32 on the exact weights, from the inputs that the layer got; its gradients in FP32 from the gradient that came back to its
    outputs. So this is what the layer itself loses, not what was lost on the way to it. A call counts if a gradient came back to it: evaluations
    between steps do not. Nothing is thrown: `error` says why the layer cannot be computed so. The training sees no difference.

    scale(): what the gradients carry, a number or a 0-d tensor. `shared`: ids of parameters that other layers have too.
    """

    def __init__(self, name, module, names, optimizers, scale, shared=frozenset()):
        self.name, self.error, self.scale = name, None, None
        self._module, self._names, self._optimizers, self._scale, self._shared = module, names, optimizers, scale, shared
        self._params = list(module.parameters())
        self._leaves, self._rng, self._calls, self._gradients, self._sums, self._nonzero, self._handles = {}, [], [], [], {}, {}, []
        self._handles.append(module.register_forward_pre_hook(_Hook(self._before)))
        self._handles.append(module.register_forward_hook(_Hook(self._after), with_kwargs=True))
        for param in self._params:
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(_Hook(self._stored)))

    def remove(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextlib.contextmanager
    def _guarded(self):
        """What goes wrong in here is kept, and ends this look; the user's step goes on."""
        try:
            yield
        except Exception as error:
            self.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._forget()

    def _forget(self):
        self._leaves, self._calls, self._gradients, self._sums, self._nonzero = {}, [], [], {}, {}

    # -- the forward -------------------------------------------------------------------------------
    def _before(self, module, args):
        self._rng.append(rng_state() if torch.is_grad_enabled() and self.error is None else None)

    def _after(self, module, args, kwargs, output):
        rng = self._rng.pop() if self._rng else None
        if rng is None or self.error is not None:
            return
        with self._guarded():
            leaves, given = [], [t for t in tensors([args, kwargs]) if t._is_view() or t.requires_grad]
            args, kwargs = _wide(args, leaves), _wide(kwargs, leaves)
            with self._as_fp32(rng):
                result = [t for t in tensors(self._module.forward(*args, **kwargs)) if t.is_floating_point()]
            ours = [t for t in tensors(output) if t.is_floating_point()]
            if [t.shape for t in ours] != [t.shape for t in result]:
                raise RuntimeError("its FP32 results have other shapes")
            call = _Call(result, leaves, self._module.training)
            self._calls.append(call)
            wanted = [(i, _source(t, given)) for i, t in enumerate(ours) if t.requires_grad]
            if len(wanted) == 1:
                wanted[0][1].register_hook(lambda grad, i=wanted[0][0]: self._came(call, {i: grad}))
            elif wanted:
                torch.autograd.graph.register_multi_grad_hook([t for _, t in wanted], lambda grads: self._came(call, {i: g for (i, _), g in zip(wanted, grads) if g is not None}))

    @contextlib.contextmanager
    def _as_fp32(self, rng):
        """Inside, the layer has FP32 weights and copies of its buffers, nothing is cast, and random numbers fall as they did."""
        kept = []
        if not self._leaves:
            self._leaves = {id(p): exact_weight(self._optimizers, p).requires_grad_(p.requires_grad) for p in self._params}
        leaf = lambda p: self._leaves.get(id(p), p)
        try:
            for module in self._module.modules():
                kept.append((module, dict(module._parameters), dict(module._buffers), getattr(module, "_flat_weights", None)))
                module._parameters.update({k: leaf(p) for k, p in module._parameters.items()})
                module._buffers.update({k: _wide(b, []) for k, b in module._buffers.items()})
                if isinstance(module, torch.nn.RNNBase):
                    module._flat_weights = [leaf(p) for p in module._flat_weights]
            device = next((p.device.type for p in self._params), "cpu")
            with with_rng(rng), torch.enable_grad(), torch.autocast(device, enabled=False), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                yield
        finally:
            for module, params, buffers, flat in kept:
                module._parameters.update(params)
                module._buffers.update(buffers)
                if flat is not None:
                    module._flat_weights = flat

    # -- the backward ------------------------------------------------------------------------------
    def _came(self, call, grads):
        if self.error is not None or not self._handles or capturing():
            return
        with self._guarded(), torch.autocast(next(iter(self._leaves.values())).device.type, enabled=False):
            call.counts = True
            if self.scale is None:
                self.scale = self._scale()
            weights = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
            pairs = [(call.outputs[i], grad.detach().to(call.outputs[i].dtype).reshape(call.outputs[i].shape)) for i, grad in grads.items() if call.outputs[i].requires_grad]
            if not pairs or not call.leaves + weights:
                return
            found = torch.autograd.grad([o for o, _ in pairs], call.leaves + weights, [g for _, g in pairs], allow_unused=True, retain_graph=True)
            self._gradients += [counts(g) for g in found[:len(call.leaves)] if g is not None]
            for leaf, grad in zip(weights, found[len(call.leaves):]):
                if grad is not None:
                    self._sums[id(leaf)] = self._sums[id(leaf)] + grad if id(leaf) in self._sums else grad

    def _stored(self, param):
        if self.error is None and id(param) in self._leaves and id(param) not in self._shared:
            with self._guarded():
                self._nonzero[id(param)] = (param.grad.to_dense() if param.grad.is_sparse else param.grad) != 0

    # -- the end of the step -----------------------------------------------------------------------
    @torch.no_grad()
    def finish(self):
        """[(name, kind, counts on the device)] of the step, and no more hooks; [] where no call was one of training, or with an error."""
        self.remove()
        found, calls = [], [call for call in self._calls if call.counts]
        with self._guarded():
            for call in calls:
                found += [(self.name, "activation", counts(o)) for o in call.outputs]
            found += [(self.name, "activation gradient", row) for row in self._gradients]
            for param in self._params if calls else ():
                leaf, name = self._leaves[id(param)], self._names.get(id(param))
                if name is None or not leaf.is_floating_point():
                    continue
                found.append((name, "weight", counts(leaf)))
                grad = self._sums.get(id(leaf))
                if grad is not None:
                    found.append((name, "weight gradient", counts(grad.to_dense() if grad.is_sparse else grad, 1.0, self._nonzero.get(id(param)))))
        self._forget()
        return [] if self.error is not None else found
