"""Bytes of a training state by role, each storage counted once."""

import torch

ROLES = ("weights", "gradients", "masters", "states", "buffers")


def ledger(model, optimizers):
    """{role: bytes of distinct storages}: a storage that two roles share (a tied weight, an optimizer's view of it) counts for the first.

    Roles: the model's parameters, their gradients, the optimizers' masters (remainders too), their other states with the running
    means, the model's buffers.
    """
    tensors = [("weights", p) for p in model.parameters()] + [("gradients", p.grad) for p in model.parameters() if p.grad is not None]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [("masters" if key == "master" else "states", t) for key, t in state.items() if isinstance(t, torch.Tensor)]
        inner = getattr(optimizer, "inner", None)  # hs.optim.Masters: what it wraps
        tensors += [("states", t) for state in (inner.state.values() if inner is not None else ()) for t in state.values() if isinstance(t, torch.Tensor)]
        pairs = getattr(optimizer, "_pairs", ())
        tensors += [("masters", master) for _, master in pairs] + [("gradients", master.grad) for _, master in pairs if master.grad is not None]
    tensors += [("buffers", b) for b in model.buffers()]
    found, seen = dict.fromkeys(ROLES, 0), set()
    for role, tensor in tensors:
        parts = [tensor._values(), tensor._indices()] if tensor.is_sparse else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[role] += storage.nbytes()
    return found
