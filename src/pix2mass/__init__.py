"""pix2mass: weigh galaxy clusters from their pictures.

The public names below are loaded on first use, so that ``import pix2mass`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pix2mass.catalog import read_catalog as read_catalog
    from pix2mass.explain import explain as explain
    from pix2mass.predict import Predictor as Predictor
    from pix2mass.predict import predict as predict
    from pix2mass.report import write_report as write_report
    from pix2mass.run import RunFolder as RunFolder
    from pix2mass.store import ImageStore as ImageStore
    from pix2mass.store import build as build
    from pix2mass.types import Cutout as Cutout
    from pix2mass.types import Flag as Flag
    from pix2mass.types import MassEstimate as MassEstimate
    from pix2mass.types import Pix2massError as Pix2massError

_HOME = {
    "Cutout": "types",
    "Flag": "types",
    "ImageStore": "store",
    "MassEstimate": "types",
    "Pix2massError": "types",
    "Predictor": "predict",
    "RunFolder": "run",
    "build": "store",
    "explain": "explain",
    "predict": "predict",
    "read_catalog": "catalog",
    "write_report": "report",
}
__all__ = [  # noqa: F822  given on first use
    "Cutout",
    "Flag",
    "ImageStore",
    "MassEstimate",
    "Pix2massError",
    "Predictor",
    "RunFolder",
    "build",
    "explain",
    "predict",
    "read_catalog",
    "write_report",
]


class _FrontDoor(ModuleType):
    """The package. Importing a submodule puts it here under its name; where a public function has that name
    (``predict``, ``explain``, ...) the function is put instead, so that ``pix2mass.predict(...)`` always works."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pix2mass' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"pix2mass.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
