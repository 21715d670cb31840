"""Who may import whom, as tables; docs/data_flow.md shows the same in words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "pix2mass"

_GROUND = {"types", "config", "cosmology"}
_NETWORKS = _GROUND | {
    "run",
    "store",
    "distribute",
    "stretch",
    "memory",
    "scale",
    "galaxies",
    "gaussian_process",
    "model",
    "calibrate",
    "trust",
}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "cosmology": set(),
    "config": {"types", "cosmology"},
    "run": {"types", "config", "cosmology"},
    "catalog": _GROUND,
    "images": _GROUND | {"distribute"},
    "stretch": set(),
    "memory": set(),
    "scale": _GROUND | {"stretch"},
    "galaxies": _GROUND | {"stretch", "scale"},
    "gaussian_process": set(),
    "model": _GROUND | {"stretch", "scale", "galaxies", "gaussian_process"},
    "richness": _GROUND,
    "calibrate": {"types"},
    "trust": set(),
    "weights": {"types", "run"},
    "distribute": {"types"},
    "store": _GROUND | {"catalog", "distribute"},
    "train": _NETWORKS | {"weights"},
    "predict": _NETWORKS | {"catalog", "weights"},
    "evaluate": _NETWORKS | {"catalog", "richness", "train", "predict"},
    "explain": {"types", "config", "cosmology", "run", "store", "predict", "model", "stretch", "weights"},
    "report": {"types", "run", "cosmology"},
}
"""Module or folder of the package -> those it may import. A folder's own modules may import each other."""
_ALL = set(MAY_IMPORT)
MAY_IMPORT |= {"pipeline": _ALL, "cli": _ALL | {"pipeline"}, "__main__": {"cli"}, "__init__": _ALL}

MAY_BE_IMPORTED_BY: dict[str, set[str]] = {
    "torch": {
        "stretch",
        "scale",
        "galaxies",
        "gaussian_process",
        "model",
        "trust",
        "train",
        "predict",
        "explain",
        "images/mock/render",
    },
    "lightning": {"train"},
    "timm": {"model"},
    "captum": {"explain"},
    "zarr": {"store"},
    "zarrs": {"store"},
    "dask": {"distribute"},
    "distributed": {"distribute"},
    "httpx": {"images", "catalog"},
    "numba": {"images"},
    "astroquery": {"catalog", "images/hips", "images/window"},
    "colossus": {"catalog"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "kcorrect": {"images/mock"},
    "cyclopts": {"cli"},
    "rich": {"cli"},
}
"""Library -> the modules or folders that may import it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path: Path) -> str:
    """Path inside the package without its ending, e.g. "images/mock/render"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def _imports(path: Path, type_checking: bool = True) -> set[str]:
    """Dotted names of all modules that a file imports, at the top or inside functions."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not type_checking and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            # "from pix2mass import store" imports a module too.
            names = [f"pix2mass.{a.name}" for a in node.names] if node.module == "pix2mass" else [str(node.module)]
            found |= set(names)
    return found


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_modules_import_only_what_they_may(path):
    own = _module(path).split("/")[0]
    assert own in MAY_IMPORT, f"{own} is new: give it a row in the table here and in docs/data_flow.md"
    used = {name.split(".")[1] for name in _imports(path) if name.startswith("pix2mass.")}
    assert used - MAY_IMPORT[own] - {own} == set()


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_heavy_libraries_stay_where_they_belong(path):
    module = _module(path)
    for library in {name.split(".")[0] for name in _imports(path)} & set(MAY_BE_IMPORTED_BY):
        homes = MAY_BE_IMPORTED_BY[library]
        assert any(module == home or module.startswith(home + "/") for home in homes), (
            f"{module} imports {library}, which belongs in {', '.join(sorted(homes))}"
        )


def test_nothing_imports_the_command_line():
    users = {_module(path) for path in FILES if "pix2mass.cli" in _imports(path)}
    assert users <= {"__main__"}


def test_the_front_door_loads_nothing_heavy():
    used = {name.split(".")[0] for name in _imports(PACKAGE / "__init__.py", type_checking=False)}
    assert used <= {"__future__", "importlib", "sys", "types", "typing"}


def test_no_module_is_a_drawer_for_everything():
    assert {path.stem for path in FILES} & {"utils", "helpers", "common", "misc"} == set()


def test_nothing_reads_or_writes_pickles():
    for path in FILES:
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in _imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                safe = {"allow_pickle": False, "weights_only": True}[node.arg]
                assert isinstance(node.value, ast.Constant) and node.value.value is safe, path


def test_importing_the_package_is_cheap_and_its_names_are_few():
    code = (
        "import sys, pix2mass; "
        "heavy = {'torch', 'astropy', 'matplotlib', 'zarr', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy; assert 0 < len(dir(pix2mass)) <= 12, dir(pix2mass)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_every_public_name_can_be_had():
    code = (
        "import pix2mass\n"
        "for name in dir(pix2mass): assert not isinstance(getattr(pix2mass, name), type(pix2mass)), name\n"
        "import pix2mass.explain, pix2mass.predict\n"
        "assert callable(pix2mass.explain) and callable(pix2mass.predict)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
