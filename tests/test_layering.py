"""The layers of the house: every import in minidist is read from its source, and an upward one fails.

Two towers meet once. The engine never sees a Communicator, communication never sees a Tensor; only parallel/ knows
both, and examples/ sits on top, as does every program (__main__.py). An import counts wherever it stands: in a
function, under TYPE_CHECKING, in a try.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minidist"

# From the ground up. What stands in one string is one layer.
ENGINE = ("backend", "watcher", "autograd split_backward tensor creation recomputation", "ops", "nn", "optim")
COMMUNICATION = ("backend", "comm", "collectives", "mesh")


def tower(*layers: str) -> dict[str, set[str]]:
    """What each module of a tower may import: its own layer, and all below."""
    return {name: set(" ".join(layers[: i + 1]).split()) for i, layer in enumerate(layers) for name in layer.split()}


MAY_IMPORT = {
    **tower(*ENGINE),
    **tower(*COMMUNICATION),
    **tower("backend", "data"),
    **tower("backend", "checkpoint"),
    "trace": set(" ".join((*ENGINE, *COMMUNICATION, "trace")).split()),
    "parallel": set(" ".join((*ENGINE, *COMMUNICATION, "parallel")).split()),
}
ON_TOP = ("__init__", "examples", "lessons", "watch", "doctor", "report")  # these may import everything
ONLY_IMPORTER = {"cupy": "backend.py", "cupyx": "backend.py", "mpi4py": "comm/mpi.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNREADABLE_CALLS = {"eval", "exec", "__import__", "import_module"}  # what runs or is imported stands in no source


def violations(package: Path) -> list[str]:
    """Every breach of the rules in a package tree, as "file:line: what is wrong"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        found += [f"{file}:{line}: {problem}" for line, problem in (*bad_imports(file, tree), *bad_calls(tree))]
    return found


def bad_imports(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    layer = "examples" if file.endswith("__main__.py") else file.split("/")[0].removesuffix(".py")
    if layer not in MAY_IMPORT and layer not in ON_TOP:
        yield 1, f"{layer} has no place in the layers: give it one in {Path(__file__).name}"
        return
    for line, name in imports(file, tree):
        top, _, rest = name.partition(".")
        if top == "minidist" and layer not in ON_TOP:
            target = rest.split(".")[0]
            if target not in MAY_IMPORT[layer]:
                yield line, f"{layer} must not import {name}"
        if file != ONLY_IMPORTER.get(top, file):
            yield line, f"only {ONLY_IMPORTER[top]} may import {name}"
        if top in UNSAFE_MODULES:
            yield line, f"nothing may import {name}"


def imports(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a file imports: `from ..a import b` in x/y.py is minidist.a.b."""
    package = ["minidist", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [node.module] if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*above, *module, alias.name])


def bad_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            # `import_module` is a method of importlib too; `eval` as a method is Module's, and harmless.
            name = getattr(node.func, "id", None)
            if isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
                name = node.func.attr
            if name in UNREADABLE_CALLS:
                yield node.lineno, f"nothing may call {name}"
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield node.lineno, "nothing may pass allow_pickle"


def test_no_import_goes_upward() -> None:
    assert violations(PACKAGE) == []


def breaches(folder: Path, file: str, source: str) -> list[str]:
    """The violations of a made-up package with this one file."""
    path = folder / "minidist" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return violations(folder / "minidist")


@pytest.mark.parametrize(
    "file, source, problem",
    [
        ("tensor.py", "from .comm import world", "1: tensor must not import minidist.comm.world"),
        ("tensor.py", "from . import ops", "1: tensor must not import minidist.ops"),
        ("backend.py", "def f():\n    from .tensor import Tensor", "2: backend must not import minidist.tensor.Tensor"),
        ("ops/loss.py", "if TYPE_CHECKING:\n    from ..nn import Module", "2: ops must not import minidist.nn.Module"),
        ("nn/layers.py", "from ..parallel.data import hook", "1: nn must not import minidist.parallel.data.hook"),
        ("nn/layers.py", "from .. import optim", "1: nn must not import minidist.optim"),
        ("nn/__init__.py", "from .. import Tensor", "1: nn must not import minidist.Tensor"),
        ("optim/sgd.py", "import minidist as md", "1: optim must not import minidist"),
        ("optim/sgd.py", "import minidist.mesh", "1: optim must not import minidist.mesh"),
        ("comm/base.py", "try:\n    from ..tensor import Tensor\nfinally:\n    pass", "2: comm must not import"),
        ("comm/base.py", "from ..collectives import ring", "1: comm must not import minidist.collectives.ring"),
        ("collectives/ring.py", "from minidist.ops import add", "1: collectives must not import minidist.ops.add"),
        ("mesh.py", "from .parallel import pipeline", "1: mesh must not import minidist.parallel.pipeline"),
        ("data/loader.py", "from ..tensor import Tensor", "1: data must not import minidist.tensor.Tensor"),
        ("data/loader.py", "from ..comm import world", "1: data must not import minidist.comm.world"),
        ("checkpoint.py", "from .nn import Module", "1: checkpoint must not import minidist.nn.Module"),
        ("parallel/data.py", "from ..examples import mnist", "1: parallel must not import minidist.examples.mnist"),
        ("ops/add.py", "import numpy, cupy", "1: only backend.py may import cupy"),
        ("examples/gpt.py", "from cupyx.scipy import special", "1: only backend.py may import cupyx.scipy.special"),
        ("comm/simulated.py", "from mpi4py import MPI", "1: only comm/mpi.py may import mpi4py.MPI"),
        ("comm/mpi.py", "import pickle", "1: nothing may import pickle"),
        ("data/idx.py", "numpy.load(file, allow_pickle=True)", "1: nothing may pass allow_pickle"),
        ("nn/init.py", "x = eval('1 + 1')", "1: nothing may call eval"),
        ("backend.py", "exec('import cupy')", "1: nothing may call exec"),
        ("ops/add.py", "import importlib\nimportlib.import_module('cupy')", "2: nothing may call import_module"),
        ("novelty.py", "x = 1", "1: novelty has no place in the layers"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, problem: str) -> None:
    (breach,) = breaches(tmp_path, file, source)
    assert breach.startswith(f"{file}:{problem}")


@pytest.mark.parametrize(
    "file, source",
    [
        ("backend.py", "def cupy():\n    import cupy"),
        ("autograd.py", "from .tensor import Tensor"),
        ("ops/__init__.py", "from ..tensor import Tensor\nfrom .add import add\nfrom . import loss"),
        ("nn/module.py", "model.eval()"),
        ("comm/mpi.py", "from mpi4py import MPI\nfrom .. import backend"),
        ("comm/__main__.py", "from minidist.collectives import tuning"),
        ("mesh.py", "from .comm.base import Communicator"),
        ("parallel/data.py", "from ..optim import SGD\nfrom ..collectives import all_reduce\nfrom .. import mesh"),
        ("examples/mnist.py", "import minidist as md\nfrom .. import parallel"),
        ("__init__.py", "from . import comm, nn, parallel"),
    ],
)
def test_what_the_rules_allow_is_no_breach(tmp_path: Path, file: str, source: str) -> None:
    assert breaches(tmp_path, file, source) == []
