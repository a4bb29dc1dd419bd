"""LayerNorm and RMSNorm, alone and with the residual stream of a transformer, at a small transformer's sizes."""

import torch
import torch.nn.functional as F

import halfstep as hs
from layers import Case

SIZES = [(2048, 256), (2048, 1024), (4096, 768)]


def inputs(rows, width, tensors, bias):
    """`tensors` of [rows, width], then the weight and, for LayerNorm, the bias; all require grad."""
    shapes = [(rows, width)] * tensors + [(width,)] * (1 + bias)
    return lambda dtype: [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def add_layer_norm(x, residual, weight, bias):
    residual = residual + x
    return F.layer_norm(residual, weight.shape, weight, bias), residual


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def add_rms_norm(x, residual, weight):
    residual = residual + x
    return F.rms_norm(residual, weight.shape, weight, 1e-5), residual


def our_layer_norm(x, weight, bias):
    return hs.functional.layer_norm(x, weight.shape, weight, bias)


def our_add_layer_norm(x, residual, weight, bias):
    return hs.functional.layer_norm(x, weight.shape, weight, bias, residual=residual)


def our_rms_norm(x, weight):
    return hs.functional.rms_norm(x, weight.shape, weight, 1e-5)


def our_add_rms_norm(x, residual, weight):
    return hs.functional.rms_norm(x, weight.shape, weight, 1e-5, residual)


CASES = [Case(f"{name} {rows:,} x {width}", inputs(rows, width, tensors, bias), ours, stock)
         for rows, width in SIZES
         for name, tensors, bias, ours, stock in (("layer_norm", 1, True, our_layer_norm, layer_norm), ("layer_norm + residual", 2, True, our_add_layer_norm, add_layer_norm),
                                                  ("rms_norm", 1, False, our_rms_norm, rms_norm), ("rms_norm + residual", 2, False, our_add_rms_norm, add_rms_norm))]
