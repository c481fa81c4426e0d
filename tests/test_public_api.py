"""The public names, their docstrings and signatures, and which part may import which."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import pyattn

ROOT = Path(__file__).resolve().parents[1]

CORE = """
    attention cross_modal_attention merge
    sliding_window_attention local_attention_2d global_local_attention random_attention
    sparse_transformer_attention block_diagonal_attention blockbert_attention bigbird_attention
    axial_attention temporal_attention swin_attention
    longformer_attention coarse_fine_attention
    lsh_attention routing_attention
    graph_attention gat_attention top_k_attention bp_attention
    nsa_attention
    linear_attention efficient_attention linformer_attention performer_attention
    dynamic_convolution lightweight_convolution squeeze_excite cbam se_cbam
    additive_attention talking_heads_attention
    adaptive_span_attention dynamic_span_attention gated_attention sparsebert_attention
    masks layers features reference testing
    use_backend explain show_config set_num_threads
    ShapeError DtypeError OptionError BackendError
""".split()
MASKS = """
    causal window window_2d global_tokens strided fixed random_blocks segments lengths blocks graph
    dense distances predicate per_head per_item Mask BlockMask
""".split()
LAYERS = """
    linear layer_norm feed_forward rotary multi_head cross_attention transformer_block
    swin_block patch_merging swin timesformer_block nsa_layer
    gru conv1d conv2d hybrid_block dynamic_conv_layer span_convolution mixed_heads
""".split()
TESTING = ["check", "gradcheck", "cases"]

MODULES = ("masks", "layers", "features", "testing")


@pytest.mark.parametrize(("module", "names"), [
    ("", CORE), ("masks", MASKS), ("layers", LAYERS), ("testing", TESTING)])
def test_promised_names_exist(module, names):
    place = importlib.import_module(f"pyattn.{module}".rstrip("."))
    missing = [name for name in names if not hasattr(place, name)]
    assert missing == []
    assert set(names) <= set(place.__all__)


@pytest.mark.parametrize("module", ["", *MODULES, "reference"])
def test_all_is_importable_and_complete(module):
    place = importlib.import_module(f"pyattn.{module}".rstrip("."))
    for name in place.__all__:
        getattr(place, name)
    assert len(set(place.__all__)) == len(place.__all__)
    assert set(place.__all__) <= set(dir(place))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_attention"):
        _ = pyattn.no_such_attention


def test_the_catalogue_names_the_modules_that_the_variants_are_in():
    for name, module in pyattn.VARIANTS.items():
        operation = getattr(pyattn, name)
        assert operation.__name__ == name
        assert operation.__module__ == f"pyattn.{module}"


def functions():
    """Every public function."""
    found = []
    for module in ("", *MODULES):
        place = importlib.import_module(f"pyattn.{module}".rstrip("."))
        named = {name: getattr(place, name) for name in place.__all__}
        found += [pytest.param(value, id=f"{module}.{name}".lstrip("."))
                  for name, value in named.items() if inspect.isfunction(value)]
    return found


def operations():
    """Those with a backward."""
    return [param for param in functions() if hasattr(param.values[0], "forward")]


def sections(function):
    return re.findall(r"^([A-Z][\w ]+)\n-{3,}$", inspect.getdoc(function) or "", re.MULTILINE)


@pytest.mark.parametrize("function", functions())
def test_docstrings_have_their_sections(function):
    doc, found = inspect.getdoc(function), sections(function)
    assert doc, "no docstring"
    assert doc.partition("\n")[0].endswith((".", ":")), "the summary is one sentence on one line"
    if inspect.signature(function).parameters:
        assert "Parameters" in found
    assert "Examples" in found
    assert ">>> " in doc


@pytest.mark.parametrize("function", operations())
def test_operations_document_all_that_a_user_needs(function):
    found = sections(function)
    assert {"Parameters", "Returns", "Raises", "Examples"} <= set(found)
    assert {"References", "Notes"} & set(found)


@pytest.mark.parametrize("function", functions())
def test_every_parameter_is_documented(function):
    text = inspect.getdoc(function).partition("Parameters\n")[2]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^(.*, )?\**{name}(,.*| :.*)?$", text, re.MULTILINE), name


@pytest.mark.parametrize("operation", operations())
def test_call_and_forward_have_one_signature(operation):
    signature = inspect.signature(operation)
    assert list(signature.parameters) == list(inspect.signature(operation.forward).parameters)
    assert callable(operation.forward)
    assert operation.forward is not operation


NEEDED = {
    "adaptive_span_attention": {"span": np.zeros(1)},
    "axial_attention": {"shape": (1, 2)},
    "block_diagonal_attention": {"block_size": 1},
    "blockbert_attention": {"num_blocks": 1},
    "bp_attention": {"step": 1},
    "coarse_fine_attention": {"block_size": 1},
    "cross_modal_attention": {"modality_lengths": (1, 1)},
    "dynamic_span_attention": {"span": np.zeros((1, 2))},
    "gated_attention": {"gate_logits": np.zeros((1, 1, 1)), "block_size": 2},
    "global_local_attention": {"first": 1},
    "local_attention_2d": {"shape": (1, 2), "window": 1},
    "longformer_attention": {"window": 1, "global_index": (0,)},
    "random_attention": {"num_random": 1},
    "routing_attention": {"centroids": np.zeros((1, 1, 4)), "cluster_size": 1},
    "sliding_window_attention": {"window": 1},
    "sparse_transformer_attention": {"stride": 1},
    "sparsebert_attention": {"alpha": np.zeros((1, 2, 2))},
    "swin_attention": {"bias_table": np.ones((1, 1)), "shape": (2,), "window": 1},
    "temporal_attention": {"frames": 1},
    "top_k_attention": {"top": 1},
}
"""Options that have no default."""


@pytest.mark.parametrize("name", pyattn.VARIANTS)
def test_an_unknown_keyword_is_a_type_error(name):
    function, x = getattr(pyattn, name), np.ones((1, 2, 4))
    arrays = [x for p in inspect.signature(function).parameters.values()
              if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in NEEDED.get(name, {})]
    with pytest.raises(TypeError, match="no_such_option"):
        function(*arrays, **NEEDED.get(name, {}), no_such_option=1)


LEVEL = {
    "cli": 9, "testing": 8, "distributed": 8, "layers": 7, "variants": 6, "engines": 5,
    "features": 5, "masks": 4, "config": 4, "threads": 3, "dispatch": 3, "kernels": 2,
    "differentiable": 1, "arrays": 1, "checks": 1, "_version": 1,
}
"""A part imports only from lower levels, itself, and level 1 freely; see README, Layout."""


def imported(tree, module, package):
    """The parts of pyattn that the syntax tree of `module` imports; "" is pyattn itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = (module if package else module.rpartition(".")[0]).split(".")
            base = ".".join(parts[:len(parts) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "pyattn" else [base]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if top == "pyattn":
                yield part if part in LEVEL or part == "reference" else ""


def forbidden(part, target):
    """Why `part` may not import `target`, or None."""
    if part == target:
        return None
    if part == "reference":
        return "the judge stands apart from what it judges"
    if part == "kernels":
        return None if target in ("arrays", "checks") else "kernels know only arrays and checks"
    if target == "reference":
        return None if part == "testing" else "the judge is no backend"
    if target == "":
        return None if LEVEL[part] >= LEVEL["testing"] else "that is above everything"
    if LEVEL[part] == LEVEL[target] == 1 or LEVEL[target] < LEVEL[part]:
        return None
    return f"imports point downward, from {part} to lower than level {LEVEL[part]}"


def violations(source, module, *, package=False):
    part = module.split(".")[1]
    return [f"{module} imports {target or 'pyattn'}: {reason}"
            for target in imported(ast.parse(source), module, package)
            if (reason := forbidden(part, target)) is not None]


def files():
    found = []
    for top in ("pyattn", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(("pyattn", *parts) if top == "kernels" else parts)
            if module not in ("pyattn.__init__", "pyattn.__main__"):
                found.append(pytest.param(path, module.removesuffix(".__init__"), id=module))
    return found


@pytest.mark.parametrize(("path", "module"), files())
def test_imports_point_downward(path, module):
    assert violations(path.read_text(), module, package=path.name == "__init__.py") == []


@pytest.mark.parametrize(("module", "source"), [
    ("pyattn.masks.window", "from ..engines import softmax"),
    ("pyattn.masks.window", "import pyattn.layers.linear"),
    ("pyattn.engines.softmax", "def f():\n    from pyattn.variants.attention import attention"),
    ("pyattn.engines.softmax", "from .. import arrays, layers"),
    ("pyattn.engines.softmax", "from ..reference import softmax"),
    ("pyattn.engines.softmax", "from ..features import positions"),
    ("pyattn.variants.attention", "import pyattn"),
    ("pyattn.kernels.cpu.softmax", "from pyattn.dispatch import explain"),
    ("pyattn.kernels.cpu.softmax", "from ...masks import causal"),
    ("pyattn.reference.softmax", "from ..arrays import namespace"),
    ("pyattn.arrays", "from .dispatch import kernel"),
])
def test_an_upward_import_is_noticed(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(("module", "source"), [
    ("pyattn.engines.softmax", "from .. import arrays, dispatch, masks\nfrom . import placement"),
    ("pyattn.kernels.cpu.softmax", "from pyattn import arrays\nfrom . import philox\nimport numba"),
    ("pyattn.testing.check", "import pyattn\nfrom ..reference import softmax"),
    ("pyattn.arrays", "from .checks import DtypeError"),
])
def test_a_downward_import_is_allowed(module, source):
    assert violations(source, module) == []


GPU = ("pyattn.arrays", "pyattn.kernels.cuda", "pyattn.kernels.numba_cuda", "pyattn.cli",
       "pyattn.config", "pyattn.testing")
"""What may import CuPy, inside functions: some need it where there is no array of its yet."""


@pytest.mark.parametrize(("path", "module"), files())
def test_no_framework_is_imported(path, module):
    """A CuPy or torch array can only exist once its library has been imported by its maker."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    allowed = {"cupy"} if module.startswith(GPU) else set()
    assert not (found - allowed) & {"torch", "jax", "cupy", "tensorflow", "thinc"}
