"""The layers of the package: imports point down, and modules that run without torch do not import it."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "seal_nb"
# From the bottom up; a module may import its own layer (without a circle) and those below.
FLOORS = (
    {"errors"},
    {"settings"},
    {"prompts", "passages", "protocol", "metrics", "storage", "processes", "models"},
    {"ttt"},
    {"peft_files"},
    {"engines"},
    {"grading", "self_edits", "sft"},
    {"server"},
    {"results"},
    {"views"},
    {"experiments"},
    {"notebook_runner"},
    {"inspector", "chain"},
    {"cli"},
)
TORCH = {"ttt", "peft_files", "engines", "server", "sft"}
TORCH_MODULES = {"seal_nb.engines.local", "seal_nb.server.loop"}  # the only ones of their folders
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
        if (floor_name(module) not in TORCH - {"engines", "server"} and module not in TORCH_MODULES)
    ]


def test_every_module_has_its_layer() -> None:
    known = set().union(*FLOORS)
    assert {floor_name(module) for module in modules()} - {""} - known == set()


def test_imports_point_down() -> None:
    level = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{module} imports {imported}"
        for module in modules()
        if module != "seal_nb"  # the public API names everything
        for imported in sorted(imports_of(module))
        if floor_name(imported) and level[floor_name(imported)] > level.get(floor_name(module), -1)
    ]
    assert upward == []


def test_no_circles() -> None:
    tuple(TopologicalSorter({module: imports_of(module) for module in modules()}).static_order())


def test_only_one_function_of_the_command_line_prints() -> None:
    printing = [
        module
        for module in modules()
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == ["seal_nb.cli"], "`tell` makes hidden characters visible"


def test_models_are_read_in_one_place_which_trusts_no_code_of_theirs() -> None:
    """Everything else, also benchmarks and notebooks, calls `models.pretrained`."""
    root = PACKAGE.parent
    code = {path: path.read_text() for folder in ("seal_nb", "benchmarks") for path in (root / folder).rglob("*.py")}
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        code[path] = "\n".join("".join(cell) for cell in cells)
    trusting = [
        f"{path.name}: {ast.unparse(node)}"
        for path, text in code.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".from_pretrained", ".from_config"))
        if "trust_remote_code=False" not in map(ast.unparse, node.keywords)
    ]
    assert trusting == []
    assert {path.name for path, text in code.items() if "from_pretrained" in text} == {"models.py"}
    assert not [path.name for path, text in code.items() if re.search("trust-remote-code|trust_remote_code=True", text)]


def test_modules_that_a_laptop_uses_do_not_import_torch() -> None:
    """All of them in one interpreter in which an import of torch, transformers or peft raises."""
    code = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"imports {{name}}")  # no ImportError, which a module may catch

sys.meta_path.insert(0, Refuse())
failed = []
for module in {free_of_torch()!r}:
    try:
        importlib.import_module(module)
    except AssertionError as error:
        failed.append(f"{{module}}: {{error}}")
print("\\n".join(failed))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", ""], done.stdout


def test_each_folder_says_in_five_lines_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE or "vllm_plugin" in path.parts or "data" in path.parts:
            continue
        text = path.read_text()
        (only,) = ast.parse(text).body or [None]
        assert isinstance(only, ast.Expr) and len(text.strip().splitlines()) <= 5, path


def test_processes_of_the_server_do_not_import_numpy_or_tables() -> None:
    code = "import sys, seal_nb.server.main, seal_nb.server.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "pandas", "matplotlib", "IPython"} & set(done.stdout.split())
