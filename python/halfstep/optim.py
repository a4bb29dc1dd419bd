"""Master-weight optimizers. The update itself is one op a parameter group; these classes hold its tensors."""

import warnings
import weakref

import torch

from . import checkpoint
from ._library import H

_SIXTEEN = (torch.float16, torch.bfloat16)
_MASTERS = ("auto", "fp32", "fp64", "split16", "none")


def master_dtype(mode, param, name):
    """Dtype of the tensor that keeps `param` exact, or None; `mode` as the optimizer's `master`."""
    if mode == "auto":
        mode = "split16" if param.dtype in _SIXTEEN else "none"
    if mode == "none" or param.dtype == torch.float64:
        return None
    if mode == "fp64":
        return torch.float64
    if param.dtype == torch.float32:
        return None
    if mode == "fp32":
        return torch.float32
    if mode == "split16":
        return torch.int16
    raise ValueError(f"master is {mode!r} for {name}; expected one of {', '.join(_MASTERS)}")


class _Room:
    """The tensors of one parameter group, in the order of its parameters."""

    def __init__(self, optimizer, group, index):
        self.group, self.index = group, index
        self.params = group["params"]
        names = group.get("param_names")
        self.names = list(names) if names else [f"group {index}, parameter {i}" for i in range(len(self.params))]
        device = self.params[0].device if self.params else torch.device("cpu")
        n = len(self.params)
        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        self.overflowed = torch.zeros(n, dtype=torch.int64, device=device)
        self.reported = [0] * n
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.lr_value = None
        self.masters, self.states = [], {key: [] for key in optimizer._state_names(group)}
        for param, name in zip(self.params, self.names):
            self._check(param, name)
            dtype = master_dtype(group["master"], param, f"'{name}'")
            wide = torch.float64 in (param.dtype, dtype)
            self.masters.append(torch.empty(0, device=device) if dtype is None
                                else torch.zeros_like(param, dtype=dtype, requires_grad=False))
            for states in self.states.values():
                states.append(torch.zeros_like(param, dtype=torch.float64 if wide else torch.float32, requires_grad=False))
            if group["grad_dtype"] == "fp32" and param.dtype in _SIXTEEN:
                param.grad_dtype = torch.float32
        self._fill_masters()
        self.remember()

    def _check(self, param, name):
        if not param.dtype.is_floating_point or param.element_size() < 2:
            raise ValueError(f"'{name}' is {param.dtype}; expected float16, bfloat16, float32 or float64")
        if param.numel() and not torch.ops.aten.is_non_overlapping_and_dense(param):
            raise ValueError(f"'{name}' has strides {param.stride()} for shape {tuple(param.shape)}: its elements overlap or leave gaps")
        if param.dtype in _SIXTEEN and param.device.type != "meta" and not torch.isfinite(param.detach()).all():
            raise ValueError(f"'{name}' holds a non-finite value; a {param.dtype} weight must be below 65520 in magnitude")

    @torch.no_grad()
    def _fill_masters(self):
        """Masters start at what cast_model kept of the FP32 weights, else at the weights."""
        values = []
        for param in self.params:
            exact = getattr(param, "_halfstep_exact", None)
            if exact is not None:
                del param._halfstep_exact
                rounded = exact.to(param.dtype)
                exact = torch.where(rounded.to(param.device) == param.detach(), exact.to(param.device), param.detach().to(exact.dtype))
            values.append(param.detach() if exact is None else exact)
        if self.params:
            H.write_masters_(values, [p.detach() for p in self.params], self.masters, torch.zeros_like(self.overflowed))

    def remember(self):
        self.seen = [(p._version, p.data_ptr()) for p in self.params]

    def grads(self):
        grads = []
        for param, name in zip(self.params, self.names):
            grad = param.grad
            if grad is not None and grad.is_sparse:
                raise RuntimeError(f"'{name}' has a sparse gradient; this optimizer supports dense gradients only")
            grads.append(grad)
        return grads

    def device_lr(self):
        lr = self.group["lr"]
        if isinstance(lr, torch.Tensor):
            self.lr.copy_(lr)
        elif lr != self.lr_value:
            self.lr.fill_(float(lr))
            self.lr_value = lr
        return self.lr

    def edited(self):
        """Indices of parameters whose data changed since our last step."""
        return [i for i, (p, seen) in enumerate(zip(self.params, self.seen))
                if self.masters[i].numel() and (p._version, p.data_ptr()) != seen]

    @torch.no_grad()
    def refresh(self, indices, dry_run=False):
        """Names and counts of weights that their masters do not round to; unless `dry_run`, masters follow."""
        indices = [i for i in indices if self.masters[i].numel()]
        if not indices:
            return []
        changed = torch.zeros(len(indices), dtype=torch.int64, device=self.steps.device)
        H.refresh_masters_([self.params[i].detach() for i in indices], [self.masters[i] for i in indices], changed, dry_run)
        return [(self.names[i], count, self.params[i].numel()) for i, count in zip(indices, changed.tolist()) if count]

    def follow_move(self):
        """States follow parameters that were moved to another device; a changed dtype is refused."""
        for i, param in enumerate(self.params):
            if self.masters[i].numel() and self.masters[i].device != param.device or self.steps.device != param.device:
                move = lambda t: t.to(param.device)
                self.steps, self.overflowed, self.lr = move(self.steps), move(self.overflowed), move(self.lr)
                self.masters = [move(t) for t in self.masters]
                self.states = {k: [move(t) for t in v] for k, v in self.states.items()}
                return


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: masters, skips, clipping, checkpoints. `kind` subclasses give the op."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves unscaling and skipping to us

    def __init__(self, params, defaults, *, master, max_grad_norm, grad_dtype, skip_nonfinite):
        if master not in _MASTERS:
            raise ValueError(f"master is {master!r}; expected one of {', '.join(_MASTERS)}")
        if grad_dtype not in ("param", "fp32"):
            raise ValueError(f"grad_dtype is {grad_dtype!r}; expected 'param' or 'fp32'")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number >= 0 or None")
        if not isinstance(defaults["lr"], torch.Tensor) and not defaults["lr"] >= 0:
            raise ValueError(f"lr is {defaults['lr']}; expected a number >= 0")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}; expected a number >= 0")
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self._rooms, self._control, self._stats = [], None, []
        self.steps_skipped = 0
        super().__init__(params, dict(defaults, master=master, grad_dtype=grad_dtype))

    def add_param_group(self, param_group):
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("add_param_group inside a captured graph")
        if isinstance(param_group.get("lr"), torch.Tensor):
            param_group["lr"] = param_group["lr"].clone()
        elif "lr" not in param_group and isinstance(self.defaults["lr"], torch.Tensor):
            param_group["lr"] = self.defaults["lr"].clone()
        super().add_param_group(param_group)
        try:
            room = _Room(self, self.param_groups[-1], len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._rooms.append(room)
        for param in room.params:
            param._halfstep_optimizer = weakref.ref(self)
        self._publish(room)

    def _publish(self, room):
        """self.state shows the very tensors that the ops update."""
        for i, param in enumerate(room.params):
            state = {"step": room.steps[i]}
            state.update({key: tensors[i] for key, tensors in room.states.items()})
            if room.masters[i].numel():
                state["master"] = room.masters[i]
            self.state[param] = state

    # -- the step --------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler leaves these two here for optimizers with _step_supports_amp_scaling.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._step_with(scale, None if found_inf is None else found_inf.reshape(()).float())
        return loss

    @torch.no_grad()
    def _gather_stats(self):
        """grad_stats of every group that has a gradient, as (room, stats)."""
        stats = []
        for room in self._rooms:
            grads = room.grads()
            if any(g is not None for g in grads):
                stats.append((room, H.grad_stats(grads, [])))
        return stats

    @torch.no_grad()
    def _step_with(self, scale=None, found_inf=None, clip=None, stats=None):
        compiling = torch.compiler.is_compiling()
        if not compiling:
            for room in self._rooms:
                room.follow_move()
            self._follow_edits()
        judged = scale is not None or found_inf is not None
        needs_stats = judged or self.max_grad_norm is not None or self.skip_nonfinite
        if stats is None:
            stats = self._gather_stats() if needs_stats else []
        control = None
        if stats or found_inf is not None or clip is not None or scale is not None:
            device = stats[0][1].device if stats else (found_inf if found_inf is not None else clip if clip is not None else scale).device
            to = lambda t: None if t is None else t.to(device, non_blocking=True)
            control = H.step_control([to(s) for _, s in stats], to(scale), to(found_inf), to(clip),
                                     -1.0 if self.max_grad_norm is None else float(self.max_grad_norm))
            if not judged and not self.skip_nonfinite:
                control[0] = 0.0
        for room in self._rooms:
            grads = room.grads()
            if all(g is None for g in grads):
                continue
            self._apply(room, grads, None if control is None else control.to(room.steps.device, non_blocking=True))
        self._control, self._stats = control, stats
        if not compiling:
            for room in self._rooms:
                room.remember()
            torch.clear_autocast_cache()
            self._report(judged)

    def _report(self, judged):
        if self._control is not None and self._control.device.type == "cpu" and not judged:
            self.steps_skipped += int(self._control[0] != 0)
        for room in self._rooms:
            if room.overflowed.device.type == "cpu":
                self.overflow_report(room)

    def overflow_report(self, room):
        """Warns of weights that were kept from leaving the 16-bit range. Reads device memory."""
        for i, count in enumerate(room.overflowed.tolist()):
            if count > room.reported[i]:
                kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(room.params[i].dtype, str(room.params[i].dtype))
                elements = count - room.reported[i]
                warnings.warn(f"'{room.names[i]}' would leave {kind} range ({elements} element{'s' if elements > 1 else ''}, "
                              f"step {int(room.steps[i])}): keep it in FP32 or lower lr", stacklevel=5)
                room.reported[i] = count

    def _follow_edits(self):
        for room in self._rooms:
            changed = room.refresh(room.edited())
            if changed:
                text = ", ".join(f"'{name}' ({count} of {total} elements)" for name, count, total in changed[:5])
                warnings.warn(f"weights changed since the last step; their masters follow: {text}", stacklevel=5)

    # -- masters ---------------------------------------------------------------------------------
    @torch.no_grad()
    def master_params(self):
        """Copies of the exact weights, FP32 (FP64 where the weight or its master is), in the order of the parameters."""
        self._follow_edits()
        return [m for room in self._rooms for m in (H.read_masters([p.detach() for p in room.params], room.masters) if room.params else [])]

    @torch.no_grad()
    def set_master_params(self, values):
        """Sets weights and masters exactly. Refuses values that do not fit before anything is written."""
        values = list(values)
        params = [(room, i) for room in self._rooms for i in range(len(room.params))]
        if len(values) != len(params):
            raise ValueError(f"set_master_params: values has {len(values)} entries but the optimizer has {len(params)} parameters")
        for value, (room, i) in zip(values, params):
            check_fits(value, room.params[i], room.names[i])
        start = 0
        for room in self._rooms:
            n = len(room.params)
            if n:
                H.write_masters_([v.to(room.params[i].device) for i, v in enumerate(values[start:start + n])],
                                 [p.detach() for p in room.params], room.masters, torch.zeros_like(room.overflowed))
            start += n
            room.remember()

    def refresh_masters(self):
        """Makes masters follow weights that were edited through .data. Returns {name: elements changed}."""
        found = {}
        for room in self._rooms:
            found.update({name: count for name, count, _ in room.refresh(range(len(room.params)))})
            room.remember()
        return found

    # -- checkpoints -----------------------------------------------------------------------------
    def state_dict(self, packed=False):
        """torch's keys in FP32 (FP64) plus `master`, or with packed=True the int16 remainder as it is held. All tensors are copies."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = checkpoint.optimizer_state(self, packed)
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def to_torch_state_dict(self):
        """A state dict that torch.optim's class of the same name loads; FP32 weights travel through export_state_dict."""
        return checkpoint.torch_state(self)

    def load_state_dict(self, state_dict, masters="saved"):
        """Loads our format or torch.optim's. Everything is checked first; a refused load changes nothing.

        masters="from_params": keep the moments, take the masters from the weights as they are.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        checkpoint.load_optimizer_state(self, state_dict, masters)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __repr__(self):
        text = super().__repr__()
        modes = sorted({f"{p.dtype}".removeprefix("torch.") + " weights, " + (
            "no master" if not m.numel() else {torch.int16: "split16", torch.float32: "fp32", torch.float64: "fp64"}[m.dtype] + " masters")
            for room in self._rooms for p, m in zip(room.params, room.masters)})
        return text + f"\n# halfstep: {'; '.join(modes) or 'no parameters'}"


def check_fits(value, param, name):
    """Refuses a value whose weight would be infinite in the parameter's dtype."""
    if tuple(value.shape) != tuple(param.shape):
        raise ValueError(f"'{name}' is {list(param.shape)} but the value is {list(value.shape)}")
    limit = {torch.float16: 65520.0, torch.bfloat16: 3.3961775292304957e38}.get(param.dtype)
    if limit is not None:
        beyond = int((value.detach().abs() >= limit).sum())
        if beyond:
            largest = float(value.detach().abs().max())
            raise ValueError(f"'{name}' does not fit {param.dtype}: {beyond} of {value.numel()} elements are at or beyond {limit:g} (largest {largest:g}); keep it in FP32")


class _AdamBase(Optimizer):
    _op = None

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *, maximize=False,
                 foreach=None, capturable=False, differentiable=False, fused=None,
                 master="auto", grad_dtype="param", max_grad_norm=None, skip_nonfinite=True):
        if differentiable:
            raise ValueError("differentiable=True is not supported: the update is one op without a derivative")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; expected 0 <= beta < 1")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}; expected a number >= 0")
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults, master=master, max_grad_norm=max_grad_norm, grad_dtype=grad_dtype, skip_nonfinite=skip_nonfinite)

    def _state_names(self, group):
        return ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])

    def _apply(self, room, grads, control):
        g, s = room.group, room.states
        type(self)._op([p.detach() for p in room.params], grads, room.masters, s["exp_avg"], s["exp_avg_sq"], s.get("max_exp_avg_sq", []),
                       room.steps, room.overflowed, room.device_lr(), control, [], beta1=g["betas"][0], beta2=g["betas"][1],
                       eps=g["eps"], weight_decay=g["weight_decay"], amsgrad=g["amsgrad"], maximize=g["maximize"])


class Adam(_AdamBase):
    """torch.optim.Adam's rule (L2 weight decay added to the gradient) on exact masters."""

    _op = staticmethod(H.adam_step_)


class AdamW(_AdamBase):
    """torch.optim.AdamW's rule (decoupled weight decay) on exact masters.

    params: tensors, groups, or model.named_parameters() (errors then carry names); float16, bfloat16, float32, float64.
    master: what keeps a weight exact: "split16" (int16 beside a 16-bit weight), "fp32", "fp64", "none"; "auto" is split16
    for 16-bit parameters and none otherwise. max_grad_norm: global-norm clip over all groups, folded into the step.
    skip_nonfinite: without a scaler, a step with a non-finite gradient changes nothing and is counted in steps_skipped.
    """

    _op = staticmethod(H.adamw_step_)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
                 foreach=None, capturable=False, differentiable=False, fused=None,
                 master="auto", grad_dtype="param", max_grad_norm=None, skip_nonfinite=True):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, differentiable=differentiable,
                         master=master, grad_dtype=grad_dtype, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)


class SGD(Optimizer):
    """torch.optim.SGD's rule (momentum, dampening, nesterov, L2 weight decay) on exact masters."""

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *, maximize=False,
                 foreach=None, differentiable=False, fused=None,
                 master="auto", grad_dtype="param", max_grad_norm=None, skip_nonfinite=True):
        if differentiable:
            raise ValueError("differentiable=True is not supported: the update is one op without a derivative")
        if momentum < 0:
            raise ValueError(f"momentum is {momentum}; expected a number >= 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0; momentum is {momentum}, dampening is {dampening}")
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
        super().__init__(params, defaults, master=master, max_grad_norm=max_grad_norm, grad_dtype=grad_dtype, skip_nonfinite=skip_nonfinite)

    def _state_names(self, group):
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def _apply(self, room, grads, control):
        g = room.group
        H.sgd_step_([p.detach() for p in room.params], grads, room.masters, room.states.get("momentum_buffer", []), room.steps,
                    room.overflowed, room.device_lr(), control, [], momentum=g["momentum"], dampening=g["dampening"],
                    weight_decay=g["weight_decay"], nesterov=g["nesterov"], maximize=g["maximize"])


class Masters(torch.optim.Optimizer):
    """Any other optimizer on exact masters: Masters(torch.optim.RMSprop, params, lr=1e-3).

    The inner optimizer steps on FP32 (or FP64) copies; gradients are unscaled into them and the weights are rounded
    from them. A bad step costs one synchronisation, since a stock optimizer cannot be skipped on the device.
    """

    _step_supports_amp_scaling = True

    def __init__(self, optimizer_class, params, master="fp32", **kw):
        if master not in ("fp32", "fp64"):
            raise ValueError(f"master is {master!r}; expected 'fp32' or 'fp64'")
        dtype = torch.float32 if master == "fp32" else torch.float64
        super().__init__(params, dict(kw))
        self._pairs, groups = [], []
        for group in self.param_groups:
            copies = []
            for param in group["params"]:
                exact = getattr(param, "_halfstep_exact", None)
                value = param.detach() if exact is None else exact.to(param.device)
                copy = torch.nn.Parameter(value.to(dtype, copy=True)) if param.dtype != torch.float64 else torch.nn.Parameter(value.clone())
                copies.append(copy)
                self._pairs.append((param, copy))
            groups.append({**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "params": copies})
        self.inner = optimizer_class(groups, **kw)
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            group.update({k: v for k, v in inner.items() if k != "params"})
        self._control, self._stats, self._rooms = None, [], []
        self.max_grad_norm = None

    @torch.no_grad()
    def _gather_stats(self):
        grads = [p.grad for p, _ in self._pairs]
        return [(None, H.grad_stats(grads, []))] if any(g is not None for g in grads) else []

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._step_with(scale, None if found_inf is None else found_inf.reshape(()).float())
        return loss

    @torch.no_grad()
    def _step_with(self, scale=None, found_inf=None, clip=None, stats=None):
        stats = self._gather_stats() if stats is None else stats
        if not stats:
            return
        self._control, self._stats = H.step_control([s for _, s in stats], scale, found_inf, clip, -1.0), stats
        if self._control[0] != 0:
            return
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            inner.update({k: v for k, v in group.items() if k not in ("params", "param_names")})
        factor = float(self._control[1])
        for param, copy in self._pairs:
            if not torch.equal(copy.detach().to(param.dtype), param.detach()):
                copy.data.copy_(param.detach())  # the weight was edited
            copy.grad = None if param.grad is None else param.grad.to(copy.dtype).mul_(factor)
        self.inner.step()
        for param, copy in self._pairs:
            if param.grad is not None:
                check_fits(copy, param, "parameter")
                param.copy_(copy)
        torch.clear_autocast_cache()

    def master_params(self):
        return [copy.detach().clone() for _, copy in self._pairs]

    def state_dict(self):
        """The inner optimizer's state dict plus `master`."""
        return checkpoint.masters_state(self)

    def load_state_dict(self, state_dict, masters="saved"):
        """Loads ours, or one of the inner class. Everything is checked first; load the model before."""
        checkpoint.load_masters_state(self, state_dict, masters)
