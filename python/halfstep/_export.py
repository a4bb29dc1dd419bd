"""A trained model as a file for other programs: safetensors, torch, ONNX, torch.export (docs/export.md)."""

import contextlib
import importlib
import io
import logging
import os
import warnings
from dataclasses import dataclass, field

import torch

from . import _extras
from ._decompose import table
from ._deploy import DTYPES, deployable, islands_of
from ._file import replacing, staged
from ._library import _C
from ._room import SIXTEEN, dtype_name

FORMATS = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".onnx": "onnx", ".pt2": "torch.export"}
GRAPHS = ("onnx", "torch.export")
ONE_FILE = 1 << 30  # weights of more bytes stand beside an ONNX file: protobuf ends at 2 GiB


@dataclass
class ExportReport:
    """What hs.export wrote."""

    path: str
    format: str
    dtype: torch.dtype
    bytes: int                                   #: of the file, and of the one beside it where ONNX has two
    tensors: dict                                #: {name: (dtype, shape)} of what is in the file
    islands: dict = field(default_factory=dict)  #: {module that computes in FP32: its parameters; of a graph: its ops}
    max_error: "float | None" = None             #: of a graph: the largest |result - FP64's| on `example`, by the program that was written; None where nothing here runs it
    note: "str | None" = None                    #: why it was not run

    def __str__(self):
        error = f", not run here: {self.note}" if self.note else "" if self.max_error is None else f", largest error against FP64 {self.max_error:.2g}"
        lines = [f"{self.path}: {self.format}, {dtype_name(self.dtype)}, {len(self.tensors)} tensors, {self.bytes:,} bytes{error}"]
        return "\n".join(lines + [f"  float32: {name or 'the model itself'} ({', '.join(parts) or 'no parameters'})" for name, parts in self.islands.items()])

    __repr__ = __str__


def _format(path, format):
    if format is None:
        format = FORMATS.get(os.path.splitext(path)[1])
        if format is None:
            raise ValueError(f"export: path is {path!r}, whose ending names no format; expected one of {', '.join(FORMATS)}, or format=…")
    if format not in FORMATS.values():
        raise ValueError(f"export: format is {format!r}; expected one of {', '.join(dict.fromkeys(FORMATS.values()))}")
    return format


@torch.no_grad()
def export(model, optimizers, path, dtype=torch.float32, *, format=None, example=None, dynamic_shapes=None, keep_fp32=None, weights="master"):
    """Writes `model` with its exact weights in `dtype` to `path`, whole or not at all, and returns an ExportReport. The model is left as it is.

    format: "safetensors" or "torch" (a state dict with the model's names and shapes), "onnx" or "torch.export" (a program with its weights);
    None: by the ending .safetensors, .pt, .onnx, .pt2. dtype: FP32, FP64, FP16 or BF16; in 16 bits the modules of `keep_fp32` stay FP32, as in
    hs.evaluate (None: those that cast_model kept; all norms if it was never cast). weights="ema": the optimizers' running means.

    Programs are traced in evaluation mode with `example`, a tuple of inputs, or a tuple of such a tuple and a dict of keyword arguments, and cast floating
    inputs themselves; layers of hs.nn are there as torch's own ops, so that nothing but torch or an ONNX runtime is needed to run them.
    dynamic_shapes: as in torch.export.export. A model of more than 1 GB has a second ONNX file, `path`.data.

    ValueError for a dtype, format or ending that is not known, a program without example, a value that 16 bits cannot hold, by name. Packages:
    safetensors, onnx and onnxscript, where their format is asked for.
    """
    path, format = _checked(path, dtype, format, example, dynamic_shapes, keep_fp32)
    twin = deployable("export", model, optimizers, dtype, keep_fp32, weights)
    state = {key: value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value for key, value in twin.state_dict().items()}
    report = ExportReport(path, format, dtype, 0, {key: (value.dtype, tuple(value.shape)) for key, value in state.items() if isinstance(value, torch.Tensor)})
    if dtype in SIXTEEN:
        report.islands = {name: [n for n, _ in twin.get_submodule(name).named_parameters()] for name in islands_of(twin)}
    if format not in GRAPHS:
        files = (_write_safetensors if format == "safetensors" else _write_torch)(state, report)
    else:
        both = isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict)
        args, kwargs = example if both else ((example,) if isinstance(example, torch.Tensor) else tuple(example), {})
        program = _program(twin, args, kwargs, dynamic_shapes)
        report.tensors = {key: (value.dtype, tuple(value.shape)) for key, value in program.state_dict.items()}
        if dtype in SIXTEEN:
            report.islands = _wide_ops(program, report.islands)
        try:
            exact = deployable("export", model, optimizers, torch.float64, None, weights)(*args, **kwargs)
        except RuntimeError as error:  # an op that lacks FP64
            exact, report.note = None, f"nothing to compare with, since the model does not run in float64: {str(error).strip().splitlines()[0]}"
        files = (_write_onnx if format == "onnx" else _write_program)(program, report, args, kwargs, exact)
    report.bytes = sum(map(os.path.getsize, files))
    return report


def _checked(path, dtype, format, example, dynamic_shapes, keep_fp32):
    """(path, format), or an error before anything is done."""
    path = os.fspath(path)
    format = _format(path, format)
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype is {dtype}; expected {', '.join(map(str, DTYPES))}")
    if keep_fp32 is not None and dtype not in SIXTEEN:
        raise ValueError(f"export: keep_fp32 is {keep_fp32!r}, but dtype is {dtype}: it keeps modules of a 16-bit file in FP32")
    if format in GRAPHS and example is None:
        raise ValueError(f"export: example is None; {format} traces the model with a tuple of inputs: example=(x,)")
    if format not in GRAPHS and (example is not None or dynamic_shapes is not None):
        raise ValueError(f"export: {'example' if example is not None else 'dynamic_shapes'} is given, but a file of {format} holds weights only; expected format 'onnx' or 'torch.export'")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"export: path is {path!r}, but there is no folder {folder!r}")
    for package in {"safetensors": ["safetensors.torch"], "onnx": ["onnx", "onnxscript"]}.get(format, []):
        _extras.need(package)
    return path, format


# -- weights ---------------------------------------------------------------------------------------
def _write_torch(state, report):
    with replacing(report.path) as file:
        torch.save(state, file)
    return [report.path]


def _write_safetensors(state, report):
    others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"export: '{others[0]}' is {type(state[others[0]]).__name__}, and safetensors holds tensors only; format='torch' holds it")
    apart, seen = {}, set()
    for key, value in state.items():  # tied weights: each name has its own copy, so that the file loads with strict=True
        place = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if place in seen else value
        seen.add(place)
    note = {"format": "pt", "halfstep": _C.build_info()["version"], "dtype": dtype_name(report.dtype), "fp32": ",".join(report.islands)}
    with staged(report.path) as name:
        _extras.need("safetensors.torch").save_file(apart, name, metadata=note)
    return [report.path]


# -- programs --------------------------------------------------------------------------------------
def _program(twin, args, kwargs, dynamic_shapes):
    """The ExportedProgram of a model for inference, without ops of halfstep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(twin, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False).run_decompositions(table())
    called = (op for node in program.graph.nodes if node.op == "call_function" for op in (node.target, *node.args[:1]))  # an op that writes into its arguments is an argument itself
    left = sorted({str(op) for op in called if isinstance(op, torch._ops.OpOverload) and op.namespace == "halfstep"})
    if left:
        raise ValueError(f"export: the model calls {', '.join(left)}, which other programs do not have; call the functions of hs.functional")
    return program


def _module_of(node):
    """The path of the module that a node of an ExportedProgram came from."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else ""


def _wide_ops(program, islands):
    """{island: its ops that give FP32}, and of modules that are none, what computes in FP32 all the same (norms and activations inside the layers of hs.nn)."""
    found = {name: [] for name in islands}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            path = _module_of(node)
            inside = next((name for name in islands if path == name or path.startswith(name + ".")), path)
            found.setdefault(inside, []).append(str(node.target).removesuffix(".default").removeprefix("aten."))
    return {name: list(dict.fromkeys(ops)) for name, ops in found.items()}


def _error(found, exact):
    """The largest difference of the results, or None where they are no tensors."""
    flat = lambda value: [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    pairs = list(zip(flat(found), flat(exact)))
    return max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in pairs) if pairs else None


def _write_program(program, report, args, kwargs, exact):
    if exact is not None:
        report.max_error = _error(program.module()(*args, **kwargs), exact)
    with staged(report.path) as name:
        torch.export.save(program, name)
    return [report.path]


def _write_onnx(program, report, args, kwargs, exact):
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with _quiet():
        made = torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False)
    for node in made.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exported
    beside = size > ONE_FILE
    with staged(report.path) as name:
        with _quiet():
            made.save(name, external_data=beside)
        if exact is not None:
            _run_onnx(name, report, args, kwargs, exact)
    return [report.path, report.path + ".data"][: 1 + beside]


@contextlib.contextmanager
def _quiet():
    """torch's exporter prints its progress and warns of packages that nothing here needs."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _run_onnx(path, report, args, kwargs, exact):
    """The error of the very file that is written, where onnxruntime is there and can run it."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        report.note = str(error)
        return
    values = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {node.name: value.cpu().numpy() for node, value in zip(session.get_inputs(), values)})
    except Exception as error:  # the runtime's own kinds: operators that it lacks in this dtype
        report.note = str(error).splitlines()[0].replace(path, report.path)
        return
    report.max_error = _error([torch.from_numpy(value) for value in found], torch.utils._pytree.tree_map(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t, exact))
