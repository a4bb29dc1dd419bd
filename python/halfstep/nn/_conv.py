"""Convolution layers."""

import torch
from torch import nn

from .. import functional as hf


class _Conv:
    """What Conv1d to Conv3d put in place of torch's: torch's forward pads where padding_mode asks for it and ends here."""

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _ConvTranspose:
    def forward(self, input, output_size=None):
        if self.padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode is {self.padding_mode!r}; expected 'zeros'")
        output_padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        return self._function(input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


class Conv1d(_Conv, nn.Conv1d):
    """torch.nn.Conv1d, computed by halfstep.functional.conv1d; a bias may stay FP32 beside 16-bit weights."""

    _function = staticmethod(hf.conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """torch.nn.Conv2d, computed by halfstep.functional.conv2d."""

    _function = staticmethod(hf.conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """torch.nn.Conv3d, computed by halfstep.functional.conv3d."""

    _function = staticmethod(hf.conv3d)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d, computed by halfstep.functional.conv_transpose1d."""

    _function = staticmethod(hf.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, computed by halfstep.functional.conv_transpose2d."""

    _function = staticmethod(hf.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d, computed by halfstep.functional.conv_transpose3d."""

    _function = staticmethod(hf.conv_transpose3d)
