"""The floors of the package: imports point down, and what must not need torch does not import it."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "seal_nb"
# From the ground up; a module may import its own floor (without a circle) and those below.
FLOORS = (
    {"errors", "processes"},
    {"prompts", "passages", "protocol", "metrics", "storage", "models"},
    {"ttt"},
    {"engines"},
    {"grading", "self_edits", "sft"},
    {"inner_loop"},
    {"server"},
    {"results"},
    {"views"},
    {"experiments"},
    {"notebook_runner"},
    {"inspector", "chain"},
    {"cli", "commands"},
)
TORCH = {"ttt", "engines", "inner_loop", "sft"}
# The doors to torch on floors that are otherwise free of it.
TORCH_MODULES = {"seal_nb.server.worker"}
TORCH_ENGINES = {"seal_nb.engines.local"}
HEAVY = ("torch", "transformers", "peft")


@cache
def modules() -> list[str]:
    names = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))]
    return [".".join(parts).removesuffix(".__init__") for parts in names]


def floor_name(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def path_of(module: str) -> Path:
    base = PACKAGE.parent.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def imports_of(module: str) -> set[str]:
    """Modules of the package that ``module`` imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("seal_nb"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(modules())) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("seal_nb.")}
    return found


def free_of_torch() -> list[str]:
    return [
        module
        for module in modules()
        if (floor_name(module) not in TORCH - {"engines"} and module not in TORCH_MODULES | TORCH_ENGINES)
    ]


def test_every_module_has_its_floor() -> None:
    known = set().union(*FLOORS)
    assert {floor_name(module) for module in modules()} - {""} - known == set()


def test_imports_point_down() -> None:
    level = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{module} imports {imported}"
        for module in modules()
        for imported in sorted(imports_of(module))
        if floor_name(imported) and level[floor_name(imported)] > level.get(floor_name(module), -1)
    ]
    assert upward == []


def test_no_circles() -> None:
    tuple(TopologicalSorter({module: imports_of(module) for module in modules()}).static_order())


def test_only_the_command_line_prints() -> None:
    printing = [
        module
        for module in modules()
        if floor_name(module) not in ("cli", "commands")
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


@pytest.fixture(scope="module")
def pulled_in() -> dict[str, list[str]]:
    """Heavy packages that each torch-free module imports, each in a fresh interpreter."""
    code = f"""
import json, os, sys
said = {{}}
for module in {free_of_torch()!r}:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        # A fork of an interpreter that has imported nothing yet is a fresh one, without its start-up time.
        try:
            __import__(module)
            found = [name for name in {HEAVY!r} if name in sys.modules]
        except BaseException as error:
            found = [repr(error)]
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    said[module] = json.loads(os.read(reading, 100_000))
    os.close(reading)
    os.waitpid(child, 0)
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("module", free_of_torch())
def test_module_that_a_laptop_uses_does_not_import_torch(module: str, pulled_in: dict[str, list[str]]) -> None:
    assert pulled_in[module] == []


def test_modules_with_torch_import_on_their_own() -> None:
    with_torch = set(modules()) - set(free_of_torch())
    if find_spec("triton") is None:  # a part of torch's CUDA packages, not of its CPU ones
        with_torch.remove("seal_nb.ttt.kernels")
    code = f"for module in {sorted(with_torch)!r}: __import__(module)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
