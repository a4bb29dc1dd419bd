"""autocast and GradScaler, with torch.amp's names and protocol."""

import inspect
import warnings
from collections import defaultdict

import torch
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import OptState

from . import checkpoint, optim, policies
from ._library import H, fence, grad_stats, to_device
from ._room import warn
from ._stats import APPLIED, SCALE, SKIPPED, TRACKER, History, gradients, members, stats_of

_SIXTEEN = (torch.float16, torch.bfloat16)


def autocast(device_type, dtype=torch.float16, enabled=True):
    """torch.autocast with FP16 as the default dtype on every device."""
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


def _ours(optimizer):
    return isinstance(optimizer, (optim.Optimizer, optim.Masters))


@_disable_dynamo
def _outside_the_graph(method, *args, **kwargs):
    """What reads device memory on the host: torch.compile breaks its graph here, or refuses with fullgraph=True."""
    return method(*args, **kwargs)


def _traceable(optimizer):
    """Ours, with gradients in the dtype of their weights: torch 2.11 traces no parameter that may have another."""
    return isinstance(optimizer, optim.Optimizer) and not optimizer._turn.widened and not any(room.group["grad_dtype"] == "fp32" for room in optimizer._rooms)


def _needs_the_host(*optimizers):
    return torch.compiler.is_compiling() and not all(_traceable(o) for o in optimizers)


def _ready():
    """What is known of an optimizer before it is unscaled or stepped: torch's, in a form that torch.compile traces."""
    return {"stage": OptState.READY, "found_inf_per_device": {}}


class GradScaler(torch.amp.GradScaler):
    """Loss scaling with a device-side policy; torch.amp.GradScaler's whole protocol.

    Differences, each a measured defect of the stock class: FP16 gradients are accepted and never unscaled in place for
    halfstep optimizers; found_inf is an OR (`!= 0`, MAX over devices) on every path; the scale stays in the policy's bounds,
    by default [2^-14, 2^127]; a 16-bit loss is scaled in FP32; our optimizers cost no synchronisation.

    device None: that of the first loss. `policy` (halfstep.policies) excludes the four numbers; without it they make a
    Dynamic policy, torch's but for its floor (2^-14, or init_scale where that is lower) and ceiling (2^127).

    `losses`: so many scales of the one policy, each with a state of its own. `which` says whose scale a loss gets, and which one
    the gradients of an optimizer carry; update() moves those that something was unscaled or stepped with.
    """

    def __init__(self, device=None, init_scale=None, growth_factor=None, backoff_factor=None, growth_interval=None, enabled=True, *, policy=None, losses=1):
        if isinstance(losses, bool) or not isinstance(losses, int) or losses < 1:
            raise ValueError(f"GradScaler: losses is {losses!r}; expected a whole number of at least 1")
        numbers = dict(init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval)
        given = {k: v for k, v in numbers.items() if v is not None}
        if policy is not None and given:
            raise TypeError(f"GradScaler: policy is {policy} and {', '.join(given)} too; pass one or the other")
        if policy is None:
            floor = policies.Dynamic.min_scale
            policy = policies.Dynamic(**given, min_scale=min(floor, given.get("init_scale", floor)))
        self._rule = policy
        dynamic = policy if isinstance(policy, policies.Dynamic) else policies.Dynamic()
        super().__init__("cpu", init_scale=policy.init_scale, growth_factor=dynamic.growth_factor, backoff_factor=dynamic.backoff_factor,
                         growth_interval=dynamic.growth_interval, enabled=enabled)
        self._per_optimizer_states = defaultdict(_ready)
        self._device = None if device is None else torch.device(device).type
        self._policy_vector = self._state = None
        self._loaded_state = self._loaded_user = None
        self._user, self._tables, self._arrivals = {}, [], policies.Arrivals()
        self._found, self._clipped, self._fresh = {}, [], True
        self._history = History()
        self._scaled = self._told_alone = False
        # This scaler is the entry of loss 0; those of the others are scalers of one loss, which nobody else sees.
        self._rest = [GradScaler(device, enabled=enabled, policy=policy) for _ in range(losses - 1)]

    def __getstate__(self):
        state = super().__getstate__()  # between iterations only, as torch's
        loaded = self._loaded_state if self._state is None else self._state.cpu()
        user = self._loaded_user if self._state is None else {name: tensor.cpu() for name, tensor in self._user.items()}
        state.update(_policy_vector=None, _state=None, _loaded_state=loaded, _loaded_user=user, _user={}, _tables=[], _found={}, _clipped=[], _fresh=True)
        return state

    @property
    def _updates(self):
        """Updates in all; reads device memory."""
        state = self._loaded_state if self._state is None else self._state
        return self._history.offset + (0 if state is None else int(state[APPLIED] + state[SKIPPED]))

    # -- several losses ----------------------------------------------------------------------------
    @property
    def losses(self):
        """How many losses have a scale of their own."""
        return 1 + len(self._rest)

    @property
    def scales(self):
        """The scales of all losses as one float32 tensor [losses] on their device; no synchronisation."""
        return torch.stack([entry.scale_tensor for entry in self._entries()])

    def _entries(self):
        return [self, *self._rest]

    def _entry(self, call, which):
        """The scaler of loss `which`."""
        if isinstance(which, bool) or not isinstance(which, int):
            raise TypeError(f"{call}: which is {which!r}; expected the number of a loss")
        if not 0 <= which < self.losses:
            raise IndexError(f"{call}: which is {which}, but this GradScaler has losses={self.losses}")
        return self._rest[which - 1] if which else self

    def _entry_for(self, call, optimizer, which):
        """The same, where no other loss's gradients went through this optimizer since the last update()."""
        chosen = self._entry(call, which)
        for other, entry in enumerate(self._entries()):
            if entry is not chosen and id(optimizer) in entry._per_optimizer_states and entry._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY:
                raise RuntimeError(f"{call}: which is {which}, but the gradients of this optimizer were unscaled with which={other} since the last update(): they can carry one scale "
                                   "only; scale all losses whose gradients it sums with one `which`")
        for entry in self._entries():  # what was known of the last iteration is no longer asked of any
            entry._begin()
        return chosen

    def _used(self):
        """Those that update() moves: something was unscaled or stepped with them."""
        return [entry for entry in self._entries() if any(state["found_inf_per_device"] for state in entry._per_optimizer_states.values())]

    def _leave(self, moved):
        """The other entries stay where they are, and know nothing of this iteration."""
        for which, entry in enumerate(self._entries()):
            idle = not any(entry is other for other in moved)
            if idle:
                entry._per_optimizer_states.clear()
                entry._forget_clips()
                entry._found, entry._fresh = {}, True
            if idle and entry._scaled and not self._told_alone and not torch.compiler.is_compiling():
                self._told_alone = True
                warn(f"loss {which} was scaled with which={which}, but nothing was unscaled or stepped with which={which} before update(): gradients that went into an optimizer of "
                     "another loss were divided by that one's scale; scale all losses whose gradients one optimizer sums with one `which`. A loss that accumulates over several "
                     "updates may do so")
            entry._scaled = False

    # -- state on the device -----------------------------------------------------------------------
    def _lazy_init_scale_growth_tracker(self, dev):
        assert self._growth_tracker is None, "_growth_tracker initialized before _scale"
        self._policy_vector = self._rule.vector().to(dev)
        self._state = H.init_scale_state(self._rule.vector()).to(dev)
        if self._loaded_state is not None:
            self._state.copy_(self._loaded_state)
        else:
            self._state[SCALE], self._state[TRACKER] = self._init_scale, self._init_growth_tracker
        self._scale = self._state[SCALE].float().clone()
        self._growth_tracker = self._state[TRACKER]
        self._history.start(dev)
        self._user = policies.make_state(self._rule, dev, self._loaded_user)

    def _check_scale_growth_tracker(self, funcname):
        """torch's hook, which its own methods call too; torch.compile does not trace torch's."""
        if self._scale is None:
            raise AssertionError(f"Attempted {funcname} but _scale is None. scale() was not called, or by another scaler.")
        return self._scale, self._growth_tracker

    @property
    def policy(self):
        """The policy, as given."""
        return self._rule

    @property
    def scale_tensor(self):
        """The scale as a 0-d float32 device tensor; no synchronisation. Before the first loss a copy of what it will begin with, on the device that
        was given; 1 where the scaler is not enabled."""
        if not self._enabled:
            missing = self._device == "cuda" and not torch.cuda.is_available()
            return torch.ones((), dtype=torch.float32, device=None if missing else self._device)
        if self._scale is None:
            if self._device is None:
                raise RuntimeError("scale_tensor: nothing was scaled yet, so the device is not known; call scale(loss) first, or GradScaler(device)")
            first = self._init_scale if self._loaded_state is None else float(self._loaded_state[SCALE])
            return torch.full((), first, dtype=torch.float32, device=self._device)
        return self._scale

    def scale(self, outputs, which=0):
        """outputs * scale of loss `which`. 16-bit outputs are scaled in FP32: a 1-element FP16 loss times 2^16 would be inf."""
        entry = self._entry("scale", which)
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            if self._scale is None:
                if self._device is not None and outputs.device.type != self._device:
                    raise ValueError(f"GradScaler was made for {self._device} but the loss is on {outputs.device}")
                for each in self._entries():
                    each._lazy_init_scale_growth_tracker(outputs.device)
            entry._history.scaled(outputs)
            entry._scaled = True
            wide = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
            return wide * to_device(entry._scale, outputs.device)
        if isinstance(outputs, dict):
            return type(outputs)((k, self.scale(v, which)) for k, v in outputs.items())
        if isinstance(outputs, (list, tuple)):
            scaled = (self.scale(v, which) for v in outputs)
            return type(outputs)(*scaled) if hasattr(outputs, "_fields") else type(outputs)(scaled)
        raise ValueError(f"scale: outputs is {type(outputs).__name__}; expected a tensor or an iterable of tensors")

    # -- unscaling ---------------------------------------------------------------------------------
    def unscale_(self, optimizer, which=0):
        """Divides the gradients by the scale of loss `which` once. FP16 and BF16 gradients of halfstep optimizers become FP32."""
        entry = self._entry_for("unscale_", optimizer, which) if self._rest else self._entry("unscale_", which)
        if self._enabled:
            entry._unscale(optimizer)

    def _unscale(self, optimizer):
        if _needs_the_host(optimizer) or torch.compiler.is_compiling() and any(p.dtype in _SIXTEEN for params, _ in members(optimizer) for p in params):
            return _outside_the_graph(GradScaler._unscale, self, optimizer)  # 16-bit gradients change their dtype, which is not traced
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.UNSCALED:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        self._begin()
        self._record(optimizer)
        inverse = self._scale.double().reciprocal().float()  # of a double, as torch's
        state["found_inf_per_device"] = self._unscale_grads_(optimizer, inverse, torch.zeros_like(inverse), False)
        state["stage"] = OptState.UNSCALED

    @torch.no_grad()
    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        grads = [(param, param.grad) for params, _ in members(optimizer) for param in params if param.grad is not None]
        self._look(lambda: [table for _, table, _ in stats_of(optimizer)])
        for _, grad in grads:
            if grad.is_complex():
                raise NotImplementedError(f"unscale_: a gradient is {grad.dtype}; complex gradients are not supported")
        devices = {}
        for param, grad in grads:
            in_place, widened = devices.setdefault(grad.device, ([], []))
            if grad.is_sparse:
                if grad.dtype in _SIXTEEN:
                    param.grad = grad = grad.coalesce()  # duplicates may overflow only when summed
                in_place.append(grad._values())
            elif grad.dtype in _SIXTEEN and _ours(optimizer):
                widened.append((param, grad))
            else:
                in_place.append(grad)
        return {device: self._unscale_lists(optimizer, in_place, widened, to_device(inv_scale, device)) for device, (in_place, widened) in devices.items()}

    def _unscale_lists(self, optimizer, in_place, widened, inverse):
        """In place, or for the pairs of `widened` into an FP32 gradient of the parameter. Returns the flag of what was found."""
        flag = torch.zeros((), device=inverse.device)
        half = [grad for grad in in_place if grad.dtype == torch.float16]
        zeros = grad_stats(half)[-1, 3] if half else None
        if in_place:
            fence(in_place)
            H.unscale_(in_place, inverse, flag, [])
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(in_place)  # whoever looked at the gradients before must know
        if half:
            self._history.flushed(grad_stats(half)[-1, 3] - zeros)
        if widened:
            outputs = [torch.empty_like(grad, dtype=torch.float32) for _, grad in widened]
            H.unscale_to_(outputs, [grad for _, grad in widened], inverse, flag, [])
            for (param, _), output in zip(widened, outputs):
                param.grad = None
                if param.grad_dtype != torch.float32:
                    param.grad_dtype = torch.float32
                    optimizer._turn.widened.append(param)
                param.grad = output
        return flag

    @torch.no_grad()
    def _check_inf_per_device(self, optimizer):
        """torch's hook for optimizers that unscale themselves; it only reads."""
        flags = {device: grad_stats(grads)[-1, 7].float() for device, (_, grads) in gradients(optimizer).items()}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = flags
        return flags

    # -- the step ----------------------------------------------------------------------------------
    def _begin(self):
        """First call after an update: what was known of the last step is no longer asked for."""
        if self._fresh:
            self._history.begin(self._state)
            self._found, self._tables, self._fresh = {}, [], False
            if self._history.recorder is not None and self._scale is not None:
                self._history.recorder.begin()

    def _record(self, optimizer):
        """A recorder (halfstep.trace) sees the gradients while they carry the scale."""
        if self._history.recorder is not None and self._scale is not None and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self._history.recorder.look(optimizer, self._scale_for(optimizer, False))

    def step(self, optimizer, closure=None, which=0, *args, **kwargs):
        """optimizer.step() unless a gradient is non-finite; the gradients carry the scale of loss `which`.

        For halfstep optimizers, and others with torch's `_step_supports_amp_scaling`, everything stays on the device; for
        the rest the check costs one synchronisation. A closure scales its loss and calls backward; it is evaluated once
        before the check. An optimizer that evaluates it again (LBFGS) sees unscaled gradients each time; one that is not
        finite then takes the whole step back.
        """
        entry = self._entry_for("step", optimizer, which) if self._rest else self._entry("step", which)
        return entry._step(optimizer, closure, args, kwargs)

    def _step(self, optimizer, closure, args, kwargs):
        if _needs_the_host(optimizer):
            return _outside_the_graph(GradScaler._step, self, optimizer, closure, args, kwargs)
        if not self._enabled:
            return optimizer.step(*([] if closure is None else [closure]), *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        loss = None
        if closure is not None:
            if state["stage"] is OptState.UNSCALED:
                raise RuntimeError("step: unscale_() has been called for this optimizer, but its closure makes new, scaled gradients; use one or the other")
            with torch.enable_grad():
                loss = closure()
        self._check_scale_growth_tracker("step")
        self._begin()
        self._record(optimizer)
        if _ours(optimizer):
            self._step_ours(optimizer, state, loss, closure)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            result = self._step_aware(optimizer, state, args, kwargs)
            loss = result if loss is None else loss
        else:
            result = self._step_stock(optimizer, state, loss, closure, args, kwargs)
            loss = result if loss is None else loss
        state["stage"] = OptState.STEPPED
        if not torch.compiler.is_compiling():
            torch.clear_autocast_cache()
        return loss

    def _look(self, tables):
        """Keeps the statistics of gradients that still carry the scale, where the policy looks at them."""
        if self._enabled and policies.looks_at_gradients(self._rule):
            self._tables += [to_device(table, self._scale.device) for table in tables()]

    def _scale_for(self, optimizer, unscaled):
        """The scale still in the gradients: ours times what the user left in optimizer.grad_scale, as in torch."""
        own = getattr(optimizer, "grad_scale", None)
        return own if unscaled else self._scale if own is None else self._scale * own

    @torch.no_grad()
    def _step_ours(self, optimizer, state, loss, closure):
        unscaled = state["stage"] is OptState.UNSCALED
        stats = optimizer._gather_stats()
        assert stats or state["found_inf_per_device"], "No inf checks were recorded for this optimizer."
        found = self._combine(state["found_inf_per_device"].values(), self._scale.device) if unscaled else None
        if not unscaled:
            self._look(lambda: [table for _, table, _ in stats])
        scale = self._scale_for(optimizer, unscaled)
        optimizer._turn.control = None
        optimizer._turn.handed = (scale, found, stats) if isinstance(optimizer, optim.Optimizer) else (scale, found, stats, loss, closure)
        try:
            if torch.compiler.is_compiling():
                type(optimizer).step(optimizer)  # hooks see it; what a scheduler puts in front of step() is not traced
            else:
                optimizer.step()  # the public one: hooks, schedulers and wrappers see it
        finally:
            optimizer._turn.handed = None
        control = optimizer._turn.control
        if control is None:  # a wrapper of step() did not call it
            control = optimizer._make_control(scale, found, None, [table for _, table, _ in stats])
        state["found_inf_per_device"] = {control.device: control[0].float()}
        self._found[id(optimizer)] = control[0]
        self._history.stepped(optimizer, stats, control)

    @torch.no_grad()
    def _step_aware(self, optimizer, state, args, kwargs):
        """torch's protocol for fused optimizers: they get the scale and a flag, which here is 0 or 1 and nothing else."""
        if "grad_scaler" in inspect.signature(optimizer.step).parameters:
            warnings.warn("optimizer.step takes grad_scaler, which torch deprecates: it should read self.grad_scale and self.found_inf", FutureWarning, stacklevel=3)
            result = optimizer.step(*args, grad_scaler=self, **kwargs)
            flags = state["found_inf_per_device"]
            if flags:
                self._found[id(optimizer)] = self._combine(flags.values(), self._scale.device)
            return result
        unscaled = state["stage"] is OptState.UNSCALED
        flags = state["found_inf_per_device"] if unscaled else self._check_inf_per_device(optimizer)
        assert len(flags) > 0, "No inf checks were recorded for this optimizer."
        scale, found = self._scale_for(optimizer, unscaled), (self._combine(flags.values(), self._scale.device) != 0).float()
        stats = stats_of(optimizer)
        if not unscaled:
            self._look(lambda: [table for _, table, _ in stats])
        control = self._control_of(stats, scale, found)
        optimizer.grad_scale, optimizer.found_inf = scale, found
        try:
            with torch.enable_grad():
                result = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        self._found[id(optimizer)] = found
        self._history.stepped(optimizer, stats, control)
        return result

    def _control_of(self, stats, scale, found):
        return H.step_control([table.to(self._scale.device) for _, table, _ in stats], scale, found, None, -1.0)

    def _step_stock(self, optimizer, state, loss, closure, args, kwargs):
        if state["stage"] is OptState.READY:
            self._unscale(optimizer)
        flags = state["found_inf_per_device"]
        assert len(flags) > 0, "No inf checks were recorded for this optimizer."
        found = self._combine(flags.values(), self._scale.device)
        with torch.no_grad():
            stats = stats_of(optimizer)
            self._history.stepped(optimizer, stats, self._control_of(stats, None, found))
        result = None
        if not bool(found != 0):
            if closure is None:
                result = optimizer.step(*args, **kwargs)
            elif not self._step_with_closure(optimizer, loss, closure, args, kwargs):
                found = torch.ones_like(found)
                state["found_inf_per_device"] = {found.device: found}
        self._found[id(optimizer)] = found
        return result

    def _step_with_closure(self, optimizer, loss, closure, args, kwargs):
        """False when a later evaluation overflowed and the step was taken back."""
        again = optim.evaluates_again(optimizer)
        before = optim.Snapshot(optimizer, [p for g in optimizer.param_groups for p in g["params"]]) if again else None
        first = True

        def evaluate():
            nonlocal first
            if first:
                first = False
                return loss
            with torch.enable_grad():
                value = closure()
            flags = self._unscale_grads_(optimizer, self._scale.double().reciprocal().float(), None, True)
            if bool(self._combine(flags.values(), self._scale.device) != 0):
                raise optim.Overflow
            return value

        try:
            optimizer.step(evaluate, *args, **kwargs)
        except optim.Overflow:
            if before is None:
                raise RuntimeError(f"{type(optimizer).__name__} evaluated its closure again and the gradients were not finite") from None
            before.restore()
            return False
        return True

    @staticmethod
    def _combine(flags, device):
        """MAX over devices; NaN stays NaN and counts as found."""
        flags = [to_device(f.reshape(()), device, torch.float32) for f in flags]
        return flags[0] if len(flags) == 1 else torch.stack(flags).amax()

    # -- clipping ----------------------------------------------------------------------------------
    @torch.no_grad()
    def clip_grad_norm_(self, optimizers, max_norm, norm_type=2.0, which=0):
        """Clips the global norm over all `optimizers`, of loss `which`, together; returns it, unscaled, as a 0-d device tensor.

        For halfstep optimizers the factor min(1, max_norm / (norm + 1e-6)) is folded into the next step and no gradient is
        written. Gradients of other optimizers are unscaled and multiplied in place.
        """
        optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        entry = self._entry("clip_grad_norm_", which)
        for optimizer in optimizers if self._rest else ():
            self._entry_for("clip_grad_norm_", optimizer, which)
        return entry._clip(optimizers, max_norm, norm_type)

    def _clip(self, optimizers, max_norm, norm_type):
        if _needs_the_host(*optimizers):
            return _outside_the_graph(GradScaler._clip, self, optimizers, max_norm, norm_type)
        if not max_norm >= 0:
            raise ValueError(f"clip_grad_norm_: max_norm is {max_norm}; expected a number >= 0")
        norms = [norm for optimizer in optimizers for norm in self._norms(optimizer, float(norm_type))]
        if not norms:
            return torch.zeros(())
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for optimizer in optimizers:
            if _ours(optimizer):
                pending = optimizer._turn.clip
                optimizer._turn.clip = factor if pending is None else pending.to(factor.device) * factor
                self._clipped.append(optimizer)
            else:
                for _, grads in gradients(optimizer).values():
                    for grad in grads:
                        grad.mul_(factor.to(grad.device, grad.dtype))
        return norm.float()

    def _norms(self, optimizer, norm_type):
        """Norm of an optimizer's unscaled, so far clipped gradients, one 0-d FP64 tensor a device."""
        stage = None
        if self._enabled:
            self._check_scale_growth_tracker("clip_grad_norm_")
            if not _ours(optimizer) and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                self._unscale(optimizer)
            stage = self._per_optimizer_states[id(optimizer)]["stage"]
        norms = []
        for device, (_, grads) in gradients(optimizer).items():
            if norm_type == 2.0:
                norm = grad_stats(grads)[-1, 1].sqrt()
            else:
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double(), norm_type) for g in grads]), norm_type)
            if stage is OptState.READY:
                norm = norm / self._scale.to(device, torch.float64)
            if _ours(optimizer) and optimizer._turn.clip is not None:
                norm = norm * optimizer._turn.clip.to(device)
            norms.append(norm)
        return norms

    # -- the update --------------------------------------------------------------------------------
    @torch.no_grad()
    def update(self, new_scale=None):
        """Applies the policy to this iteration's found_inf, or sets the scale. Raises at the policy's limit, if that says so, when the host learns of it.

        Of several losses, each that something was unscaled or stepped with goes by what was found there, and the others stay;
        new_scale sets all.
        """
        if not self._enabled:
            for entry in self._entries():
                entry._forget_clips()
            return
        self._check_scale_growth_tracker("update")
        moved = self._used() if self._rest and new_scale is None else self._entries()
        assert len(moved) > 0, "No inf checks were recorded prior to update."
        for entry in moved:
            entry._advance(new_scale)
        if self._rest:
            self._leave(moved)
        for entry in moved:
            if new_scale is None and policies.acts_on_host(entry._rule):
                entry._act()  # what it raises leaves the scaler between two iterations
        for entry in moved if not torch.compiler.is_compiling() else ():
            for watcher in entry._history.watchers:
                watcher.updated()

    def _advance(self, new_scale):
        self._history.close()
        if new_scale is not None:
            value = new_scale if isinstance(new_scale, torch.Tensor) else torch.tensor(float(new_scale))
            if value.numel() != 1 or value.requires_grad:
                raise ValueError(f"update: new_scale is {new_scale}; expected a number or a 1-element tensor that requires no grad")
            if value.device.type == "cpu" and not (policies.LOWEST_SCALE <= float(value) <= policies.HIGHEST_SCALE):
                raise ValueError(f"update: new_scale is {float(value)}; expected between 2^-126 and 2^127")
            if self._history.recorder is not None and self._fresh:
                self._history.recorder.begin()  # nothing was stepped in this iteration
            self._scale.copy_(value.reshape(()))
            self._state[SCALE] = self._scale
        else:
            flags = [f for s in self._per_optimizer_states.values() for f in s["found_inf_per_device"].values()]
            assert len(flags) > 0, "No inf checks were recorded prior to update."
            fence([self._scale])
            policies.advance(self._rule, self._policy_vector, self._scale, self._state, self._user, self._combine(flags, self._scale.device), self._tables)
            self._history.floor = max(getattr(self._rule, "min_scale", 0.0), policies.LOWEST_SCALE)
            self._history.updated(self._state)
        if self._history.recorder is not None:
            self._history.recorder.updated(by_hand=new_scale is not None)
        self._per_optimizer_states.clear()
        self._forget_clips()
        self._fresh = True

    def _act(self):
        """What the policy does on the host, for the updates that have arrived there."""
        arrived = list(self._arrivals.after(self._state))
        if isinstance(self._rule, policies.Policy):
            scale = policies.advance_on_host(self._rule, self._user, self._stats()) if arrived else None
            if scale is not None:
                self._scale.fill_(scale)
                self._state[SCALE] = self._scale
            return
        for numbers in arrived:
            if numbers is not None and callable(self._rule.on_limit):
                self._rule.on_limit(self._stats())
            if numbers is not None and self._rule.on_limit == "raise":
                raise RuntimeError(f"update: {policies.limit_message(self._rule, numbers)}")

    def _forget_clips(self):
        for optimizer in self._clipped:
            optimizer._turn.clip = None
        self._clipped.clear()

    # -- what is known -----------------------------------------------------------------------------
    def stats(self, which=0):
        """ScalerStats of the newest update of loss `which` that the device has finished; never waits."""
        return self._entry("stats", which)._stats()

    def _stats(self):
        if not self._enabled:
            return self._history.read(None, 1.0)
        if self._fresh:
            self._history.catch_up(self._state)
        scale = self._init_scale if self._scale is None or self._scale.device.type == "cuda" else float(self._scale)
        return self._history.read(self._loaded_state, scale)

    def tensor_stats(self, which=0):
        """{parameter name: TensorStats} of that update, for the parameters that had a gradient; never waits."""
        return self._entry("tensor_stats", which)._history.read_tensors()

    def step_was_skipped(self, optimizer=None):
        """Whether that optimizer's step, or any, was skipped since the last update but one. May synchronise."""
        flags = [f for entry in self._entries() for k, f in entry._found.items() if optimizer is None or k == id(optimizer)]
        return any(bool(f != 0) for f in flags)

    # -- numbers and checkpoints -------------------------------------------------------------------
    def _rebuild_policy(self):
        for entry in self._rest:
            entry._growth_factor, entry._backoff_factor, entry._growth_interval = self._growth_factor, self._backoff_factor, self._growth_interval
            entry._rebuild_policy()
        if isinstance(self._rule, policies.Dynamic):
            self._rule = policies.replace(self._rule, growth_factor=self._growth_factor, backoff_factor=self._backoff_factor,
                                          growth_interval=self._growth_interval)
            if self._policy_vector is not None:
                self._policy_vector.copy_(self._rule.vector())

    def set_growth_factor(self, new_factor):
        super().set_growth_factor(new_factor)
        self._rebuild_policy()

    def set_backoff_factor(self, new_factor):
        super().set_backoff_factor(new_factor)
        self._rebuild_policy()

    def set_growth_interval(self, new_interval):
        super().set_growth_interval(new_interval)
        self._rebuild_policy()

    def state_dict(self, format=None):
        """torch's five keys at top level, the whole state under "halfstep"; or that of another project (policies.FORMATS). Call it between iterations."""
        if not self._enabled:
            return {}
        states = [entry._state_dict(format) for entry in self._entries()]
        if format is not None:
            return policies.export_losses(states, format)
        if self._rest:
            states[0]["halfstep"]["losses"] = states[1:]
        return states[0]

    def _state_dict(self, format):
        loaded = self._loaded_state if self._loaded_state is not None else H.init_scale_state(self._rule.vector())
        state = self._state if self._state is not None else loaded
        if format is not None:
            return policies.export_state(self._rule, state.tolist(), format)
        own = {"format": 1, "state": state.tolist(), "policy": self._rule.vector().tolist(), "updates": self._updates}
        if isinstance(self._rule, policies.Policy):
            user = self._user or policies.make_state(self._rule, "cpu", self._loaded_user)
            own["policy_state"] = {name: tensor.detach().cpu().clone() for name, tensor in user.items()}
        return {**super().state_dict(), "halfstep": own}

    def load_state_dict(self, state_dict, format=None):
        """Loads ours, torch's or another project's (policies.FORMATS; found by its keys); a refused load changes nothing.

        The policy of a halfstep state comes with it; the state of another project is for a policy of its kind, as
        policies.preset makes it.
        """
        if not self._enabled:
            return
        read = []
        for entry, part in zip(self._entries(), policies.states_of_losses(state_dict, self.losses)):
            part = policies.import_state(part, entry._rule, format)
            read.append((entry, part, checkpoint.read_scaler_state(part, entry._rule)))
        for entry, part, found in read:  # nothing is refused any more
            entry._take(part, *found)

    def _take(self, state_dict, rule, numbers, updates, user):
        before = self._updates
        self._rule, self._loaded_user = rule, user
        self._history.offset = (before if updates is None else updates) - int(numbers[APPLIED] + numbers[SKIPPED])
        self._init_scale, self._init_growth_tracker = numbers[SCALE], int(numbers[TRACKER])
        self._growth_factor, self._backoff_factor = float(state_dict["growth_factor"]), float(state_dict["backoff_factor"])
        self._growth_interval = int(state_dict["growth_interval"])
        self._loaded_state = torch.tensor(numbers, dtype=torch.float64)
        self._history.forget()
        self._arrivals.start(numbers[policies.Arrivals.LIMITS])
        if self._state is not None:
            self._user = policies.make_state(self._rule, self._scale.device, self._loaded_user)
            self._policy_vector.copy_(self._rule.vector())
            self._state.copy_(self._loaded_state)
            self._scale.copy_(self._state[SCALE])

    def get_scale(self, which=0):
        """The scale of loss `which` as a Python number; synchronises on a GPU."""
        entry = self._entry("get_scale", which)
        if not self._enabled:
            return 1.0
        return entry._init_scale if entry._scale is None else entry._scale.item()

    def _get_growth_tracker(self):
        if not self._enabled:
            return 0
        return self._init_growth_tracker if self._state is None else int(self._state[TRACKER])
