"""The tensors that an optimizer keeps for one parameter group, and what happens when the parameters change under it."""

import sys
import warnings
import weakref
from operator import attrgetter

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ._library import H, TensorList, grad_stats, pointers, to_device, versions

SIXTEEN = (torch.float16, torch.bfloat16)
MASTERS = ("auto", "fp32", "fp64", "split16", "split8", "kahan", "stochastic", "none")
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq", "sum")  # second moments: never negative, as int8 states uint8 codes of their roots
BLOCK = 128  # elements under one scale of an int8 state (csrc/math/states.h)
_LOWEST = -110  # the scale of a block of zeros
_ROW = 128  # bytes that hold one row of a table (cuda/kernels.h)
LIMIT = {torch.float16: 65520.0, torch.bfloat16: 3.3961775292304957e38}

_grad = attrgetter("grad")  # mapped over a thousand parameters: a step must not pay for a Python loop

_owners = WeakTensorKeyDictionary()  # beside the parameters, not on them, so that models can be pickled

_stock_probe = torch.cuda.is_current_stream_capturing


def capturing():
    """Whether a CUDA graph is being captured on this thread's stream."""
    probe = torch.cuda.is_current_stream_capturing
    if probe is _stock_probe and not torch.cuda.is_initialized():
        return False  # nothing can be; the probe itself throws where there is no driver
    return probe()


def warn(text):
    """A warning at the user's line: the first frame outside halfstep and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("halfstep", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def warn_edited(names):
    """One warning an edit. The text holds names only, so that Python's filter shows a repeated edit once."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    warn(f"weights changed since the last step; their masters follow: {', '.join(map(repr, names[:5]))}{more}")


def warn_overflow(name, dtype, elements, step):
    warn(f"'{name}' would leave {dtype_name(dtype)} range ({elements} element{'s' if elements > 1 else ''}, step {step}): keep it in FP32 or lower lr")


def master_dtype(mode, param):
    """Dtype of the tensor that keeps `param` exact, or None; `mode` as the optimizer's `master`."""
    if mode == "auto":
        mode = "split16" if param.dtype in SIXTEEN else "none"
    if mode in ("none", "stochastic") or param.dtype == torch.float64:
        return None
    if mode == "fp64":
        return torch.float64
    if param.dtype == torch.float32:
        return None
    return {"split16": torch.int16, "split8": torch.int8, "kahan": param.dtype, "fp32": torch.float32}[mode]


def is_remainder(master, param):
    """Whether `master` holds what is left of the exact weight beside the weight itself (split16, split8, kahan)."""
    return master.numel() > 0 and master.dtype in (torch.int16, torch.int8, param.dtype)


def check_fits(value, param, name):
    """Refuses a value whose weight would be infinite in the parameter's dtype."""
    if tuple(value.shape) != tuple(param.shape):
        raise ValueError(f"'{name}' is {list(param.shape)} but the value is {list(value.shape)}")
    limit = LIMIT.get(param.dtype)
    if limit is not None and value.device.type != "meta":
        beyond = int((value.detach().abs() >= limit).sum())
        if beyond:
            largest = float(value.detach().abs().max())
            raise ValueError(f"'{name}' does not fit {param.dtype}: {beyond} of {value.numel()} elements are at or beyond {limit:g} (largest {largest:g}); keep it in FP32")


def check_parameter(param, name, first, first_name):
    """Whether an optimizer can hold `param`, beside `first` of the same group."""
    if not param.dtype.is_floating_point or param.element_size() < 2:
        raise ValueError(f"'{name}' is {param.dtype}; expected float16, bfloat16, float32 or float64")
    if param.layout != torch.strided:
        raise ValueError(f"'{name}' is {param.layout}; expected a dense tensor")
    if param.device != first.device:
        raise ValueError(f"'{name}' is on {param.device} but '{first_name}' of the same group is on {first.device}; give each device its own group")
    if param.numel() and not torch.ops.aten.is_non_overlapping_and_dense(param):
        raise ValueError(f"'{name}' has strides {param.stride()} for shape {tuple(param.shape)}: its elements overlap or leave gaps")
    if param.dtype in SIXTEEN and param.device.type != "meta" and not torch.isfinite(param.detach()).all():
        limit = "65520" if param.dtype == torch.float16 else "3.396e38"
        raise ValueError(f"'{name}' holds a non-finite value; a {param.dtype} weight must be below {limit} in magnitude")


def names_of(group, index):
    names = group.get("param_names")
    return list(names) if names else [f"group {index}, parameter {i}" for i in range(len(group["params"]))]


def own(param, optimizer):
    _owners[param] = weakref.ref(optimizer)


def owned(param):
    """Whether an optimizer of ours that is still alive holds `param`."""
    return param in _owners and _owners[param]() is not None


@torch.no_grad()
def take_exact(param):
    """What cast_model kept of the weight before rounding it, or None; elements edited since are as they are now."""
    exact = getattr(param, "_halfstep_exact", None)
    if exact is None:
        return None
    del param._halfstep_exact
    exact = exact.to(param.device)
    return torch.where(exact.to(param.dtype) == param.detach(), exact, param.detach().to(exact.dtype))


class Turn:
    """What one call of an iteration leaves for the next: the clip factor, what the scaler hands to step() and gets back.

    Beside the optimizer, since torch.compile traces no assignment to an attribute of an optimizer itself.
    """

    def __init__(self):
        self.handed, self.clip, self.control, self.widened = None, None, None, []


class Room:
    """Masters, states and counters of one parameter group, in the order of its parameters.

    A parameter that is frozen when the group is added has neither master nor states until its first gradient.
    `tensor_states`: those of one element a parameter; `initial`: {state: value it begins at} where that is not zero.
    """

    def __init__(self, group, index, state_names, tensor_states=(), initial=None, zero_grads=False):
        self.group, self.index = group, index
        self.params, self.names = group["params"], names_of(group, index)
        device = self.params[0].device if self.params else torch.device("cpu")
        n = len(self.params)
        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        self.overflowed = torch.zeros(n, dtype=torch.int64, device=device)
        self.followed = torch.zeros(n, dtype=torch.int64, device=device)  # edited elements that compiled steps found
        self.reported, self.reported_total = [0] * n, 0
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.lr_value = None
        self.tensor_states, self.initial, self.zero_grads = tensor_states, initial or {}, zero_grads
        self.masters, self.states, self.scales, self.emas = [self._nothing()] * n, {}, {}, []
        self.keep(state_names)
        if group["ema_decay"] is not None:
            self.emas = [self._nothing()] * n
        self.raw, self.pointers = [p.detach() for p in self.params], pointers(self.params)
        self.frozen = [i for i, p in enumerate(self.params) if not p.requires_grad]
        self.present, self.tables, self.lists, self.backward = None, {}, [], None
        for param in self.params:
            if group["grad_dtype"] == "fp32" and param.dtype in SIXTEEN:
                param.grad_dtype = torch.float32
        self._furnish([i for i, p in enumerate(self.params) if p.requires_grad])
        self.remember()

    def _nothing(self):
        return torch.empty(0, device=self.steps.device)

    @torch.no_grad()
    def _furnish(self, indices):
        """Makes masters and states. Masters begin at what cast_model kept of the FP32 weights, else at the weights."""
        values = []
        for i in indices:
            param = self.params[i]
            dtype = master_dtype(self.group["master"], param)
            if dtype is not None:
                self.masters[i] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            for key in self.states:
                self.begin_state(i, key)
            exact = take_exact(param)
            values.append(param.detach() if exact is None else exact)
        if indices:
            H.write_masters_(values, [self.raw[i] for i in indices], [self.masters[i] for i in indices], torch.zeros_like(self.overflowed[: len(indices)]))
            self.begin_emas(indices)

    def compute_dtype(self, i):
        """What parameter `i` is updated in, and its states are where they are not held in less."""
        return torch.float64 if torch.float64 in (self.params[i].dtype, self.masters[i].dtype) else torch.float32

    # -- states ------------------------------------------------------------------------------------
    def keep(self, state_names):
        """From here on, these states are held; those there are stay as they are."""
        n = len(self.params)
        self.states = {key: self.states.get(key) or [self._nothing()] * n for key in state_names}
        coded = [key for key in state_names if key not in self.tensor_states] if self.group["states"] == "int8" else []
        self.scales = {key: self.scales.get(key) or [torch.empty(0, dtype=torch.int8, device=self.steps.device)] * n for key in coded}

    def _new_state(self, i, key):
        """Zeros as parameter `i` holds its state `key`, and the scales of int8 ones (else None)."""
        param, dtype = self.params[i], self.compute_dtype(i)
        if key in self.tensor_states:
            return torch.zeros(1, dtype=dtype, device=param.device), None
        if dtype == torch.float32:
            dtype = STATES[self.group["states"]]
        if dtype != torch.int8:
            return torch.zeros_like(param, dtype=dtype, requires_grad=False), None
        codes = torch.zeros_like(param, dtype=torch.uint8 if key in UNSIGNED else torch.int8, requires_grad=False)
        return codes, torch.full((-(-param.numel() // BLOCK),), _LOWEST, dtype=torch.int8, device=param.device)

    def begin_state(self, i, key):
        """State `key` of parameter `i` as before the first step."""
        self.states[key][i], scale = self._new_state(i, key)
        if scale is not None:
            self.scales[key][i] = scale
        if self.initial.get(key):
            self.write_state(i, key, torch.full_like(self.params[i], self.initial[key], dtype=self.compute_dtype(i), requires_grad=False))

    def scale_of(self, i, key):
        return self.scales[key][i] if self.states[key][i].dtype in (torch.int8, torch.uint8) else torch.empty(0, dtype=torch.int8, device=self.steps.device)

    def is_narrow(self, i, key):
        return self.states[key][i].dtype in (torch.bfloat16, torch.int8, torch.uint8)

    def read_state(self, i, key):
        """A copy, in FP32 where it is held in less."""
        state = self.states[key][i]
        return H.read_state(state, self.scale_of(i, key), key not in UNSIGNED) if self.is_narrow(i, key) else state.clone()

    def write_state(self, i, key, value):
        state = self.states[key][i]
        if self.is_narrow(i, key):
            H.write_state_(value.to(torch.float32), state, self.scale_of(i, key), key not in UNSIGNED, self.group["seed"])
        else:
            state.copy_(value.reshape(state.shape))

    # -- running means of the exact weights --------------------------------------------------------
    def begin_emas(self, indices):
        """These begin at the exact weights as they are now."""
        if self.emas and len(indices):
            exact = H.read_masters([self.raw[i] for i in indices], [self.masters[i] for i in indices])
            for i, value in zip(indices, exact):
                self.emas[i] = value

    def ema_params(self):
        """Copies; of a parameter without one (frozen, or in a group without ema_decay) the exact weight."""
        if not self.params:
            return []
        exact = H.read_masters(self.raw, self.masters)
        return [self.emas[i].clone() if self.emas and self.emas[i].shape == param.shape else exact[i] for i, param in enumerate(self.params)]

    def restart_emas(self, indices):
        """An edit before a parameter's first step is its initial value: its mean begins there."""
        indices = [i for i in indices if i not in self.frozen] if self.emas else []
        if indices:
            steps = self.steps.tolist()
            self.begin_emas([i for i in indices if steps[i] == 0])

    def held(self, i):
        """The master of parameter `i`, or one like that which it gets when it is unfrozen."""
        dtype = master_dtype(self.group["master"], self.params[i])
        return torch.zeros_like(self.params[i], dtype=dtype, requires_grad=False) if i in self.frozen and dtype is not None else self.masters[i]

    @property
    def weights(self):
        """What the ops write. A graph sees the parameters themselves, since an alias of its input would have to be cloned."""
        return self.params if torch.compiler.is_compiling() else self.raw

    def thaw(self, indices):
        """Parameters that were frozen from the start get their master and states."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"'{self.names[indices[0]]}' was unfrozen before a compiled step; take one step with it outside torch.compile, which makes its state")
        if capturing():
            raise RuntimeError(f"'{self.names[indices[0]]}' was unfrozen inside a captured graph; take one step with it before the capture")
        self.frozen = [i for i in self.frozen if i not in indices]
        self._furnish(indices)

    def publish(self, state):
        """`state` (the optimizer's) shows the very tensors that the ops update."""
        self.lists = []  # of what was there before
        for i, param in enumerate(self.params):
            if i in self.frozen:
                continue
            state[param] = {"step": self.steps[i], **{key: tensors[i] for key, tensors in self.states.items()}}
            state[param].update({f"{key}_scale": scales[i] for key, scales in self.scales.items() if scales[i].numel()})
            if self.masters[i].numel():
                state[param]["master"] = self.masters[i]
            if self.emas:
                state[param]["ema"] = self.emas[i]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("raw", "versions", "pointers", "tables", "lists", "backward")}

    def __setstate__(self, state):
        self.__dict__.update(state, tables={}, lists=[], backward=None)
        self.raw, self.pointers = [p.detach() for p in self.params], pointers(self.params)
        self.remember()

    # -- what changed since the last step ----------------------------------------------------------
    def remember(self):
        """From here on, what the parameters are now counts as known."""
        now = pointers(self.params)
        if now != self.pointers:
            for i, (new, old) in enumerate(zip(now, self.pointers)):
                if new != old:
                    self.raw[i], self.lists = self.params[i].detach(), []
                    self._settle(i)
        self.versions, self.pointers = versions(self.params), now

    def changed(self):
        return versions(self.params) != self.versions or pointers(self.params) != self.pointers

    def follow_compiled(self):
        """A graph cannot ask for versions: where masters hold values of their own, an edited weight is found by its value."""
        if any(master.numel() and master.dtype not in (torch.int16, torch.int8) for master in self.masters):
            changed = torch.zeros_like(self.followed)
            H.refresh_masters_(self.params, self.masters, changed, False)
            self.followed.add_(changed)

    @torch.no_grad()
    def catch_up(self):
        """Follows edits and moves of the parameters. Returns the names of edited ones, and whether tensors were replaced."""
        edited, replaced, swapped = [], False, []
        compiled = self.versions is None  # steps of a graph wrote the weights: versions say nothing
        if compiled and capturing():
            raise RuntimeError(f"the steps of group {self.index} so far were compiled; take one outside torch.compile before the capture, so that edits can be told from steps")
        seen = versions(self.params) if compiled else self.versions
        for i, param in enumerate(self.params):
            moved = param.data_ptr() != self.pointers[i]
            if not moved and param._version == seen[i] and not compiled:
                continue
            if capturing():
                raise RuntimeError(f"'{self.names[i]}' was {'moved' if moved else 'edited'} inside a captured graph; do it between steps, outside the capture")
            if moved:
                swapped.append((i, self.raw[i]))
            edited.append(i)
        self._check_moved([i for i, _ in swapped])
        for i, _ in swapped:
            self.raw[i], self.lists = self.params[i].detach(), []
            replaced |= self._settle(i)
        split = [i for i in edited if is_remainder(self.masters[i], self.params[i]) and self.params[i]._version != seen[i]]
        for i, old in swapped:
            if self._rewrite(i, old):
                split.append(i)
        names = {name for name, _, _ in self.refresh(edited)} | self._followed()
        self.restart_emas(edited)
        self.remember()
        return [self.names[i] for i in edited if self.names[i] in names or i in split], replaced

    def _followed(self):
        """Names of the edited weights that compiled steps found since the last call."""
        found = self.followed.tolist() if self.versions is None else []
        if any(found):
            self.followed.zero_()
        return {name for name, count in zip(self.names, found) if count}

    def _check_moved(self, indices):
        """Before anything follows a move: all parameters of the group went along, with dtype and shape as they were."""
        if not indices:
            return
        for i, (param, raw) in enumerate(zip(self.params, self.raw)):
            if param.dtype != raw.dtype or param.shape != raw.shape:
                raise RuntimeError(f"'{self.names[i]}' is {dtype_name(param.dtype)}{list(param.shape)} but was {dtype_name(raw.dtype)}{list(raw.shape)} when the optimizer "
                                   "was made; convert the model first, then make the optimizer")
            if param.device != self.params[0].device:
                raise RuntimeError(f"'{self.names[i]}' is on {param.device} but '{self.names[0]}' of the same group is on {self.params[0].device}; move all of them")

    def _settle(self, i):
        """Master and states of a moved parameter take its device and strides; True when they are new tensors."""
        param = self.params[i]
        device = param.device
        if self.steps.device != device:
            self.steps, self.overflowed, self.lr = self.steps.to(device), self.overflowed.to(device), self.lr.to(device)
            for tensors in (self.masters, *self.states.values(), *self.scales.values(), self.emas):
                tensors[:] = [t.to(device) for t in tensors]
            return True
        moved = lambda tensor: tensor.shape == param.shape and tensor.numel() and tensor.stride() != param.stride()
        replaced = False
        for key, tensors in self.states.items():
            if moved(tensors[i]) and key in self.scales and tensors[i].dtype in (torch.int8, torch.uint8):
                value = self.read_state(i, key)  # its blocks follow the memory, so they are made anew
                self.begin_state(i, key)
                self.write_state(i, key, value)
                replaced = True
        for tensors in (self.masters, *self.states.values(), self.emas):
            if tensors and moved(tensors[i]):
                tensors[i] = torch.empty_like(param, dtype=tensors[i].dtype, requires_grad=False).copy_(tensors[i])
                replaced = True
        return replaced

    def _rewrite(self, i, old):
        """A parameter whose master is a remainder got other memory: elements with another value begin anew at that value. True if there are any."""
        if not is_remainder(self.masters[i], self.params[i]):
            return False
        differs = old.to(self.raw[i].device) != self.raw[i]
        self.masters[i].masked_fill_(differs, 0)
        return bool(differs.any())

    @torch.no_grad()
    def refresh(self, indices, dry_run=False):
        """Names and counts of weights that their masters do not round to; unless `dry_run`, masters follow."""
        indices = [i for i in indices if self.masters[i].numel()]
        if not indices:
            return []
        changed = torch.zeros(len(indices), dtype=torch.int64, device=self.steps.device)
        H.refresh_masters_([self.raw[i] for i in indices], [self.masters[i] for i in indices], changed, dry_run)
        return [(self.names[i], count, self.params[i].numel()) for i, count in zip(indices, changed.tolist()) if count]

    def table(self, op):
        """Where `op` keeps its rows of pointers between the steps on a GPU: device memory and its mirror. None on the CPU."""
        device = self.steps.device
        if device.type != "cuda" or torch.compiler.is_compiling():  # the mirror, a host tensor, would keep a compiled step out of a CUDA graph
            return []
        known = self.tables.get(op)
        if known is None or known[0].device != device:
            size = _ROW * len(self.params)
            known = self.tables[op] = [torch.empty(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8)]
        return known

    def frame(self, grads, lr, control):
        """The arguments that all step ops begin with (csrc/ops/optim.h)."""
        states = [tensor for tensors in (*self.states.values(), *self.scales.values()) for tensor in tensors]
        lists = [self.weights, self.masters, states, self.emas]
        if not torch.compiler.is_compiling():
            self.lists = self.lists or [TensorList() for _ in lists]
            lists = [kept.of(tensors) for kept, tensors in zip(self.lists, lists)]
        weights, masters, states, emas = lists
        zeroed = [self._nothing() if g is None else g for g in grads] if self.zero_grads else []
        return weights, [] if self.zero_grads else grads, masters, states, emas, zeroed, self.steps, self.overflowed, lr, control, self.table("step")

    def frame_numbers(self):
        g = self.group
        decay = 1.0 if g["ema_decay"] is None else g["ema_decay"]
        return {"ema_decay": decay, "stochastic": g["master"] == "stochastic", "seed": g["seed"] + (self.index << 32)}

    # -- what a step needs -------------------------------------------------------------------------
    def gather(self):
        """The gradients, or None where there is none at all."""
        grads = [p.grad for p in self.params] if torch.compiler.is_compiling() else list(map(_grad, self.params))
        if self.frozen:
            thawed = [i for i in self.frozen if grads[i] is not None]
            if thawed:
                self.thaw(thawed)
        return grads if any(g is not None for g in grads) else None

    def statistics(self, grads):
        """grad_stats of the gradients; of those that the backward's hooks saw, without reading them."""
        if self.backward is None or torch.compiler.is_compiling():
            return grad_stats(grads, self.table("grad_stats"))
        self.backward.follow(self.params)  # parameters that were unfrozen since
        return self.backward.join(grads, self.table("grad_stats"))

    def refuse_sparse(self, grads):
        for grad, name in zip(grads, self.names):
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(f"'{name}' has a sparse gradient; this optimizer supports dense gradients only")

    def check_capture(self, grads):
        """A graph replays what it captured: a float lr and another set of gradients would be silently ignored."""
        lr = self.group["lr"]
        if not isinstance(lr, torch.Tensor):
            raise RuntimeError(f"lr of group {self.index} is the float {lr} inside a captured graph, which would replay it for ever; pass lr=torch.tensor({lr})")
        for i, grad in enumerate(grads):
            there = grad is not None
            if self.present is not None and there != self.present[i]:
                raise RuntimeError(f"'{self.names[i]}' was {'unfrozen' if there else 'frozen'} inside a captured graph (its gradient is {'there' if there else 'missing'}, unlike "
                                   "in the step before); do it between steps, outside the capture")

    def stepped(self, grads):
        """After an update: autograd must know that the weights were written, and an edit must not be taken for ours."""
        if self.backward is not None:
            self.backward.forget()
        if torch.compiler.is_compiling():
            self.versions = None  # unknown; the next eager call compares values
            return
        self.present = [g is not None for g in grads]
        written = self.raw if False not in self.present else [p for p, there in zip(self.raw, self.present) if there]
        if self.zero_grads:
            written = [*written, *(g for g in grads if g is not None)]
        torch.autograd.graph.increment_version(written)
        self.versions = versions(self.params)

    def device_lr(self):
        lr = self.group["lr"]
        if torch.compiler.is_compiling():
            # torch 2.11 loses in-place ops on 0-d float64 tensors of the CPU when it traces a function a second time.
            there = dict(dtype=torch.float64, device=self.steps.device)
            return to_device(lr.reshape(()), **there) if isinstance(lr, torch.Tensor) else torch.ones((), **there) * lr  # a product stays a number of the graph; full() would fix it
        if isinstance(lr, torch.Tensor):
            self.lr.copy_(lr.reshape(()))
        elif lr != self.lr_value:
            self.lr.fill_(float(lr))
            self.lr_value = lr
        return self.lr

    def newly_overflowed(self):
        """[(parameter, elements)] kept from leaving the 16-bit range since the last call. Reads device memory."""
        total = int(self.overflowed.sum())
        if total == self.reported_total:
            return []
        counts = self.overflowed.tolist()
        new = [(i, count - old) for i, (count, old) in enumerate(zip(counts, self.reported)) if count > old]
        self.reported, self.reported_total = counts, total
        return new
