"""What a training script says of itself, make(arm, seed) -> Job, and the ways to train it, each an Arm."""

import contextlib
import copy
import hashlib
import inspect
import re
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Iterable

import torch

from . import _decisions, optim
from ._islands import islands_
from ._qat import KINDS, quantize_
from ._replay import policy_of
from .amp import GradScaler, autocast
from .cast import cast_model

PRESETS = {
    "fp32": dict(compute="fp32"),
    "mixed": dict(compute="fp16", weights="cast"),
    "autocast": dict(compute="fp16", weights="autocast"),
    "bf16": dict(compute="bf16", weights="cast"),
    "fp16-s1": dict(compute="fp16", weights="cast", policy="static(scale=1)"),
}
_CHOICES = {"compute": ("fp32", "fp16", "bf16"), "weights": ("cast", "autocast"), "states": ("fp32", "bf16", "int8"),
            "master": ("auto", "fp32", "fp64", "split16", "split8", "kahan", "stochastic", "none"), "grad_dtype": ("param", "fp32"), "optimizer": ("auto", "torch", "halfstep"),
            "qat": (None, *KINDS)}
_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Arm:
    """One way to train a model: what compare() gives to make(). By text: a preset, or `preset:key=value,key=value`.

    Presets: fp32; mixed (FP16 weights, split16 masters, dynamic loss scale); autocast (FP32 weights, FP16 autocast); bf16 (BF16 weights,
    split16 masters, no loss scale); fp16-s1 (as mixed, the loss scale fixed at 1).
    """

    name: str
    compute: str = "fp32"            #: fp32, fp16, bf16
    weights: str = "cast"            #: cast (16-bit weights) or autocast (FP32 weights, cast in each forward)
    master: str = "auto"             #: of a halfstep optimizer
    states: str = "fp32"             #: of a halfstep optimizer
    grad_dtype: str = "param"        #: of a halfstep optimizer: fp32 sums micro-batches in FP32
    policy: "str | None" = None      #: loss scale: a preset or policy, `dynamic`, `static(scale=1024)`, `megatron`; None: Dynamic
    keep_fp32: "str | None" = None   #: names or globs of modules that stay FP32, `head|*.norm*`; None: all norms
    islands: "str | None" = None     #: names or globs of modules of a 16-bit model that compute in FP32 (docs/precision.md), `2|blocks.3.*`
    qat: "str | None" = None         #: layers compute with weights rounded to int8 (w8), inputs too (w8a8), or to int4 (w4)
    optimizer_from: str = "auto"     #: torch or halfstep; auto: torch's in the fp32 arm where it takes every argument, else halfstep's
    device: str = "cpu"              #: cpu or cuda: where make() is to put model and data
    fingerprint: "str | None" = field(default=None, init=False, repr=False)  #: of the weights that apply() was given
    _wide: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        for key, value in self.options().items():
            allowed = _CHOICES.get("optimizer" if key == "optimizer_from" else key)
            if allowed and value not in allowed:
                raise ValueError(f"arm {self.name!r}: {key.removesuffix('_from')} is {value!r}; expected one of {', '.join(filter(None, allowed))}")
        if self.islands is not None and self.compute == "fp32":
            raise ValueError(f"arm {self.name!r}: islands is {self.islands}, but compute is fp32: all of the model is in FP32")
        if self.policy is not None and self.compute != "fp16":
            raise ValueError(f"arm {self.name!r}: policy is {self.policy}, but only FP16 losses are scaled and compute is {self.compute}")
        try:
            self._policy()
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None

    @classmethod
    def parse(cls, text, device="cpu"):
        """An Arm from `@policy.json` (of `halfstep tune`), `fp32`, `mixed:master=fp32,states=bf16`, `autocast:policy=static(scale=1024),keep_fp32=head|fc*,name=mine`."""
        if text.startswith("@"):
            return cls(device=device, name=text, **_decisions.read_policy(text[1:], {f.name for f in fields(cls) if f.init and f.name not in ("name", "device")}))
        preset, _, rest = text.partition(":")
        if preset not in PRESETS:
            raise ValueError(f"arm {text!r}: {preset!r} is no preset; expected one of {', '.join(PRESETS)}, with `:key=value,…` for more")
        options, known = {"name": text, **PRESETS[preset]}, {f.name.removesuffix("_from"): f.name for f in fields(cls) if f.init and f.name != "device"}
        for pair in _split(rest):
            key, equals, value = pair.partition("=")
            if not equals or key.strip() not in known:
                raise ValueError(f"arm {text!r}: {pair!r} is no option; expected key=value with one of {', '.join(known)}")
            options[known[key.strip()]] = value.strip()
        return cls(device=device, **options)

    def options(self):
        """{option: value}, all of it text, without name and device."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("name", "device")}

    @property
    def dtype(self):
        """torch.float16, torch.bfloat16, or torch.float32."""
        return _DTYPE.get(self.compute, torch.float32)

    @property
    def scales(self):
        """Whether the loss is scaled."""
        return self.compute == "fp16"

    # -- what make() calls -------------------------------------------------------------------------
    def apply(self, model):
        """Puts `model` into this arm's precision, in place, and returns it. Before the optimizer is made."""
        self.fingerprint = fingerprint(model.state_dict())
        if self.compute != "fp32" and self.weights == "cast":
            cast_model(model, self.dtype, keep_fp32=None if self.keep_fp32 is None else self.keep_fp32.split("|"))
        elif self.keep_fp32 is not None and self.compute != "fp32":
            raise ValueError(f"arm {self.name!r}: keep_fp32 keeps weights of a cast model; with weights=autocast it would do nothing; islands compute in FP32 there")
        if self.qat is not None:
            quantize_(model, self.qat)
        if self.islands is not None:
            islands_(model, self.islands.split("|"))
        return model

    def optimizer(self, cls, params, **kw):
        """The optimizer of this arm. cls: a class of torch.optim or hs.optim, or its name; params: parameters or named_parameters().

        16-bit arms: hs.optim's class of that name with the arm's master and states, or hs.optim.Masters around a class that hs.optim
        lacks. fp32: torch's class; hs.optim's where it lacks the class or one of the arguments (max_grad_norm, ema_decay, …), or
        where the arm asks for a master, states or grad_dtype.
        """
        name = cls if isinstance(cls, str) else cls.__name__
        ours, stock = getattr(optim, name, None), getattr(torch.optim, name, None) if isinstance(cls, str) or cls.__module__.startswith("halfstep") else cls
        if ours is None and stock is None:
            raise ValueError(f"arm.optimizer: {name!r} is neither in torch.optim nor in halfstep.optim")
        asked = {key: value for key, value in (("master", self.master), ("states", self.states), ("grad_dtype", self.grad_dtype)) if value != Arm.__dataclass_fields__[key].default}
        if ours is None:
            lost = sorted(set(asked) - ({"master"} if self.compute != "fp32" else set()))
            if lost:
                raise ValueError(f"arm {self.name!r}: {lost[0]}={asked[lost[0]]} is for classes of hs.optim, and {name} is none of them")
            return stock(params, **kw) if self.compute == "fp32" else optim.Masters(stock, params, **asked, **kw)
        takes = stock is not None and not set(kw) - set(inspect.signature(stock).parameters)
        wide = self.compute == "fp32" or self.weights == "autocast"
        if self.optimizer_from == "torch" and asked:
            raise ValueError(f"arm {self.name!r}: optimizer=torch, but torch's {name} knows no {', '.join(sorted(asked))}")
        if self.optimizer_from == "torch" and not (takes and wide):
            raise ValueError(f"arm {self.name!r}: optimizer=torch, but torch's {name} cannot step " + ("16-bit weights" if not wide else f"with {', '.join(sorted(kw))}"))
        if self.optimizer_from == "torch" or self.optimizer_from == "auto" and self.compute == "fp32" and takes and not asked:
            return stock(params, **kw)
        return ours(params, **{"states": self.states, "master": self.master, "grad_dtype": self.grad_dtype, **kw})

    def autocast(self):
        """The context for forwards: hs.autocast in 16-bit arms, nothing in fp32. compare() enters it around loss() and evaluate()."""
        return autocast(self.device, self.dtype if self.compute != "fp32" else torch.float16, enabled=self.compute != "fp32" and not self._wide)

    def scaler(self):
        """hs.GradScaler of this arm; disabled where no scale is needed."""
        return GradScaler(policy=self._policy(), enabled=self.scales)

    # -- inside ------------------------------------------------------------------------------------
    def _policy(self):
        if self.policy is None:
            return None
        found = re.fullmatch(r"\s*([\w]+)\s*(?:\((.*)\))?\s*", self.policy)
        if not found:
            raise ValueError(f"policy is {self.policy!r}; expected a name, or name(key=value,…)")
        policy = policy_of(found[1] + (f":{found[2]}" if found[2] else ""))
        if policy is None:
            raise ValueError(f"policy is {self.policy!r}, which is for replays only")
        return policy

    @contextlib.contextmanager
    def _widely(self):
        """Inside, autocast() does nothing: an FP32 or FP64 look at the same code."""
        before, self._wide = self._wide, True
        try:
            yield
        finally:
            self._wide = before


def _split(text, at=","):
    """The parts of `text` between commas that stand in no parentheses."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == at and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [p for p in [*parts, part] if p.strip()]


def parse_arms(texts, device="cpu"):
    """[Arm] from texts such as "fp32,mixed:master=fp32,states=bf16": a part with `=` and no `:` before it goes on with the arm before it."""
    names = []
    for part in [p for text in ([texts] if isinstance(texts, str) else texts) for p in ([text] if isinstance(text, Arm) else _split(text))]:
        goes_on = isinstance(part, str) and "=" in part and ":" not in part.partition("=")[0]
        if goes_on and (not names or isinstance(names[-1], Arm)):
            raise ValueError(f"arms: {part!r} belongs to no arm; expected `name:key=value`")
        if goes_on:
            names[-1] += ("," if ":" in names[-1] else ":") + part
        else:
            names.append(part if isinstance(part, Arm) else part.strip())
    arms = [_on(part, device) if isinstance(part, Arm) else Arm.parse(part, device) for part in names]
    twice = sorted({a.name for a in arms if [b.name for b in arms].count(a.name) > 1})
    if twice:
        raise ValueError(f"arms: {twice[0]!r} is there twice; give one of them another name with name=…")
    return arms


def _on(arm, device):
    arm = copy.copy(arm)
    arm.device = device
    return arm


@dataclass
class Job:
    """One training run, as make(arm, seed) returns it. compare() seeds torch, numpy and random before make() is called."""

    model: torch.nn.Module
    optimizer: Any                                          #: from arm.optimizer(); a list for several
    batches: "Iterable | Callable[[int], Iterable]"         #: gone through once an epoch; a function gets the number of the epoch, from 0
    loss: "Callable[[torch.nn.Module, Any], torch.Tensor]"  #: (model, batch) -> scalar
    evaluate: "Callable[[torch.nn.Module], dict]"           #: {metric: number}, the first is compared; "correct": 0 or 1 an item, "labels": its class
    scheduler: Any = None                                   #: its step() is called after each step
    epochs: int = 1
    predict: "Callable[[torch.nn.Module], torch.Tensor] | None" = None  #: logits of the test set, for the errors against FP64
    metric: "str | None" = None                             #: which one of evaluate()'s, if not the first
    better: str = "higher"                                  #: or lower

    def __post_init__(self):
        if not isinstance(self.model, torch.nn.Module):
            raise TypeError(f"Job: model is {type(self.model).__name__}; expected a torch.nn.Module")
        for name in ("loss", "evaluate"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Job: {name} is {type(getattr(self, name)).__name__}; expected a function")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"Job: epochs is {self.epochs!r}; expected a whole number from 1")
        if self.better not in ("higher", "lower"):
            raise ValueError(f"Job: better is {self.better!r}; expected 'higher' or 'lower'")
        if not callable(self.batches) and self.epochs > 1 and iter(self.batches) is self.batches:
            raise ValueError(f"Job: batches is an iterator, which is empty after the first of {self.epochs} epochs; pass a list, a DataLoader, or a function of the epoch")

    @property
    def optimizers(self):
        return list(self.optimizer) if isinstance(self.optimizer, (list, tuple)) else [self.optimizer]

    def epoch(self, number):
        return iter(self.batches(number) if callable(self.batches) else self.batches)


def tensors(value):
    """The tensors in lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def fingerprint(value):
    """Of the tensors in `value`, in order: dtype, shape and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors(value):
        tensor = (tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()).cpu().contiguous()
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
