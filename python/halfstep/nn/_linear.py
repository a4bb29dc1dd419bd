"""Linear with an activation, and two of them."""

import torch

from .._library import H

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")


def check_activation(who, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: activation is {activation!r}; expected one of {ACTIVATIONS}")
    return activation


class Linear(torch.nn.Linear):
    """torch.nn.Linear, followed by an activation in the same op: hs.functional.linear. Parameters and state dict are torch's.

    A stock torch.nn.Linear becomes one by `module.__class__ = hs.nn.Linear`, without an activation until `module.activation` is set.
    """

    activation = None

    def __init__(self, in_features, out_features, bias=True, activation=None, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        if check_activation("Linear", activation) is not None:
            self.activation = activation

    def forward(self, input):
        return H.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self):
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class MLP(torch.nn.Module):
    """fc2(act(fc1(x))): two Linear, [..., in_features] to [..., out_features or in_features] through [..., hidden_features]."""

    def __init__(self, in_features, hidden_features, out_features=None, activation="gelu", bias=True, device=None, dtype=None):
        super().__init__()
        check_activation("MLP", activation)
        self.fc1 = Linear(in_features, hidden_features, bias, activation, device, dtype)
        self.fc2 = Linear(hidden_features, out_features or in_features, bias, None, device, dtype)

    def forward(self, x):
        return self.fc2(self.fc1(x))
