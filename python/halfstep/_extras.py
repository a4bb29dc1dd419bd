"""Packages that only some commands need: one clear line where one is missing."""

import importlib

PACKAGE = {"scipy.stats": "scipy", "matplotlib.pyplot": "matplotlib", "pynvml": "nvidia-ml-py", "sklearn.datasets": "scikit-learn",
           "safetensors.torch": "safetensors"}
EXTRA = {"scipy": "report", "matplotlib": "report", "numpy": "report", "nvidia-ml-py": "energy",
         "safetensors": "export", "onnx": "export", "onnxscript": "export"}


class MissingPackage(ImportError):
    """An optional package is not installed; the text names the pip command."""


def need(module):
    """The imported module."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGE.get(module, module.partition(".")[0])
        extra = f"'halfstep[{EXTRA[package]}]' or " if package in EXTRA else ""
        raise MissingPackage(f"{package} is needed and cannot be imported ({error}); pip install {extra}{package}") from None
