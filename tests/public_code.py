"""What tests against code that nobody here wrote have in common: how it is loaded and compared."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(name="torch")
def torch_in_float64():
    """Torch, whose modules make float64 arrays for the time of a test."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield torch
    torch.set_default_dtype(before)


def leaves(torch, *arrays):
    """Tensors that gradients are asked of."""
    return [torch.tensor(x, requires_grad=True) for x in arrays]


def close(got, wanted, name="", atol=1e-12):
    """Compare with a tensor, by its largest number."""
    wanted = wanted.detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol * max(1, abs(wanted).max()),
                               err_msg=name)


def module(name):
    """A package's module; one that is there and cannot be imported is a failure."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # what its import warns of is its own affair
        return importlib.import_module(name)


def file_of(package, path):
    """A file of a package that is not imported: some need a GPU for that, or much else.

    Without the package there is no judge; a package without the file has lost one, and fails.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(next(iter(found.submodule_search_locations)), path)


def module_of_file(package, path):
    """The module in a file of a package."""
    file = file_of(package, path)
    found = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


def definition(package, path, name, **names):
    """A class or function in a file of a package, which finds `names` and nothing else."""
    file = file_of(package, path)
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == name]
    exec(compile(tree, str(file), "exec"), names)
    return names[name]
