"""Gradient statistics made while the gradients appear, in the backward, so that the step need not read them again."""

import weakref

import torch
from torch.utils.weak import TensorWeakRef

from ._library import H, grad_stats

ROW = 8  # columns of grad_stats


def _reduced_later():
    """Whether other processes may change the gradients after the hooks: a collective writes without counting a version."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class BackwardStats:
    """The rows of grad_stats of one room's parameters, each with the gradient that it describes."""

    def __init__(self, room):
        self.rows = torch.zeros(len(room.params), ROW, dtype=torch.float64, device=room.steps.device)
        self.known, self.handles = {}, {}
        self.readers, self.newest = {}, {}  # backward passes in several threads call the hooks of a parameter at the same time
        self.follow(room.params)

    def follow(self, params):
        """A hook on every parameter that can have a gradient and has none of ours yet."""
        me = weakref.ref(self)
        for i, param in enumerate(params):
            if i in self.handles or not param.requires_grad:
                continue

            def hook(param, i=i):
                there = me()
                if there is not None:
                    there.see(i, param.grad)

            self.handles[i] = param.register_post_accumulate_grad_hook(hook)

    def remove(self):
        for handle in self.handles.values():
            handle.remove()
        self.handles, self.known = {}, {}

    @torch.no_grad()
    def see(self, i, grad):
        """Reads the gradient that was just written, while it is in the cache."""
        self.known.pop(i, None)
        if grad is None or grad.layout != torch.strided or _reduced_later():
            return
        if grad.device != self.rows.device:
            self.rows, self.known = self.rows.to(grad.device), {}
        # A row that two wrote at a time, or whose gradient was added to meanwhile, is not known.
        readers, me = self.readers.setdefault(i, set()), [i]
        readers.add(id(me))
        self.newest[i] = me
        alone, version = len(readers) == 1, grad._version
        try:
            H.grad_stats_row_(grad, self.rows, i)
        finally:
            readers.discard(id(me))
        if alone and self.newest[i] is me and version == grad._version:
            self.known[i] = (TensorWeakRef(grad), version, grad.data_ptr())

    def _fresh(self, i, grad):
        """Whether row i still describes `grad`: the same tensor, in the same memory, not written since."""
        known = self.known.get(i)
        return known is not None and known[1] == grad._version and known[2] == grad.data_ptr() and known[0]() is grad

    def join(self, grads, table):
        """grad_stats(grads), bit for bit; only gradients without a valid row are read. A row is used once: a step may write its gradient."""
        there = [i for i, grad in enumerate(grads) if grad is not None]
        stale = [i for i in there if not self._fresh(i, grads[i])]
        self.reread = len(stale)
        if len(stale) == len(there) or grads[there[0]].device != self.rows.device:
            return grad_stats(grads, table)
        return H.grad_stats_rest(grads, self.rows, stale, table)

    def forget(self):
        """The step is over: it may have written the gradients (zeroed them), which counts no version."""
        self.known = {}
