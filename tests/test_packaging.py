"""What is built and installed is the whole package, and importing it costs next to nothing."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW_IMPORTS = {"numba", "llvmlite", "scipy", "cupy", "matplotlib", "rich", "torch", "jax"}


def configuration():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def python(code, *, cwd, path=None, environment=None):
    """What `code` prints in a new interpreter; `path` goes to the front of sys.path."""
    env = {**os.environ, **(environment or {})}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def folders_with_code(top):
    return {folder for folder in [ROOT / top, *(ROOT / top).rglob("*")]
            if folder.is_dir() and any(folder.glob("*.py"))}


def test_packages_are_the_tree():
    listed = configuration()["options"]["packages"].split()
    found = {"pyattn." * (top == "kernels") + ".".join(folder.relative_to(ROOT).parts)
             for top in ("pyattn", "kernels") for folder in folders_with_code(top)}
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("top", ["pyattn", "kernels"])
def test_every_folder_with_code_is_a_package(top):
    assert [f for f in folders_with_code(top) if not (f / "__init__.py").is_file()] == []


def test_version_is_static_and_the_installed_one():
    assert configuration()["metadata"]["version"] == "attr: pyattn._version.__version__"
    text = (ROOT / "pyattn" / "_version.py").read_text()
    version = re.fullmatch(r'__version__ = "(\d+\.\d+\.\d+)"\n', text)
    assert version, "setuptools reads a literal without importing the package"
    try:
        assert importlib.metadata.version("pyattn") == version[1]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pyattn is not installed: an uninstalled checkout has no version to compare")


def test_extras_hold_what_needs_them():
    extras = configuration()["options.extras_require"]
    assert {"cli", "plot", "test", "bench"} <= set(extras)
    names = {re.split(r"[^\w.-]", line)[0] for line in extras["test"].split()}
    assert {"pytest", "hypothesis", "array-api-strict", "rich", "matplotlib"} <= names
    assert {"cuda12", "cuda13"} <= set(extras)
    assert not names & {"torch", "jax", "thinc", "cupy"}, "the default run must not need frameworks"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and a wheel that was built from it, made offline by this environment's tools."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"setuptools >= 77 is needed, {setuptools.__version__} is here")
    tmp = tmp_path_factory.mktemp("build")
    source, dist = tmp / "source", tmp / "dist"
    dist.mkdir()
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"

    def build(kind, cwd):
        subprocess.run([sys.executable, "-c", code.format(kind), str(dist)], cwd=cwd, check=True,
                       capture_output=True)

    build("sdist", source)
    sdist, = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp, filter="data")
        names = archive.getnames()
    build("wheel", tmp / sdist.name.removesuffix(".tar.gz"))
    wheel, = dist.glob("*.whl")
    installed = tmp / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    return names, installed


def test_sdist_and_wheel_carry_everything(built):
    names, installed = built
    inside = {name.partition("/")[2] for name in names}
    for top in ("pyattn", "kernels"):
        for file in [*(ROOT / top).rglob("*.py"), *(ROOT / top).rglob("*.cu*")]:
            path = file.relative_to(ROOT).as_posix()
            assert path in inside, "missing from the sdist"
            place = path if top == "pyattn" else f"pyattn/{path}"
            assert (installed / place).read_text() == file.read_text()
    assert {"pyattn/py.typed", "LICENSE", "README.md"} <= inside
    assert (installed / "pyattn" / "py.typed").is_file()
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"pyattn"}, "tests, bench and a second kernels do not belong in a wheel"


WHERE = ("import pyattn, pyattn.kernels.array_api, pyattn.kernels.cpu;"
         "print(pyattn.__file__, pyattn.kernels.__file__, pyattn.kernels.cpu.__name__, sep='\\n')")


def test_the_wheel_works_elsewhere(built, tmp_path):
    package, kernels, name = python(WHERE, cwd=tmp_path, path=built[1]).splitlines()
    assert Path(package).parent == built[1] / "pyattn"
    assert Path(kernels).parent == built[1] / "pyattn" / "kernels"
    assert name == "pyattn.kernels.cpu"


def test_a_checkout_hides_an_installed_package_whole(built):
    """The current folder comes first: its pyattn/ must then find its own kernels/."""
    package, kernels, _ = python(WHERE, cwd=ROOT, path=built[1]).splitlines()
    assert Path(package).parent == ROOT / "pyattn"
    assert Path(kernels).parent == ROOT / "kernels"


def test_a_checkout_works_uninstalled_from_elsewhere(tmp_path):
    package, kernels, name = python(WHERE, cwd=tmp_path, path=ROOT).splitlines()
    assert Path(package).parent == ROOT / "pyattn"
    assert Path(kernels).parent == ROOT / "kernels"
    assert name == "pyattn.kernels.cpu"


def loaded(code, tmp_path):
    names = python(f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))",
                   cwd=tmp_path, path=ROOT).splitlines()[-1]
    return set(json.loads(names))


def test_import_is_lazy(tmp_path):
    modules = loaded("import pyattn", tmp_path)
    own = {name for name in modules if name.partition(".")[0] == "pyattn"}
    assert own == {"pyattn", "pyattn._version", "pyattn.kernels"}
    assert not modules & (SLOW_IMPORTS | {"numpy"})


def test_help_is_fast(tmp_path):
    code = "from pyattn.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded(code, tmp_path) & SLOW_IMPORTS


def test_lazy_names_still_come(tmp_path):
    assert "pyattn.dispatch" in loaded("import pyattn; pyattn.explain", tmp_path)
