"""Where the first inf or NaN of an iteration comes from: every op is looked at, forward, backward and in the optimizer."""

import contextlib
from dataclasses import dataclass

import torch

from ._library import _C


@dataclass(frozen=True)
class NonFinite:
    """The first op whose result is not finite. As text: one sentence."""

    producer: bool          #: the op's inputs were finite; else it passed on what came from outside
    phase: str              #: "forward", "backward", "optimizer"
    module: str             #: path of the module, "layers.3.fc"; "" where it is not known
    call: int               #: which call of that module in the run, from 0
    op: str                 #: "aten::addmm"
    node: str               #: backward only: the autograd node, "AddmmBackward0"
    role: str               #: "activation", "activation gradient", "weight gradient", "weight", "optimizer state"; of what came from outside "input", "weight"
    tensor: str             #: parameter, or argument of the op such as "states[1]"; may be ""
    index: tuple            #: of the first bad element
    value: str              #: "inf", "-inf", "nan"
    dtype: str              #: of the tensor, "float16"
    largest_input: float    #: largest finite magnitude among the op's inputs
    swallowed_by: str       #: a later op that made it finite again; "" where none did
    rank: "int | None"      #: of this process, where torch.distributed is in use
    message: str            #: all of it in one sentence

    def __str__(self):
        return self.message


def _optimizers(given):
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


@contextlib.contextmanager
def _named(finder, model, optimizers):
    """Tells the finder which module's forward runs, and when an optimizer steps."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: finder.enter(name), prepend=True))
        handles.append(module.register_forward_hook(lambda m, args, out: finder.leave(), always_call=True))
    for optimizer in optimizers:
        if hasattr(optimizer, "register_step_pre_hook"):
            handles.append(optimizer.register_step_pre_hook(lambda *_: finder.set_phase("optimizer")))
            handles.append(optimizer.register_step_post_hook(lambda *_: finder.set_phase("")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_nonfinite(model, run, optimizers=None):
    """Runs `run()` once, with forward, backward and, where it is in doubt, the step, and returns the NonFinite that came first, or None.

    Slow, since every tensor of every op is read: for one iteration run again, with the same batch and the same random state. An op of which
    all inputs were finite goes before one that passed on what it was given. -inf made by fills and masks is taken as meant. Functions made by
    torch.compile run without it here. `optimizers`: one or several, for the phase. One search at a time in a process.
    """
    finder = _C.NonFiniteFinder([(name, p) for name, p in model.named_parameters()])
    try:
        with _named(finder, model, _optimizers(optimizers)), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        found = finder.finish()
    if found is None:
        return None
    rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else None
    fields = {name: getattr(found, name) for name in NonFinite.__dataclass_fields__ if name not in ("rank", "message", "index")}
    return NonFinite(**fields, index=tuple(found.index), rank=rank, message=(f"rank {rank}: " if rank is not None else "") + str(found))

