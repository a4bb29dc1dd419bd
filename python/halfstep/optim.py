"""Master-weight optimizers. The update itself is one op a parameter group; these classes hold its tensors."""

import copy
import inspect

import torch

from . import checkpoint
from ._backward import BackwardStats
from ._library import _C, H, fence, grad_stats, step_op, to_device
from ._modes import describe, mode, plain_mode
from ._room import LIMIT, MASTERS, SIXTEEN, STATES, Room, Turn, capturing, check_fits, check_parameter, dtype_name, names_of, own, take_exact, warn_edited, warn_overflow
from ._stats import Names


def _groups(params):
    """[group] with every iterable made a list, so that all of it can be checked before anything is kept."""
    if isinstance(params, torch.Tensor):
        raise TypeError(f"params is a tensor ({params.dtype}{list(params.shape)}); expected an iterable of tensors, (name, tensor) pairs or groups")
    params = list(params)
    if not params:
        raise ValueError("optimizer got an empty parameter list")
    groups = [dict(g) for g in params] if params and isinstance(params[0], dict) else [{"params": params}]
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        seen = {}
        for member in members:  # a tied parameter is stepped once
            seen.setdefault(id(member[1] if isinstance(member, tuple) else member), member)
        group["params"] = list(seen.values())
    return groups


def _check_group(group, index, owned):
    """Dtypes, devices and layouts of a group's parameters; `owned`: {id: name} of those in earlier groups."""
    named = [m if isinstance(m, tuple) else (None, m) for m in group["params"]]
    given = group.get("param_names") or [None] * len(named)
    first = None
    for i, ((own, param), other) in enumerate(zip(named, given)):
        name = own or other or f"group {index}, parameter {i}"
        if not isinstance(param, torch.Tensor):
            raise TypeError(f"'{name}' is {type(param).__name__}; expected a tensor")
        if id(param) in owned:
            raise ValueError(f"'{name}' is in an earlier parameter group too, as '{owned[id(param)]}'")
        first = (param, name) if first is None else first
        check_parameter(param, name, *first)
        owned[id(param)] = name


def _check_lr(lr):
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {list(lr.shape)}; expected one element")
    elif not lr >= 0:
        raise ValueError(f"lr is {lr}; expected a number >= 0")


def narrow(optimizer):
    """Parameters whose gradient unscale_ made FP32 get the next one in their own dtype again."""
    for param in optimizer._turn.widened:
        grad, param.grad = param.grad, None
        param.grad_dtype = param.dtype
        param.grad = None if grad is None else grad.to(param.dtype)
    optimizer._turn.widened = []


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: masters, skips, clipping, checkpoints. Subclasses give the op, its numbers and its states.

    master: what keeps a 16-bit weight exact: "split16" (an int16 beside it), "split8" (an int8), "kahan" (its rounding
    error in its own dtype), "fp32", "fp64"; or nothing: "stochastic" (rounded at random, the expected value is kept),
    "none". "auto" is split16 for 16-bit parameters and none otherwise. states: "fp32", "bf16" or "int8" (blocks of 128
    under one scale); parameters computed in FP64 keep FP64 states. grad_dtype="fp32": micro-batches are summed in FP32.
    max_grad_norm: global-norm clip over all groups, folded into the step. ema_decay: a running mean of the exact weights,
    ema_params(). zero_grads: the step leaves zeroed gradients behind. skip_nonfinite: without a scaler, a step with a
    non-finite gradient changes nothing and is counted in steps_skipped. seed: of all rounding at random.
    master, states, grad_dtype, ema_decay and seed may differ from group to group.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves unscaling and skipping to us
    _in_backward = False
    _op = None  # the step op
    _tensor_states = ()  # states of one element a parameter; the others have the parameter's shape
    _norm_pass = False  # whether the rule reads every tensor once more, for its norms

    def __init__(self, params, defaults, *, master="auto", states="fp32", grad_dtype="param", max_grad_norm=None, ema_decay=None,
                 zero_grads=False, skip_nonfinite=True, seed=0, foreach=None, fused=None, capturable=False, differentiable=False):
        if differentiable:
            raise ValueError("differentiable=True is not supported: the update is one op without a derivative")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number >= 0 or None")
        defaults = {**defaults, "master": master, "states": states, "grad_dtype": grad_dtype, "ema_decay": ema_decay, "seed": seed}
        self.max_grad_norm, self.skip_nonfinite, self.zero_grads = max_grad_norm, skip_nonfinite, bool(zero_grads)
        self._rooms, self._turn, self._skipped = [], Turn(), None
        self._check_options(defaults)
        groups, owned = _groups(params), {}
        for index, group in enumerate(groups):
            self._check_options({**defaults, **group})
            _check_group(group, index, owned)
        self._checked = True
        super().__init__(groups, defaults)
        self._checked = False
        _C.release_freed_memory()  # the FP32 weights that a cast model kept, among others
        self._skipped = torch.zeros(1, dtype=torch.float64, device=self._rooms[0].steps.device)  # not 0-d: see Room.device_lr

    def __init_subclass__(cls, **kw):
        """The signature that help() shows: a rule's own arguments, then those of all."""
        super().__init_subclass__(**kw)
        own, ours = (list(inspect.signature(c.__init__).parameters.values())[1:] for c in (cls, Optimizer))
        kept, names = [p for p in own if p.kind != inspect.Parameter.VAR_KEYWORD], {p.name for p in own}
        if "__init__" in cls.__dict__ and len(kept) < len(own):  # its **keywords are handed on
            cls.__signature__ = inspect.Signature(kept + [p for p in ours if p.kind == inspect.Parameter.KEYWORD_ONLY and p.name not in names])

    def _check_options(self, options):
        """Refuses an option by name and value; subclasses add theirs."""
        if options["master"] not in MASTERS:
            raise ValueError(f"master is {options['master']!r}; expected one of {', '.join(MASTERS)}")
        if options["grad_dtype"] not in ("param", "fp32"):
            raise ValueError(f"grad_dtype is {options['grad_dtype']!r}; expected 'param' or 'fp32'")
        if options["states"] not in STATES:
            raise ValueError(f"states is {options['states']!r}; expected one of {', '.join(STATES)}")
        if options["ema_decay"] is not None and not 0 <= options["ema_decay"] <= 1:
            raise ValueError(f"ema_decay is {options['ema_decay']}; expected a number from 0 to 1, or None")
        if not isinstance(options["seed"], int) or isinstance(options["seed"], bool) or not 0 <= options["seed"] < 2**32:
            raise ValueError(f"seed is {options['seed']!r}; expected an integer from 0 to 2**32 - 1")
        for i, beta in enumerate(options.get("betas", ())):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; expected 0 <= beta < 1")
        if len(options.get("betas", (0, 0))) != 2:
            raise ValueError(f"betas is {options['betas']}; expected two numbers")
        if not options.get("eps", 0) >= 0:
            raise ValueError(f"eps is {options['eps']}; expected a number >= 0")
        _check_lr(options["lr"])
        if not options["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {options['weight_decay']}; expected a number >= 0")

    def add_param_group(self, param_group):
        """Adds a group between steps; it is checked whole before anything is kept."""
        if capturing():
            raise RuntimeError("add_param_group inside a captured graph; do it between steps, outside the capture")
        if not self._checked:
            param_group = _groups([param_group])[0]
            self._check_options({**self.defaults, **param_group})
            _check_group(param_group, len(self.param_groups), {id(p): name for room in self._rooms for p, name in zip(room.params, room.names)})
        lr = param_group.get("lr", self.defaults["lr"])
        if isinstance(lr, torch.Tensor):
            param_group["lr"] = lr.clone()  # each group's own; schedulers then write into it
        self._complete(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        room = Room(group, len(self.param_groups) - 1, self._state_names(group), self._tensor_states, self._initial(group), self.zero_grads)
        self._rooms.append(room)
        if self._in_backward:
            room.backward = BackwardStats(room)
        room.publish(self.state)
        for param in room.params:
            own(param, self)
        if not self._checked:
            _C.release_freed_memory()

    # -- what a rule says of itself ----------------------------------------------------------------
    def _complete(self, group):
        """Options of a new group that follow from others."""

    def _state_names(self, group):
        raise NotImplementedError

    def _initial(self, group):
        """{state: the value it begins at} where that is not zero."""
        return {}

    def _numbers(self, group):
        """The numbers of the op (csrc/ops/optim.h)."""
        raise NotImplementedError

    def _apply(self, room, grads, lr, control):
        type(self)._op(*room.frame(grads, lr, control), **room.frame_numbers(), **self._numbers(room.group))

    # -- the step --------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._turn.handed is not None:  # by our scaler, which calls step() so that hooks and wrappers of it run
            handed, self._turn.handed = self._turn.handed, None
            self._step_with(*handed)
        else:
            # torch.amp.GradScaler leaves these two here for optimizers with _step_supports_amp_scaling.
            scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            self._step_with(None if scale is None else scale.reshape(()).float(), None if found_inf is None else found_inf.reshape(()).float())
        return loss

    @property
    def _opt_called(self):
        """What torch's schedulers ask, to see that step() came first; a compiled step cannot leave it here."""
        return self.__dict__.get("_opt_called", False) or any(room.versions is None for room in self._rooms)

    @_opt_called.setter
    def _opt_called(self, value):
        self.__dict__["_opt_called"] = value

    def zero_grad(self, set_to_none=True):
        """torch's; and gradients that unscale_ made FP32 come back in the parameter's dtype."""
        if torch.compiler.is_compiling():
            self._zero_grad_compiled(set_to_none)
        else:
            super().zero_grad(set_to_none)
        self._turn.clip = None
        narrow(self)

    def _zero_grad_compiled(self, set_to_none):
        """torch's without its profiler, which torch.compile does not trace."""
        for room in self._rooms:
            for param in room.params:
                if set_to_none:
                    param.grad = None
                elif param.grad is not None:
                    param.grad.zero_()

    def __getstate__(self):
        own = ("max_grad_norm", "skip_nonfinite", "zero_grads", "_rooms", "_skipped")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._turn, self._checked = Turn(), False
        for room in self._rooms:
            room.publish(self.state)

    def stats_in_backward(self, enabled=True):
        """Statistics of each gradient are taken in the backward as it appears, while it is in the cache, instead of in the step.

        The step is the same, bit for bit. A gradient that is replaced or edited after its backward is read again in the step;
        edits that torch does not count (`.grad.data`, memory written by other libraries) need `stats_in_backward(False)`.
        Where torch.distributed is initialized, gradients are reduced later and the step reads them all. docs/telemetry.md.
        """
        self._in_backward = enabled
        for room in self._rooms:
            if room.backward is not None:
                room.backward.remove()
            room.backward = BackwardStats(room) if enabled else None

    def _gather(self):
        """[(room, gradients)] of every group that has one."""
        gathered = []
        for room in self._rooms:
            frozen = room.frozen
            grads = room.gather()
            if room.frozen is not frozen:
                room.publish(self.state)
            if grads is not None:
                gathered.append((room, grads))
        return gathered

    @torch.no_grad()
    def _gather_stats(self):
        """grad_stats of every group that has a gradient, as (room, stats, gradients)."""
        stats = []
        for room, grads in self._gather():
            try:
                stats.append((room, room.statistics(grads), grads))
            except RuntimeError:
                room.refuse_sparse(grads)
                raise
        return stats

    @torch.no_grad()
    def _step_with(self, scale=None, found_inf=None, stats=None):
        clip, self._turn.clip = self._turn.clip, None
        compiling = torch.compiler.is_compiling()
        if compiling:
            self._follow_edits_compiled()
        else:
            self._follow_edits()
        judged = scale is not None or found_inf is not None
        needs_stats = judged or self.max_grad_norm is not None or self.skip_nonfinite
        if stats is None and needs_stats:
            stats = self._gather_stats()
        work = self._gather() if stats is None else [(room, grads) for room, _, grads in stats]
        if not needs_stats:
            for room, grads in work:
                room.refuse_sparse(grads)
        if not compiling and capturing():
            for room, grads in work:
                room.check_capture(grads)
        control = self._make_control(scale, found_inf, clip, [s for _, s, _ in stats or []])
        if control is not None and not judged and not self.skip_nonfinite:
            control[0] = 0.0
        rates = [room.device_lr() for room, _ in work]
        for (room, grads), lr in zip(work, rates):
            fence(room.params)
            self._apply(room, grads, lr, None if control is None else to_device(control, room.steps.device))
        self._turn.control = control
        self._count_skip(judged, control)
        for room, grads in work:
            room.stepped(grads)
        if not compiling:
            if self.zero_grads and self._turn.widened:
                narrow(self)
            torch.clear_autocast_cache()
            self.report_overflow()

    def _make_control(self, scale, found_inf, clip, stats):
        inputs = [t for t in (*stats[:1], found_inf, clip, scale) if t is not None]
        if not inputs:
            return None
        to = lambda t: None if t is None else to_device(t, inputs[0].device)
        return H.step_control([to(s) for s in stats], to(scale), to(found_inf), to(clip), -1.0 if self.max_grad_norm is None else float(self.max_grad_norm))

    def _count_skip(self, judged, control):
        if control is not None and not judged:
            self._skipped.add_(to_device(control[:1], self._skipped.device))

    @property
    def steps_skipped(self):
        """Steps without a scaler that a non-finite gradient skipped. Reads device memory."""
        return int(self._skipped)

    def report_overflow(self, wait=False):
        """Warns of weights that were kept from leaving the 16-bit range. A GPU is read only with `wait`."""
        for room in self._rooms:
            if wait or room.overflowed.device.type == "cpu":
                for i, elements in room.newly_overflowed():
                    warn_overflow(room.names[i], room.params[i].dtype, elements, int(room.steps[i]))

    def _remember(self):
        for room in self._rooms:
            room.remember()

    def _overflow_total(self):
        return [room.overflowed.sum() for room in self._rooms]

    def _follow_edits(self, report=True):
        names = []
        for room in self._rooms:
            if room.changed():
                edited, replaced = room.catch_up()
                names += edited
                if replaced:
                    room.publish(self.state)
        if names and report:
            warn_edited(names)

    def _follow_edits_compiled(self):
        """A graph cannot ask for versions: masters that do not round to their weights are looked for in each step."""
        for room in self._rooms:
            room.follow_compiled()

    # -- masters ---------------------------------------------------------------------------------
    @torch.no_grad()
    def master_params(self):
        """Copies of the exact weights, FP32 (FP64 where the weight or its master is), in the order of the parameters."""
        self._follow_edits()
        return [m for room in self._rooms for m in (H.read_masters(room.raw, room.masters) if room.params else [])]

    @torch.no_grad()
    def set_master_params(self, values):
        """Sets weights and masters exactly. Refuses values that do not fit before anything is written."""
        values = list(values)
        self._follow_edits()
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
                                 room.raw, room.masters, torch.zeros_like(room.overflowed))
            start += n
            room.restart_emas(range(n))
            room.remember()

    @torch.no_grad()
    def ema_params(self):
        """Copies of the running means of the exact weights, in the order of the parameters; the exact weight where a parameter has none."""
        if not any(room.emas for room in self._rooms):
            raise RuntimeError("ema_params: no parameter group has an ema_decay")
        self._follow_edits()
        return [value for room in self._rooms for value in room.ema_params()]

    @torch.no_grad()
    def refresh_masters(self):
        """Makes masters follow weights that were edited through .data. Returns {name: elements changed}."""
        self._follow_edits()
        found = {}
        for room in self._rooms:
            found.update({name: count for name, count, _ in room.refresh(range(len(room.params)))})
            room.restart_emas(range(len(room.params)))
            room.remember()
        return found

    # -- checkpoints -----------------------------------------------------------------------------
    def state_dict(self, packed=False):
        """torch's keys in FP32 (FP64) plus `master` and `ema`, or with packed=True what is held in less as it is held. All tensors are copies."""
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
        judged = self.skip_nonfinite or self.max_grad_norm is not None
        modes = []
        for room in self._rooms:
            for i, param in enumerate(room.params):
                modes.append((None if i in room.frozen else mode(room, i, judged, self._norm_pass), param.numel()))
        return f"{super().__repr__()}\n{describe(modes)}"


class _AdamBase(Optimizer):
    def _state_names(self, group):
        return ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])

    def _numbers(self, g):
        return {"beta1": g["betas"][0], "beta2": g["betas"][1], "eps": g["eps"], "weight_decay": g["weight_decay"], "amsgrad": g["amsgrad"], "maximize": g["maximize"]}


class Adam(_AdamBase):
    """torch.optim.Adam's rule (L2 weight decay added to the gradient) on exact masters."""

    _op = staticmethod(step_op("adam_step_"))

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *, maximize=False, **ours):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize), **ours)


class AdamW(_AdamBase):
    """torch.optim.AdamW's rule (decoupled weight decay) on exact masters.

    params: tensors, groups, or model.named_parameters() (errors then carry names); float16, bfloat16, float32, float64.
    decay_order: "torch" multiplies the weight by 1 - lr * weight_decay first, "apex" adds weight_decay * weight to the
    update. decouple_lr: decay by weight_decay * lr / max_lr, apart from the size of lr; max_lr is the lr that a group
    begins with unless it is given. Further options: see Optimizer.
    """

    _op = staticmethod(step_op("adamw_step_"))

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
                 decouple_lr=False, max_lr=None, decay_order="torch", **ours):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
                                      decouple_lr=decouple_lr, max_lr=max_lr, decay_order=decay_order), **ours)

    def _check_options(self, options):
        super()._check_options(options)
        if options["decay_order"] not in ("torch", "apex"):
            raise ValueError(f"decay_order is {options['decay_order']!r}; expected 'torch' or 'apex'")
        if options["decouple_lr"] and not _max_lr(options) > 0:
            raise ValueError(f"decouple_lr divides by max_lr, which is {_max_lr(options)}; pass the largest lr of the schedule as max_lr")

    def _complete(self, group):
        options = {**self.defaults, **group}
        if options["decouple_lr"]:
            group["max_lr"] = _max_lr(options)

    def _numbers(self, g):
        return {**super()._numbers(g), "max_lr": g["max_lr"] if g["decouple_lr"] else 0.0, "decay_in_update": g["decay_order"] == "apex"}


def _max_lr(options):
    return float(options["lr"] if options["max_lr"] is None else options["max_lr"])


class SGD(Optimizer):
    """torch.optim.SGD's rule (momentum, dampening, nesterov, L2 weight decay) on exact masters."""

    _op = staticmethod(step_op("sgd_step_"))

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *, maximize=False, **ours):
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize), **ours)

    def _check_options(self, options):
        super()._check_options(options)
        momentum, dampening = options["momentum"], options["dampening"]
        if not momentum >= 0:
            raise ValueError(f"momentum is {momentum}; expected a number >= 0")
        if options["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0; momentum is {momentum}, dampening is {dampening}")

    def _state_names(self, group):
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def _numbers(self, g):
        return {key: g[key] for key in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")}


class Snapshot:
    """Weights and state of an optimizer before a step that evaluates its closure several times, to take the step back."""

    def __init__(self, optimizer, weights):
        self.optimizer, self.weights = optimizer, [(w, w.detach().clone()) for w in weights]
        self.state = {param: copy.deepcopy(state) for param, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self):
        for weight, value in self.weights:
            weight.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


class Overflow(Exception):
    """A later evaluation of a closure gave a non-finite gradient."""


def evaluates_again(optimizer):
    """Whether its step may call the closure more than once: it demands one (LBFGS), or it is not torch's."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return not type(optimizer).__module__.startswith("torch.optim.") or closure is None or closure.default is inspect.Parameter.empty


def _is_state(value, param):
    return isinstance(value, torch.Tensor) and value.shape == param.shape and value.dim() > 0


class Masters(torch.optim.Optimizer):
    """Any other optimizer on exact masters: Masters(torch.optim.RMSprop, params, lr=1e-3).

    The inner optimizer steps on FP32 (or FP64) copies; gradients are unscaled into them and the weights are rounded
    from them. Its groups and ours show the same numbers, whichever of the two a scheduler writes. A step costs one
    synchronisation, since a stock optimizer cannot be skipped on the device. Where a closure is evaluated several times
    (LBFGS), a non-finite gradient in any evaluation takes the whole step back.
    """

    _step_supports_amp_scaling = True
    max_grad_norm = None

    def __init__(self, optimizer_class, params, master="fp32", **kw):
        if master not in ("fp32", "fp64"):
            raise ValueError(f"master is {master!r}; expected 'fp32' or 'fp64'")
        self._dtype = torch.float32 if master == "fp32" else torch.float64
        self.inner, self._pairs, self._names, self._synced = None, [], [], []
        self._turn = Turn()
        self._rooms, self.steps_skipped, self._steps = [], 0, 0
        groups, owned = _groups(params), {}
        for index, group in enumerate(groups):
            _check_group(group, index, owned)
        super().__init__(groups, dict(kw))
        copies = [self._copies(group) for group in self.param_groups]
        self.inner = optimizer_class([self._inner_group(g, c) for g, c in zip(self.param_groups, copies)], **kw)
        for index, (group, inner, made) in enumerate(zip(self.param_groups, self.inner.param_groups, copies)):
            self._adopt(index, group, inner, made)

    @torch.no_grad()
    def _copies(self, group):
        made = []
        for param in group["params"]:
            exact = getattr(param, "_halfstep_exact", None)
            if exact is not None:
                exact = torch.where(exact.to(param.device, param.dtype) == param, exact.to(param.device), param.to(exact.dtype))
            value = param.detach() if exact is None else exact
            made.append(torch.nn.Parameter(value.to(torch.float64 if param.dtype == torch.float64 else self._dtype, copy=True), requires_grad=param.requires_grad))
        return made

    @staticmethod
    def _inner_group(group, copies):
        return {**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "params": copies}

    def _adopt(self, index, group, inner, copies):
        """A group is complete: its pairs, names and numbers are ours from here on."""
        group.update({k: v for k, v in inner.items() if k not in ("params", "param_names")})
        self._synced.append({k: v for k, v in inner.items() if k not in ("params", "param_names")})
        self._pairs += zip(group["params"], copies)
        self._names += names_of(group, index)
        for param in group["params"]:
            take_exact(param)
            own(param, self)
        self.overflowed = [0] * len(self._pairs)
        self._remember()

    def add_param_group(self, param_group):
        """Adds a group between steps, here and to the inner optimizer."""
        if self.inner is None:  # during construction
            return super().add_param_group(param_group)
        if capturing():
            raise RuntimeError("add_param_group inside a captured graph; do it between steps, outside the capture")
        param_group = _groups([param_group])[0]
        _check_group(param_group, len(self.param_groups), {id(p): name for (p, _), name in zip(self._pairs, self._names)})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        copies, overflowed = self._copies(group), self.overflowed
        try:
            self.inner.add_param_group(self._inner_group(group, copies))
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt(len(self.param_groups) - 1, group, self.inner.param_groups[-1], copies)
        self.overflowed[: len(overflowed)] = overflowed

    def zero_grad(self, set_to_none=True):
        """torch's; and gradients that unscale_ made FP32 come back in the parameter's dtype."""
        super().zero_grad(set_to_none)
        self._turn.clip = None
        narrow(self)

    # -- what changed since the last step ----------------------------------------------------------
    def _remember(self):
        self._seen = [(p._version, p.data_ptr()) for p, _ in self._pairs]

    @torch.no_grad()
    def _follow_edits(self):
        edited = []
        for i, (param, master) in enumerate(self._pairs):
            if (param._version, param.data_ptr()) != self._seen[i] and self._follow(i, param, master):
                edited.append(self._names[i])
        self._remember()
        if edited:
            warn_edited(edited)

    def _follow(self, i, param, master):
        """The master goes where its weight went and takes its edited elements; returns how many there were."""
        if param.shape != master.shape or not param.is_floating_point():
            raise RuntimeError(f"'{self._names[i]}' is {dtype_name(param.dtype)}{list(param.shape)} but its master is {list(master.shape)}; convert the model first, then make the optimizer")
        if param.device != master.device:
            master.data = master.data.to(param.device)
            state = self.inner.state[master]
            state.update({k: v.to(param.device) for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0})
        differs = (master.to(param.dtype) != param) & ~(master.isnan() & param.isnan())
        count = int(differs.sum())
        if count:
            master.copy_(torch.where(differs, param.to(master.dtype), master))
        return count

    def _sync_groups(self):
        """Whichever of the two groups was written since the last step gives the number to the other."""
        other = lambda a, b: a is not b if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) else a != b
        for group, inner, last in zip(self.param_groups, self.inner.param_groups, self._synced):
            for key in [k for k in inner if k not in ("params", "param_names")]:
                if key in group and other(group[key], last.get(key)):
                    inner[key] = group[key]
                group[key] = last[key] = inner[key]

    # -- the step ----------------------------------------------------------------------------------
    @torch.no_grad()
    def _gather_stats(self):
        """grad_stats of the gradients there are, one table a device, as (names, stats, None)."""
        devices = {}
        for (param, _), name in zip(self._pairs, self._names):
            grad = param.grad
            if grad is not None:
                grads, names = devices.setdefault(grad.device, ([], []))
                grads.append(grad.coalesce()._values() if grad.is_sparse else grad)
                names.append(name)
        return [(Names(names), grad_stats(grads), None) for grads, names in devices.values()]

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns the closure's loss, or None."""
        if self._turn.handed is not None:  # by our scaler, which has evaluated the closure once
            handed, self._turn.handed = self._turn.handed, None
            self._step_with(*handed)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._step_with(None if scale is None else scale.reshape(()).float(), None if found_inf is None else found_inf.reshape(()).float(), None, loss, closure)
        return loss

    @torch.no_grad()
    def _step_with(self, scale=None, found_inf=None, stats=None, loss=None, closure=None):
        clip, self._turn.clip = self._turn.clip, None
        self._follow_edits()
        stats = self._gather_stats() if stats is None else stats
        if not stats:
            return
        self._turn.control = self._make_control(scale, found_inf, clip, [table for _, table, _ in stats])
        bad, factor, _, clipped = self._turn.control.tolist()
        if bad:
            self.steps_skipped += scale is None and found_inf is None
            return
        self._sync_groups()
        before = Snapshot(self.inner, [w for pair in self._pairs for w in pair]) if closure is not None and evaluates_again(self.inner) else None
        self._load_grads(factor)
        try:
            self.inner.step() if closure is None else self.inner.step(self._again(loss, closure, scale, clipped))
            self._steps += 1
            self._write_weights()
        except Overflow:
            if before is None:
                raise RuntimeError(f"{type(self.inner).__name__} evaluated its closure again and the gradients were not finite") from None
            before.restore()
            self._turn.control[0] = 1.0
        finally:
            for _, master in self._pairs:
                master.grad = None
        self._remember()
        torch.clear_autocast_cache()

    def _make_control(self, scale, found_inf, clip, stats):
        device = stats[0].device
        to = lambda t: None if t is None else to_device(t, device)
        return H.step_control([to(table) for table in stats], to(scale), to(found_inf), to(clip), -1.0)

    def _load_grads(self, factor):
        for param, master in self._pairs:
            master.grad = None if param.grad is None else param.grad.to(master.dtype, copy=True).mul_(factor)

    def _again(self, loss, closure, scale, clipped):
        """The closure as the inner optimizer sees it: masters in, exact gradients out. Its first value is known."""
        first = True

        def evaluate():
            nonlocal first
            if first:
                first = False
                return loss
            with torch.no_grad():
                self._write_weights()
            with torch.enable_grad():
                value = closure()
            bad, factor, _, _ = self._make_control(scale, None, None, [table for _, table, _ in self._gather_stats()]).tolist()
            if bad:
                raise Overflow
            with torch.no_grad():
                self._load_grads(factor * clipped)
            return value

        return evaluate

    def _write_weights(self):
        """Weights are rounded once from their masters; an element that would leave the 16-bit range keeps its weight."""
        for i, (param, master) in enumerate(self._pairs):
            if param.grad is None:
                continue
            if param.dtype not in SIXTEEN:
                param.copy_(master)
                continue
            beyond = master.abs() >= LIMIT[param.dtype]
            count = int(beyond.sum())
            if count:
                master.copy_(torch.where(beyond, param.to(master.dtype), master))
                self.overflowed[i] += count
                warn_overflow(self._names[i], param.dtype, count, self._steps)
            weight = param.detach()
            H.write_masters_([master.detach()], [weight], [master.detach()], torch.zeros(1, dtype=torch.int64, device=param.device))
            torch.autograd.graph.increment_version(weight)

    def _overflow_total(self):
        return [torch.tensor(float(sum(self.overflowed)))]

    def refresh_masters(self):
        """Makes masters follow weights that were edited through .data. Returns {name: elements changed}."""
        with torch.no_grad():
            found = {name: self._follow(i, *pair) for i, (pair, name) in enumerate(zip(self._pairs, self._names))}
        self._remember()
        return {name: count for name, count in found.items() if count}

    @torch.no_grad()
    def set_master_params(self, values):
        """Sets weights and masters exactly. Refuses values that do not fit before anything is written."""
        values = list(values)
        if len(values) != len(self._pairs):
            raise ValueError(f"set_master_params: values has {len(values)} entries but the optimizer has {len(self._pairs)} parameters")
        for value, (param, _), name in zip(values, self._pairs, self._names):
            check_fits(value, param, name)
        for value, (param, master) in zip(values, self._pairs):
            master.copy_(value)
            param.copy_(master)
        self._remember()

    def __repr__(self):
        states = lambda master: [v.dtype for v in self.inner.state.get(master, {}).values() if _is_state(v, master)]
        modes = [(plain_mode(param, None if master.dtype == param.dtype else master.dtype, states(master)), param.numel()) for param, master in self._pairs]
        return f"Masters of {self.inner!r}\n{describe(modes)}"

    @torch.no_grad()
    def master_params(self):
        """Copies of the exact weights, in the order of the parameters."""
        self._follow_edits()
        return [master.detach().clone() for _, master in self._pairs]

    def state_dict(self):
        """The inner optimizer's state dict plus `master`."""
        return checkpoint.masters_state(self)

    def load_state_dict(self, state_dict, masters="saved"):
        """Loads ours, or one of the inner class. Everything is checked first; load the model before."""
        checkpoint.load_masters_state(self, state_dict, masters)


from ._rules import Adagrad, Lamb, Lion, NovoGrad  # noqa: E402  built on Optimizer
from ._convert import from_torch, to_torch  # noqa: E402  built on the classes above
