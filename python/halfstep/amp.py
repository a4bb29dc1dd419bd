"""autocast and GradScaler, with torch.amp's names and protocol."""

import warnings
from dataclasses import dataclass
from typing import Optional

import torch
from torch.amp.grad_scaler import OptState

from . import checkpoint, optim, policies
from ._library import H

_SCALE, _TRACKER, _CLEAN, _APPLIED, _SKIPPED, _CONSECUTIVE, _LAST_BAD = 0, 1, 3, 4, 5, 6, 7


def autocast(device_type, dtype=torch.float16, enabled=True):
    """torch.autocast with FP16 as the default dtype on every device."""
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


@dataclass(frozen=True)
class ScalerStats:
    """The newest update that the device has finished."""

    step: int                       #: updates so far
    scale: float                    #: after that update
    clean_steps: int                #: clean updates in a row
    steps_applied: int
    steps_skipped: int
    consecutive_skips: int
    last_found_inf: bool
    first_bad_param: Optional[str]  #: name of the first parameter with a non-finite gradient in that update
    grad_norm: float                #: unscaled, before clipping, over all optimizers stepped; nan when found_inf
    amax: float                     #: largest |gradient| as stored
    zero_share: float               #: zeros / elements
    subnormal_share: float          #: FP16-subnormal gradients / non-zero gradients
    overflowed: int                 #: weights kept from leaving the 16-bit range, in all


class GradScaler(torch.amp.GradScaler):
    """Loss scaling with a device-side policy; torch.amp.GradScaler's whole protocol.

    Differences, each a measured defect of the stock class: FP16 gradients are accepted and never unscaled in place for
    halfstep optimizers; found_inf is an OR (`!= 0`, MAX over devices) on every path; the scale stays in the policy's bounds,
    by default [2^-14, 2^127]; a 16-bit loss is scaled in FP32; our optimizers cost no synchronisation.

    device None: that of the first loss. `policy` (halfstep.policies) excludes the four numbers.
    """

    def __init__(self, device=None, init_scale=None, growth_factor=None, backoff_factor=None, growth_interval=None, enabled=True, *, policy=None):
        numbers = dict(init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval)
        given = {k: v for k, v in numbers.items() if v is not None}
        if policy is not None and given:
            raise TypeError(f"GradScaler: policy is {policy} and {', '.join(given)} too; pass one or the other")
        self._rule = policy if policy is not None else policies.Dynamic(**given)
        dynamic = self._rule if isinstance(self._rule, policies.Dynamic) else policies.Dynamic()
        super().__init__("cpu", init_scale=self._rule.init_scale, growth_factor=dynamic.growth_factor, backoff_factor=dynamic.backoff_factor,
                         growth_interval=dynamic.growth_interval, enabled=enabled)
        self._device = None if device is None else torch.device(device).type
        self._policy_vector = self._state = None
        self._loaded_state = None
        self._found, self._clips, self._fresh = {}, {}, True
        self._snapshots, self._updates, self._last_stats = [], 0, None
        self._warned_flush, self._zero_steps = False, 0

    # -- state on the device -----------------------------------------------------------------------
    def _lazy_init_scale_growth_tracker(self, dev):
        assert self._growth_tracker is None, "_growth_tracker initialized before _scale"
        self._policy_vector = self._rule.vector().to(dev)
        self._state = H.init_scale_state(self._rule.vector()).to(dev)
        if self._loaded_state is not None:
            self._state.copy_(self._loaded_state)
        else:
            self._state[_SCALE], self._state[_TRACKER] = self._init_scale, self._init_growth_tracker
        self._scale = self._state[_SCALE].float().clone()
        self._growth_tracker = self._state[_TRACKER]

    @property
    def policy(self):
        """The policy, as given."""
        return self._rule

    @property
    def scale_tensor(self):
        """The scale as a 0-d float32 device tensor; no synchronisation."""
        if self._scale is None:
            raise RuntimeError("scale_tensor: nothing was scaled yet, so the device is not known; call scale(loss) first")
        return self._scale

    def scale(self, outputs):
        """outputs * scale. 16-bit outputs are scaled in FP32: a 1-element FP16 loss times 2^16 would be inf."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            if self._scale is None:
                if self._device is not None and outputs.device.type != self._device:
                    raise ValueError(f"GradScaler was made for {self._device} but the loss is on {outputs.device}")
                self._lazy_init_scale_growth_tracker(outputs.device)
            wide = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
            return wide * self._scale.to(outputs.device, non_blocking=True)
        if isinstance(outputs, dict):
            return type(outputs)((k, self.scale(v)) for k, v in outputs.items())
        if isinstance(outputs, (list, tuple)):
            scaled = map(self.scale, outputs)
            return type(outputs)(*scaled) if hasattr(outputs, "_fields") else type(outputs)(scaled)
        raise ValueError(f"scale: outputs is {type(outputs).__name__}; expected a tensor or an iterable of tensors")

    # -- unscaling ---------------------------------------------------------------------------------
    def unscale_(self, optimizer):
        """Divides the gradients by the scale once. FP16 and BF16 gradients of halfstep optimizers become FP32."""
        if not self._enabled:
            return
        self._begin()
        super().unscale_(optimizer)

    @torch.no_grad()
    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        ours = isinstance(optimizer, (optim.Optimizer, optim.Masters))
        by_device, outputs, flushed = {}, [], 0
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.is_complex():
                    raise NotImplementedError(f"unscale_: a gradient is {grad.dtype}; complex gradients are not supported")
                if grad.is_sparse:
                    if grad.dtype in (torch.float16, torch.bfloat16):
                        param.grad = grad = grad.coalesce()  # duplicates may overflow only when summed
                    by_device.setdefault(grad.device, ([], []))[0].append(grad._values())
                elif ours and grad.dtype in (torch.float16, torch.bfloat16):
                    by_device.setdefault(grad.device, ([], []))[1].append((param, grad))
                else:
                    if grad.dtype == torch.float16 and not self._warned_flush and grad.device.type == "cpu":
                        before = int((grad != 0).sum())
                        flushed += before - int((grad.float() * inv_scale.float()).half().count_nonzero())
                    by_device.setdefault(grad.device, ([], []))[0].append(grad)
        results = {}
        for device, (in_place, widened) in by_device.items():
            flag, inverse = torch.zeros((), device=device), inv_scale.to(device, non_blocking=True)
            if in_place:
                H.unscale_(in_place, inverse, flag, [])
            if widened:
                outputs = [torch.empty_like(grad, dtype=torch.float32) for _, grad in widened]
                H.unscale_to_(outputs, [grad for _, grad in widened], inverse, flag, [])
                for (param, _), output in zip(widened, outputs):
                    param.grad = None
                    param.grad_dtype = torch.float32
                    param.grad = output
            results[device] = flag
        if flushed > 0:
            self._warned_flush = True
            warnings.warn(f"unscaling FP16 gradients in place set {flushed} small values to zero; use a halfstep optimizer, which unscales in FP32", stacklevel=4)
        return results

    # -- the step ----------------------------------------------------------------------------------
    def _begin(self):
        """First call after an update: what was known of the last step is no longer asked for."""
        if self._fresh:
            self._found, self._stats_of, self._fresh = {}, [], False

    def step(self, optimizer, closure=None, *args, **kwargs):
        """optimizer.step() unless a gradient is non-finite.

        For halfstep optimizers everything stays on the device. For others the check costs one synchronisation.
        A closure is evaluated once, before the check.
        """
        if not self._enabled:
            return optimizer.step(*([] if closure is None else [closure]), *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_scale_growth_tracker("step")
        self._begin()
        if isinstance(optimizer, (optim.Optimizer, optim.Masters)):
            self._step_ours(optimizer, state)
        else:
            result = self._step_stock(optimizer, state, args, kwargs)
            loss = result if loss is None else loss
        state["stage"] = OptState.STEPPED
        torch.clear_autocast_cache()
        return loss

    @torch.no_grad()
    def _step_ours(self, optimizer, state):
        clip = self._clips.pop(id(optimizer), None)
        unscaled = state["stage"] is OptState.UNSCALED
        stats = optimizer._gather_stats()
        assert stats or state["found_inf_per_device"], "No inf checks were recorded for this optimizer."
        scale = None if unscaled else self._scale
        found = self._combine(state["found_inf_per_device"].values(), self._scale.device) if unscaled else None
        optimizer._step_with(scale, found, clip, stats)
        control = optimizer._control
        state["found_inf_per_device"] = {control.device: control[0].float()}
        self._found[id(optimizer)] = control[0]
        self._record(optimizer, stats, control, None if unscaled else self._scale)
        if unscaled:
            for room in optimizer._rooms:
                for param in room.params:
                    if room.group["grad_dtype"] == "param" and param.grad is not None and param.grad.dtype != param.dtype:
                        _restore_grad_dtype(param)

    def _step_stock(self, optimizer, state, args, kwargs):
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        flags = state["found_inf_per_device"]
        assert len(flags) > 0, "No inf checks were recorded for this optimizer."
        found = self._combine(flags.values(), self._scale.device)
        self._found[id(optimizer)] = found
        with torch.no_grad():
            grads = [p.grad._values() if p.grad.is_sparse else p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            stats = [(None, H.grad_stats([x for x in grads if x.device == device], [])) for device in {x.device for x in grads}]
            self._record(optimizer, stats, H.step_control([s.to(self._scale.device) for _, s in stats], None, found, None, -1.0), None)
        if bool(found != 0):
            return None
        return optimizer.step(*args, **kwargs)

    @staticmethod
    def _combine(flags, device):
        """MAX over devices; NaN stays NaN and counts as found."""
        return torch.stack([f.reshape(()).float().to(device, non_blocking=True) for f in flags]).amax()

    def _record(self, optimizer, stats, control, scale):
        self._stats_of.append((optimizer, stats, control, scale))

    @torch.no_grad()
    def clip_grad_norm_(self, optimizers, max_norm, norm_type=2.0):
        """Clips the global norm over all `optimizers` together; returns it, unscaled, as a 0-d device tensor.

        For halfstep optimizers the factor min(1, max_norm / (norm + 1e-6)) is folded into the next step and no gradient is
        written. Gradients of other optimizers are unscaled and multiplied in place.
        """
        optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        if not max_norm >= 0:
            raise ValueError(f"clip_grad_norm_: max_norm is {max_norm}; expected a number >= 0")
        parts, device = [], None
        for optimizer in optimizers:
            ours = isinstance(optimizer, (optim.Optimizer, optim.Masters))
            if self._enabled:
                self._check_scale_growth_tracker("clip_grad_norm_")
                if not ours and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                    self.unscale_(optimizer)
            scaled = self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
            factor = 1.0 / self._scale.double() if scaled else 1.0
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        parts.append(self._one_norm(param.grad, norm_type) * factor)
        if not parts:
            return torch.zeros(())
        device = parts[0].device
        norms = torch.stack([p.to(device) for p in parts])
        norm = torch.linalg.vector_norm(norms, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for optimizer in optimizers:
            if self._enabled and isinstance(optimizer, (optim.Optimizer, optim.Masters)):
                self._clips[id(optimizer)] = factor
            else:
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param.grad.mul_(factor.to(param.grad.device, param.grad.dtype))
        return norm.float()

    @staticmethod
    def _one_norm(grad, norm_type):
        values = grad.coalesce()._values() if grad.is_sparse else grad
        if norm_type == 2.0:
            return H.grad_stats([values], [])[-1, 1].sqrt()
        return torch.linalg.vector_norm(values.double(), norm_type)

    # -- the update --------------------------------------------------------------------------------
    @torch.no_grad()
    def update(self, new_scale=None):
        """Applies the policy to this iteration's found_inf, or sets the scale."""
        if not self._enabled:
            return
        self._check_scale_growth_tracker("update")
        if new_scale is not None:
            value = new_scale if isinstance(new_scale, torch.Tensor) else torch.tensor(float(new_scale))
            if value.numel() != 1 or value.requires_grad:
                raise ValueError(f"update: new_scale is {new_scale}; expected a number or a 1-element tensor that requires no grad")
            if value.device.type == "cpu" and not (policies.LOWEST_SCALE <= float(value) <= policies.HIGHEST_SCALE):
                raise ValueError(f"update: new_scale is {float(value)}; expected between 2^-126 and 2^127")
            self._scale.copy_(value.reshape(()))
            self._state[_SCALE] = self._scale
        else:
            flags = [f for s in self._per_optimizer_states.values() for f in s["found_inf_per_device"].values()]
            assert len(flags) > 0, "No inf checks were recorded prior to update."
            H.update_scale_(self._scale, self._state, self._combine(flags, self._scale.device), self._policy_vector)
            self._updates += 1
            self._snapshot()
        self._per_optimizer_states.clear()
        self._clips.clear()
        self._fresh = True

    # -- what is known -----------------------------------------------------------------------------
    def _snapshot(self):
        """Queues one copy of this step's numbers to the host; nothing waits for it."""
        rows = [(optimizer, room, s) for optimizer, stats, _, _ in self._stats_of for room, s in stats]
        device = self._scale.device
        norms = torch.stack([control[2] for _, _, control, _ in self._stats_of]).to(device)
        overflowed = [room.overflowed.sum() for optimizer, _, _, _ in self._stats_of for room in optimizer_rooms(optimizer)]
        parts = [self._state, torch.linalg.vector_norm(norms).reshape(1), torch.stack([o.to(device) for o in overflowed]).sum().double().reshape(1)
                 if overflowed else torch.zeros(1, dtype=torch.float64, device=device)]
        parts += [s[-1].to(device) for _, _, s in rows]
        numbers, names = torch.cat(parts), [_names(optimizer, room) for optimizer, room, _ in rows]
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._snapshots = self._snapshots[-15:] + [(self._updates, host, names, event)]
        elif device.type != "cuda":
            self._snapshots = [(self._updates, numbers, names, None)]
            self._watch_zeros(numbers)

    def _watch_zeros(self, numbers):
        rows = numbers[18:].reshape(-1, 8)
        all_zero = len(rows) > 0 and float(rows[:, 5].sum()) > 0 and float(rows[:, 3].sum()) == float(rows[:, 5].sum())
        self._zero_steps = self._zero_steps + 1 if all_zero else 0
        if self._zero_steps == 2:
            warnings.warn("all gradients were exactly zero in two steps running: were scaled FP16 gradients clipped? use scaler.clip_grad_norm_", stacklevel=4)

    def stats(self):
        """ScalerStats of the newest update that the device has finished; never waits."""
        for updates, numbers, names, event in reversed(self._snapshots):
            if event is None or event.query():
                return self._read(updates, numbers, names)
        scale = self._init_scale if self._scale is None or self._scale.device.type == "cuda" else float(self._scale)
        return ScalerStats(0, scale, 0, 0, 0, 0, False, None, float("nan"), 0.0, 0.0, 0.0, 0)

    @staticmethod
    def _read(updates, numbers, names):
        state, norm, overflowed = numbers[:16].tolist(), float(numbers[16]), int(numbers[17])
        rows = numbers[18:].reshape(-1, 8).tolist()
        bad = next((names[i][int(row[6])] for i, row in enumerate(rows) if row[6] >= 0), None)
        elements, zeros = sum(r[5] for r in rows), sum(r[3] for r in rows)
        return ScalerStats(
            step=updates, scale=state[_SCALE], clean_steps=int(state[_CLEAN]), steps_applied=int(state[_APPLIED]),
            steps_skipped=int(state[_SKIPPED]), consecutive_skips=int(state[_CONSECUTIVE]), last_found_inf=bool(state[_LAST_BAD]),
            first_bad_param=bad, grad_norm=norm, amax=max((r[2] for r in rows), default=0.0), zero_share=zeros / elements if elements else 0.0,
            subnormal_share=sum(r[4] for r in rows) / (elements - zeros) if elements > zeros else 0.0, overflowed=overflowed)

    def step_was_skipped(self, optimizer=None):
        """Whether that optimizer's step, or any, was skipped since the last update but one. May synchronise."""
        flags = list(self._found.values()) if optimizer is None else [f for k, f in self._found.items() if k == id(optimizer)]
        return any(bool(f != 0) for f in flags)

    # -- numbers and checkpoints -------------------------------------------------------------------
    def _rebuild_policy(self):
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

    def state_dict(self):
        """torch's five keys at top level, the whole state under "halfstep". Call it between iterations."""
        if not self._enabled:
            return {}
        loaded = self._loaded_state if self._loaded_state is not None else H.init_scale_state(self._rule.vector())
        state = self._state if self._state is not None else loaded
        return {**super().state_dict(), "halfstep": {"format": 1, "state": state.tolist(), "policy": self._rule.vector().tolist(), "updates": self._updates}}

    def load_state_dict(self, state_dict):
        """Loads ours or torch's; a refused load changes nothing. The policy of a halfstep state comes with it."""
        if not self._enabled:
            return
        self._rule, numbers, updates = checkpoint.read_scaler_state(state_dict, self._rule)
        self._updates = self._updates if updates is None else updates
        self._init_scale, self._init_growth_tracker = numbers[_SCALE], int(numbers[_TRACKER])
        self._growth_factor, self._backoff_factor = float(state_dict["growth_factor"]), float(state_dict["backoff_factor"])
        self._growth_interval = int(state_dict["growth_interval"])
        self._loaded_state = torch.tensor(numbers, dtype=torch.float64)
        unknown = torch.tensor([float("nan"), 0.0], dtype=torch.float64)  # norm and overflow count of a step before our time
        self._snapshots = [(self._updates, torch.cat([self._loaded_state, unknown]), [], None)]
        if self._state is not None:
            self._policy_vector.copy_(self._rule.vector())
            self._state.copy_(self._loaded_state)
            self._scale.copy_(self._state[_SCALE])

    def get_scale(self):
        """The scale as a Python number; synchronises on a GPU."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else self._scale.item()

    def _get_growth_tracker(self):
        if not self._enabled:
            return 0
        return self._init_growth_tracker if self._state is None else int(self._state[_TRACKER])


def optimizer_rooms(optimizer):
    return getattr(optimizer, "_rooms", [])


def _names(optimizer, room):
    if room is not None:
        return room.names
    params = [(g, p) for g in optimizer.param_groups for p in zip(g["params"], g.get("param_names") or [None] * len(g["params"])) if p[0].grad is not None]
    return [name or f"parameter {i}" for i, (_, (_, name)) in enumerate(params)]


def _restore_grad_dtype(param):
    """After the step the FP32 gradient has served; the next backward is again in the parameter's dtype."""
    grad = param.grad
    param.grad = None
    param.grad_dtype = param.dtype
    del grad
