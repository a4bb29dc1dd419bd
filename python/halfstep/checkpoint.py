"""Checkpoints: files that appear whole or not at all, and the state dicts of the optimizers (format 1, csrc/api/optim_state.cpp)."""

import contextlib
import itertools
import math
import os
import pickle
import zipfile

import torch

from . import policies
from ._file import replacing
from ._library import H
from ._room import BLOCK, UNSIGNED, check_fits, dtype_name, is_remainder

_FOREIGN = ("params", "param_names", "master", "states", "grad_dtype", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
_ENTRIES = {"step", "master", "remainder", "weight_checksum", "ema", *_STATES, *(f"{key}_scale" for key in _STATES)}
_OURS = ("master", "states", "grad_dtype", "ema_decay", "seed", "decouple_lr", "max_lr", "decay_order")  # group options that torch does not have


# -- files -----------------------------------------------------------------------------------------
def save(obj, path):
    """torch.save to `path`, written beside it, synced and renamed: `path` always holds a whole file, the old or the new."""
    with replacing(path) as file:
        torch.save(obj, file)


def load(path, map_location=None):
    """torch.load(path, weights_only=True); a file that cannot be read raises an error with its name."""
    path = os.fspath(path)
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
            if any(name.endswith("/constants.pkl") for name in file.namelist()):
                raise RuntimeError(f"cannot read '{path}' as a checkpoint: it is an archive of torch::save, which only C++ reads; write it with halfstep::save")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        if getattr(error, "filename", None) is not None:
            raise  # no such file, or one that may not be opened: it has its name
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"cannot read '{path}' as a checkpoint: {reason[0]}") from error


# -- optimizers: out -------------------------------------------------------------------------------
def weight_checksum(weight):
    """Over the bits of a 16-bit weight: what shows that a remainder belongs to another weight."""
    bits, block, total = weight.detach().contiguous().view(torch.int16).flatten(), 1 << 20, 0
    places = torch.arange(1, 2 * min(block, bits.numel()) + 1, 2, device=bits.device)
    for part in bits.split(block) if bits.numel() else ():
        total = (total * 1000003 + int(((part.long() + 1) * places[:part.numel()]).sum())) & ((1 << 62) - 1)
    return total


def _packed_groups(groups):
    """torch's form: parameters by number."""
    numbers = itertools.count()
    return [{**{k: v for k, v in group.items() if k != "params"}, "params": [next(numbers) for _ in group["params"]]} for group in groups]


@torch.no_grad()
def optimizer_state(optimizer, packed=False):
    optimizer._follow_edits()
    state = {}
    for room in optimizer._rooms:
        exact = H.read_masters(room.raw, room.masters) if room.params else []
        for i, param in enumerate(room.params):
            if i in room.frozen:  # it has neither master nor states
                state[len(state)] = {}
                continue
            entry = {"step": room.steps[i].to(torch.float32)}
            for key, tensors in room.states.items():
                entry[key] = tensors[i].clone() if packed else room.read_state(i, key)
                if packed and tensors[i].dtype in (torch.int8, torch.uint8):
                    entry[f"{key}_scale"] = room.scales[key][i].clone()
            if packed and is_remainder(room.masters[i], param):
                entry.update(remainder=room.masters[i].clone(), weight_checksum=weight_checksum(param))
            elif room.masters[i].numel():
                entry["master"] = exact[i]
            if room.emas:
                entry["ema"] = room.emas[i].clone()
            state[len(state)] = entry
    return {"format": 1, "optimizer": type(optimizer).__name__, "state": state, "param_groups": _packed_groups(optimizer.param_groups)}


def torch_state(optimizer):
    """As torch.optim's class of the same name writes it."""
    name = type(optimizer).__name__
    if not hasattr(torch.optim, name):
        raise TypeError(f"torch.optim has no {name}")
    for i, group in enumerate(optimizer.param_groups):
        for key, plain in (("decouple_lr", False), ("decay_order", "torch")):
            if group.get(key, plain) != plain:
                raise ValueError(f"torch.optim.{name} has no {key}, but group {i} has {key}={group[key]!r}")
    own = optimizer_state(optimizer)
    entries = {i: {k: v for k, v in e.items() if k not in ("master", "ema")} for i, e in own["state"].items()}
    state = {i: e for i, e in entries.items() if e and float(e["step"]) > 0}
    if name == "SGD":  # torch's counts no steps
        state = {i: {"momentum_buffer": e.get("momentum_buffer")} for i, e in state.items()}
    if name == "Adagrad":  # torch's has a sum from the start
        params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
        begin = lambda group, p: {"step": torch.tensor(0.0), "sum": torch.full_like(p, group["initial_accumulator_value"], dtype=torch.float32, requires_grad=False)}
        state = {i: entries[i] or begin(*pair) for i, pair in enumerate(params)}
    groups = [{k: v for k, v in g.items() if k not in _OURS} for g in own["param_groups"]]
    for group in groups:
        group.update(foreach=None, differentiable=False, fused=None)
        if "betas" in group:
            group.update(capturable=False, decoupled_weight_decay=name == "AdamW")
    return {"state": state, "param_groups": groups}


# -- optimizers: in --------------------------------------------------------------------------------
def _keys(mapping):
    return ", ".join(map(str, mapping))


def _kind(state_dict):
    """Ours says it; of torch's files the hyperparameters tell."""
    groups = state_dict["param_groups"]
    if "optimizer" in state_dict or not groups:
        return state_dict.get("optimizer", "")
    if "betas" in groups[0] and "eps" in groups[0]:
        decoupled = groups[0].get("decoupled_weight_decay")
        return "Adam or AdamW" if decoupled is None else "AdamW" if decoupled else "Adam"
    if "lr_decay" in groups[0] and "initial_accumulator_value" in groups[0]:
        return "Adagrad"
    return "SGD" if "momentum" in groups[0] and "dampening" in groups[0] else f"an optimizer with {_keys(groups[0])}"


def check_header(state_dict, kind, lengths):
    """Refuses another format, another optimizer, other numbers of groups and parameters. Returns whether it is our format."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"optimizer state has no '{key}' (keys: {_keys(state_dict)})")
    if state_dict.get("format", 1) != 1:
        raise ValueError(f"optimizer state has format {state_dict['format']}; this halfstep reads format 1")
    found = _kind(state_dict)
    if found and found != kind and not (found == "Adam or AdamW" and kind in ("Adam", "AdamW")):
        raise ValueError(f"optimizer state is of {found} but this optimizer is {kind}")
    groups = state_dict["param_groups"]
    if len(groups) != len(lengths):
        raise ValueError(f"optimizer state has {len(groups)} parameter groups but the optimizer has {len(lengths)}")
    for i, (group, length) in enumerate(zip(groups, lengths)):
        if len(group["params"]) != length:
            raise ValueError(f"optimizer state has {len(group['params'])} parameters in group {i} but the optimizer has {length}")
    return "format" in state_dict


def _check_option(key, value, like, group):
    """A hyperparameter has the type of the one that is there, and a value that the constructor would take."""
    where = f"optimizer state has {key} {value!r} in group {group}"
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) or isinstance(x, torch.Tensor) and x.numel() == 1
    if isinstance(like, bool):
        good, expected = isinstance(value, bool), "True or False"
    elif isinstance(like, (tuple, list)):
        good, expected = isinstance(value, (tuple, list)) and len(value) == 2 and all(number(x) and 0 <= x < 1 for x in value), "two numbers from 0 to below 1"
    elif isinstance(like, (int, float, torch.Tensor)):
        good, expected = number(value) and (key == "dampening" or float(value) >= 0), "a number >= 0"
    else:
        return
    if not good:
        raise ValueError(f"{where}; expected {expected}")


def _step(entry, name):
    value = entry["step"]
    if isinstance(value, torch.Tensor) and value.numel() != 1 or not isinstance(value, (int, float, torch.Tensor)):
        raise ValueError(f"optimizer state 'step' of '{name}' is {value!r}; expected one number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"optimizer state 'step' of '{name}' is {float(value)}; expected a number >= 0")
    return int(value)


def _tensor(entry, key, param, name, shape=None, dtypes=None):
    """An entry on the parameter's device: of its shape or `shape`, floating or one of `dtypes`."""
    value, given, shape = entry[key], shape, param.shape if shape is None else shape
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"optimizer state '{key}' of '{name}' is {type(value).__name__}; expected a tensor")
    if tuple(value.shape) != tuple(shape) and not (tuple(shape) == (1,) and value.numel() == 1):
        raise ValueError(f"optimizer state '{key}' of '{name}' is {list(value.shape)} but " + (f"the parameter is {list(shape)}" if given is None else f"{list(shape)} is expected"))
    if value.dtype not in dtypes if dtypes else not value.is_floating_point():
        raise ValueError(f"optimizer state '{key}' of '{name}' is {value.dtype}; expected {' or '.join(map(dtype_name, dtypes)) if dtypes else 'a floating dtype'}")
    return value.to(param.device)


def _state(entry, key, param, name, tensor_state):
    """(value in FP32 or FP64, codes or None, scales) of one state: int8 codes are read with their scales."""
    value = entry[key]
    if tensor_state or not isinstance(value, torch.Tensor) or value.dtype not in (torch.int8, torch.uint8):
        return _tensor(entry, key, param, name, (1,) if tensor_state else None), None, None
    if f"{key}_scale" not in entry:
        raise _missing(entry, f"{key}_scale", name)
    codes = _tensor(entry, key, param, name, dtypes=(torch.uint8 if key in UNSIGNED else torch.int8,))
    scale = _tensor(entry, f"{key}_scale", param, name, (-(-param.numel() // BLOCK),), (torch.int8,)).contiguous()
    if codes.numel() and not torch.ops.aten.is_non_overlapping_and_dense(codes):
        raise ValueError(f"optimizer state '{key}' of '{name}' has strides {codes.stride()} for shape {tuple(codes.shape)}: its elements overlap or leave gaps")
    return H.read_state(codes, scale, key not in UNSIGNED), codes, scale


def _missing(entry, key, name):
    return ValueError(f"optimizer state of '{name}' has no '{key}' (keys: {_keys(entry)})")


def _plan_states(entry, names, param, name, ours, tensor_states):
    """(step, {key: what _state gives, or None for the beginning}). Torch's SGD counts no steps: a buffer means that at least one was taken."""
    counts = ours or names[:1] != ["momentum_buffer"]
    if entry and "step" not in entry and (ours or counts and names):
        raise _missing(entry, "step", name)
    step, states = _step(entry, name) if "step" in entry else 0, {}
    for key in names:
        present = entry.get(key) is not None
        if not present and entry and counts:
            raise _missing(entry, key, name)
        states[key] = _state(entry, key, param, name, key in tensor_states) if present else None
    if not counts:
        step = max(step, 1) if states["momentum_buffer"] is not None else 0
    return step, states


def _exact(entry, param, name, ours, masters):
    """The exact value that the saved master stands for, or the weight where none was saved."""
    hint = '; load the model first or pass masters="from_params"'
    if masters == "from_params" or not entry:
        return param.detach()
    if entry.get("remainder") is not None:
        remainder = _tensor(entry, "remainder", param, name, dtypes=(torch.int16, torch.int8, param.dtype))
        if "weight_checksum" not in entry:
            raise _missing(entry, "weight_checksum", name)
        if entry["weight_checksum"] != weight_checksum(param):
            raise ValueError(f"optimizer state is for other weights: '{name}' differs{hint}")
        return H.read_masters([param.detach()], [torch.empty_like(param, dtype=remainder.dtype, requires_grad=False).copy_(remainder)])[0]
    if entry.get("master") is not None:
        return _tensor(entry, "master", param, name)
    if ours:
        raise ValueError(f"{_missing(entry, 'master', name)}; pass masters=\"from_params\" to take it from the weights")
    return param.detach()


def check_weights(rounded, param, name):
    """Refuses masters that round to other weights than the parameter's."""
    param = param.detach()
    differs = int(((rounded != param) & ~(rounded.isnan() & param.isnan())).sum())
    if differs:
        raise ValueError(f"optimizer state is for other weights: '{name}' differs in {differs} of {param.numel()} elements; "
                         'load the model first or pass masters="from_params"')


def _plan_master(entry, param, held, name, ours, masters):
    """The new master, or None where none is held."""
    if held.numel() == 0:
        return None
    value = _exact(entry, param, name, ours, masters)
    check_fits(value, param, name)
    remainder = entry.get("remainder") if masters == "saved" else None
    if remainder is not None and remainder.dtype == held.dtype:  # as it was held, to the bit
        return torch.empty_like(held).copy_(remainder)
    rounded, fresh = torch.zeros_like(param, requires_grad=False), torch.zeros_like(held)
    H.write_masters_([value], [rounded], [fresh], torch.zeros(1, dtype=torch.int64, device=param.device))
    check_weights(rounded, param, name)
    return fresh


def _plan_ema(entry, param, name):
    """The running mean, or None where it begins at the loaded weight."""
    if entry.get("ema") is None:
        return None
    value = _tensor(entry, "ema", param, name)
    check_fits(value, param, name)
    return value


def _plan_options(optimizer, room, saved):
    """The hyperparameters of a saved group; how masters, states and gradients are kept stays as it is here."""
    options = {k: v for k, v in saved.items() if k not in _FOREIGN}
    if room.group["ema_decay"] is None or options.get("ema_decay") is None:  # a mean that only one side has
        options.pop("ema_decay", None)
    for key, value in options.items():
        if key in optimizer.defaults:
            _check_option(key, value, optimizer.defaults[key], room.index)
    try:
        optimizer._check_options({**room.group, **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer state of group {room.index}: {error}") from error
    return options


def _ordered(room, saved):
    """The saved number of each parameter: by name where both sides have names, else by place."""
    numbers, there, here = saved["params"], saved.get("param_names"), room.group.get("param_names")
    if not there or not here or list(there) == list(here) or len(there) != len(numbers):
        return numbers
    by_name = dict(zip(there, numbers))
    if set(by_name) == set(here):
        return [by_name[name] for name in here]
    moved = [name for name, other in zip(here, there) if name != other and name in by_name]
    if moved:  # not one renaming of all: some kept their name at another place
        missing = next(name for name in here if name not in by_name)
        raise ValueError(f"optimizer state has '{moved[0]}' at another place in group {room.index}, and no '{missing}': is it of another model?")
    return numbers


def _plan_group(optimizer, room, saved, state, ours, masters):
    """(options, [(whether the file says something of it, step, states, master, mean)]) of one parameter group; every refusal comes from here."""
    options = _plan_options(optimizer, room, saved)
    names = optimizer._state_names({**room.group, **options})
    plans = []
    for i, (param, name, number) in enumerate(zip(room.params, room.names, _ordered(room, saved))):
        if ours and number not in state:
            raise ValueError(f"optimizer state has no entry {number} for '{name}'")
        entry = state.get(number, {})  # empty for a parameter that was never stepped
        unknown = sorted(set(entry) - _ENTRIES) if ours else None
        if unknown:
            raise ValueError(f"optimizer state of '{name}' has an unknown '{unknown[0]}'")
        plans.append((bool(entry), *_plan_states(entry, names, param, name, ours, room.tensor_states), _plan_master(entry, param, room.held(i), name, ours, masters),
                      _plan_ema(entry, param, name) if room.emas else None))
    return options, plans


def _fill(room, i, step, states, master, mean):
    """One parameter of a checked load."""
    room.steps[i] = step
    for key, loaded in states.items():
        if loaded is None or room.states[key][i].numel() == 0:
            room.begin_state(i, key)
        if loaded is None:
            continue
        value, codes, scale = loaded
        held = room.states[key][i]
        if codes is not None and codes.dtype == held.dtype and codes.stride() == held.stride():
            held.copy_(codes)
            room.scales[key][i].copy_(scale)
        else:
            room.write_state(i, key, value)
    if master is not None:
        room.masters[i].copy_(master)
    if room.emas:
        room.begin_emas([i]) if mean is None else room.emas[i].copy_(mean)


@torch.no_grad()
def load_optimizer_state(optimizer, state_dict, masters="saved"):
    if masters not in ("saved", "from_params"):
        raise ValueError(f"masters is {masters!r}; expected 'saved' or 'from_params'")
    ours = check_header(state_dict, type(optimizer).__name__, [len(room.params) for room in optimizer._rooms])
    groups, state = state_dict["param_groups"], state_dict["state"]
    if ours:
        stray = set(state) - {number for group in groups for number in group["params"]}
        if stray:
            raise ValueError(f"optimizer state has an entry {sorted(stray, key=str)[0]!r} that is no parameter's")
    optimizer._follow_edits(report=False)  # the model was loaded just now
    plans = [_plan_group(optimizer, room, saved, state, ours, masters) for room, saved in zip(optimizer._rooms, groups)]
    # Nothing below is refused.
    for room, (options, params) in zip(optimizer._rooms, plans):
        for key, value in options.items():
            if isinstance(room.group.get(key), torch.Tensor):
                room.group[key].copy_(torch.as_tensor(value))
            else:
                room.group[key] = value.clone() if isinstance(value, torch.Tensor) else value
        room.lr_value, room.initial = None, optimizer._initial(room.group)
        room.keep(optimizer._state_names(room.group))
        for i, (present, step, states, master, mean) in enumerate(params):
            if i in room.frozen:
                if not present:
                    continue
                room.thaw([i])  # frozen here from the start, but not there
            _fill(room, i, step, states, master, mean)
        room.remember()
        room.publish(optimizer.state)


# -- hs.optim.Masters ------------------------------------------------------------------------------
def masters_kind(optimizer):
    return f"Masters({type(optimizer.inner).__name__})"


@torch.no_grad()
def masters_state(optimizer):
    """The inner optimizer's state dict, with the master of each parameter."""
    inner = optimizer.inner.state_dict()
    copy = lambda value: value.detach().clone() if isinstance(value, torch.Tensor) else value
    state = {i: {k: copy(v) for k, v in inner["state"].get(i, {}).items()} for i in range(len(optimizer._pairs))}
    for i, (param, master) in enumerate(optimizer._pairs):
        weight = param.detach()  # where it was edited since the last step, the master follows
        state[i]["master"] = torch.where(master.detach().to(weight.dtype) == weight, master.detach(), weight.to(master.dtype))
    return {"format": 1, "optimizer": masters_kind(optimizer), "state": state, "param_groups": inner["param_groups"]}


@torch.no_grad()
def load_masters_state(optimizer, state_dict, masters="saved"):
    if masters not in ("saved", "from_params"):
        raise ValueError(f"masters is {masters!r}; expected 'saved' or 'from_params'")
    names = optimizer._names
    inner_kind, ours = type(optimizer.inner).__name__, "format" in state_dict
    check_header({"optimizer": inner_kind, **state_dict}, masters_kind(optimizer) if ours else inner_kind,
                 [len(g["params"]) for g in optimizer.param_groups])
    for i, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.inner.param_groups)):
        missing = sorted(set(group) - set(saved) - set(_FOREIGN))
        if missing:
            raise ValueError(f"optimizer state has no '{missing[0]}' in group {i} (keys: {_keys(saved)}): is it of another optimizer than {inner_kind}?")
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    values, held = [], optimizer.inner.state_dict()
    for i, (number, name, (param, _)) in enumerate(zip(numbers, names, optimizer._pairs)):
        entry = state_dict["state"].get(number, {})
        for key, old in held["state"].get(i, {}).items():
            new = entry.get(key)
            if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape != new.shape:
                raise ValueError(f"optimizer state '{key}' of '{name}' is {list(new.shape)} but here it is {list(old.shape)}")
        if masters == "from_params" or not ours:
            values.append(param.detach())
            continue
        if "master" not in entry:
            raise _missing(entry, "master", name)
        value = _tensor(entry, "master", param, name)
        check_fits(value, param, name)
        check_weights(value.to(param.dtype), param, name)
        values.append(value)
    stripped = {k: {key: v for key, v in e.items() if key != "master"} for k, e in state_dict["state"].items()}
    try:
        optimizer.inner.load_state_dict({"state": {k: e for k, e in stripped.items() if e}, "param_groups": state_dict["param_groups"]})
    except Exception:
        optimizer.inner.load_state_dict(held)
        raise
    for group, inner, synced in zip(optimizer.param_groups, optimizer.inner.param_groups, optimizer._synced):
        loaded = {k: v for k, v in inner.items() if k not in ("params", "param_names")}
        group.update(loaded)
        synced.update(loaded)
    for value, (_, copy) in zip(values, optimizer._pairs):
        copy.copy_(value)
    optimizer._remember()


# -- the scaler ------------------------------------------------------------------------------------
def _finite(state_dict, key):
    value = state_dict[key]
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)) or isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"scaler state '{key}' is {value!r}; expected a number")
    return value.item() if isinstance(value, torch.Tensor) else value


def _numbers(own, key):
    """The vectors of 1.0 hold the first sixteen numbers; a zero stands for what they meant."""
    values = own.get(key)
    if not isinstance(values, (list, tuple)) or not 16 <= len(values) <= policies.ENTRIES or not all(isinstance(v, (int, float)) for v in values):
        raise ValueError(f"scaler state '{key}' is {values!r}; expected a list of 16 to {policies.ENTRIES} numbers")
    return list(map(float, values)) + [0.0] * (policies.ENTRIES - len(values))


def _user_state(own, rule):
    """The tensors of a Policy of the user, or None."""
    if not isinstance(rule, policies.Policy):
        return None
    saved = own.get("policy_state", {})
    for name, tensor in rule.init().items():
        if name not in saved:
            raise ValueError(f"scaler state has no '{name}' of the policy (keys: {_keys(saved)})")
        if not isinstance(saved[name], torch.Tensor) or saved[name].shape != tensor.shape:
            raise ValueError(f"scaler state's policy '{name}' is {saved[name]!r} but the policy's is {list(tensor.shape)}")
    return {name: saved[name].detach().clone() for name in rule.init()}


def read_scaler_state(state_dict, rule):
    """(policy, the numbers of its state, updates or None, tensors of a Policy of the user) of ours or torch's state dict; every refusal comes from here."""
    if not state_dict:
        raise RuntimeError("The source state dict is empty, possibly because it was saved from a disabled instance of GradScaler.")
    for key in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"):
        if key not in state_dict:
            raise ValueError(f"scaler state has no '{key}' (keys: {_keys(state_dict)})")
    scale = float(torch.tensor(float(_finite(state_dict, "scale")), dtype=torch.float32))
    if not policies.LOWEST_SCALE <= scale <= policies.HIGHEST_SCALE:
        raise ValueError(f"scaler state has scale {scale}; expected between 2^-126 and 2^127")
    tracker = _finite(state_dict, "_growth_tracker")
    if not (math.isfinite(tracker) and tracker >= 0):
        raise ValueError(f"scaler state has _growth_tracker {tracker}; expected a number >= 0")
    own, updates, user = state_dict.get("halfstep"), None, None
    if own is not None:
        if own.get("format") != 1:
            raise ValueError(f"scaler state has format {own.get('format')}; this halfstep reads format 1")
        if "updates" not in own:
            raise ValueError(f"scaler state 'halfstep' has no 'updates' (keys: {_keys(own)})")
        numbers, updates = _numbers(own, "state"), int(_finite(own, "updates"))
        rule = policies.rule_of(_numbers(own, "policy"), rule)
        user = _user_state(own, rule)
    if isinstance(rule, policies.Dynamic):
        rule = policies.replace(rule, growth_factor=float(_finite(state_dict, "growth_factor")), backoff_factor=float(_finite(state_dict, "backoff_factor")),
                                growth_interval=int(_finite(state_dict, "growth_interval")))
    if own is None:
        numbers = H.init_scale_state(rule.vector()).tolist()
    numbers[0], numbers[1] = scale, float(tracker)
    return rule, numbers, updates, user
