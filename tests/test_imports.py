"""Rules about imports and forbidden calls, read from the source; and how the packages sit beside others."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may import of the others: experiments -> rl -> eggroll -> kernels.
ALLOWED = {
    "kernels": {"kernels"},
    "eggroll": {"eggroll", "kernels"},
    "rl": {"rl", "eggroll", "kernels"},
    "experiments": {"experiments", "rl", "eggroll", "kernels"},
    "configs": {"configs"},
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                yield node.func.id
            if any(k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                   for k in node.keywords):  # fmt: skip
                yield "allow_pickle"


@pytest.mark.parametrize("package", ["kernels", "eggroll", "rl", "experiments"])
def test_imports_point_one_way(package):
    files = sources(package)
    assert files, f"{package} has no source files"
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(ast.parse(path.read_text()))
        if module.split(".")[0] in set(ALLOWED) - ALLOWED[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", list(ALLOWED))
def test_no_pickle_eval_or_exec(package):
    wrong = []
    for path in sources(package):
        tree = ast.parse(path.read_text())
        modules = {module.split(".")[0] for module in imported_modules(tree)} & FORBIDDEN_MODULES
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in [*modules, *forbidden_calls(tree)]]
    assert wrong == []


def test_the_rules_notice_violations():
    tree = ast.parse("import pickle\nfrom rl import run\nnp.load(f, allow_pickle=True)\neval('1')\nmodel.eval()\n")
    assert {"pickle", "rl", "rl.run"} == set(imported_modules(tree))
    assert sorted(forbidden_calls(tree)) == ["allow_pickle", "eval"]


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("eggroll", ["rl", "flax", "orbax", "matplotlib", "gymnax", "brax", "tensorboardX"]),
        ("kernels", ["rl", "eggroll", "flax", "orbax", "matplotlib"]),
        ("rl.run", ["flax", "matplotlib", "gymnax", "brax", "tensorboardX"]),
    ],
)
def test_importing_stays_light(module, absent):
    # Blocked, not only unlisted: the import has to work where the others are not installed.
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {module}; print({module}.__name__)"
    assert run_python(code) == [module]


def test_our_kernels_package_is_the_one_imported_and_says_so():
    spec = importlib.util.find_spec("kernels")
    assert Path(spec.origin) == ROOT / "kernels" / "__init__.py"
    assert importlib.import_module("kernels").__name__ == "kernels"


@pytest.mark.slow
def test_transformers_does_not_take_our_kernels_for_the_hub_package():
    """PyPI has another package called kernels; transformers looks for one by import name and compares versions."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = (
        "import transformers, kernels\n"
        "from transformers.utils.import_utils import is_kernels_available, is_torch_available\n"
        "if is_torch_available(): import transformers.integrations.hub_kernels\n"
        "print(kernels.__file__, is_kernels_available())"
    )
    file, available = run_python(code)
    assert Path(file) == ROOT / "kernels" / "__init__.py" and available == "False"
