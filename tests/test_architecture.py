"""The directions of imports, and that importing does nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPERATIONS = ("router", "grouped_lora", "mlp_block", "few_tokens")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def house_map() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```")[2].partition("```")[0]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", modules("molora_kernels"), ids=str)
def test_kernels_depend_on_torch_and_triton_alone(path: Path) -> None:
    allowed = ("molora_kernels", "torch", "triton", *sys.stdlib_module_names)
    foreign = [name for name in imports(path) if not any(within(name, top) for top in allowed)]
    assert not foreign


@pytest.mark.parametrize("path", modules("molora"), ids=str)
def test_molora_reaches_the_kernels_through_their_public_names_and_one_module(path: Path) -> None:
    names = list(imports(path))
    assert not [name for name in names if within(name, "bench") or within(name, "tests")]
    assert not [n for n in names if n.startswith("molora_kernels.") and n.count(".") > 1], "use the public names"
    callers = {"layers.py", "trainer.py"}  # the trainer chooses the backend, the layers call it
    if path.name not in callers:
        assert not [name for name in names if within(name, "molora_kernels")]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_layered(operation: str) -> None:
    folder = ROOT / "molora_kernels" / operation
    others = {"mlp_block": ()}  # which is made of the others
    for path in folder.glob("*.py"):
        names = set(imports(path))
        for other in others.get(operation, set(OPERATIONS) - {operation}):
            assert not [n for n in names if within(n, f"molora_kernels.{other}")], f"{path} imports a sibling"
        if path.name in ("reference.py", "portable.py"):
            assert not [n for n in names if within(n, "triton") or within(n, "molora_kernels._triton")], path
        if path.name == "reference.py":
            assert not [n for n in names if n.endswith((".portable", ".op", ".forward", ".backward"))], path


def test_cold_import_of_the_kernels_needs_no_triton_and_touches_no_device() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
def probed(*args, **kwargs): raise AssertionError("a device was probed at import")
torch.cuda.is_available = torch.cuda.current_device = torch.cuda.get_device_capability = probed
import molora_kernels
assert "transformers" not in sys.modules and "torch._dynamo" not in sys.modules  # a second each
x, w = torch.randn(3, 8), torch.randn(4, 8)
y, = molora_kernels.grouped_lora(x, [w], [torch.randn(2, 8)], [torch.randn(4, 2)], scaling=1.0)
assert y.shape == (3, 4)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_commands_do_not_wait_for_packages_that_few_of_them_use() -> None:
    program = """
import sys
import molora.train, molora.evaluate, molora.generate
assert not {"peft", "bitsandbytes", "transformers.optimization"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_no_file_is_named_for_nothing_in_particular() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    for package in ("molora", "molora_kernels", "bench", "tests"):
        assert not [path for path in modules(package) if path.stem in drawers or drawers & set(path.parts)]


@pytest.mark.parametrize("package", ["molora", "molora_kernels", "bench"])
def test_every_module_is_on_the_map(package: str) -> None:
    """The map in CONTRIBUTING.md names it, or the docstring of the package that it is in."""
    house = house_map()
    for path in modules(package):
        of_package = ast.get_docstring(ast.parse((path.parent / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert path.stem.startswith("__") or path.name in house or f"``{path.stem}``" in of_package, path


def test_the_map_names_nothing_that_is_gone() -> None:
    there = {path.name for package in ("molora_kernels", "molora", "bench") for path in modules(package)}
    assert set(re.findall(r"\b[a-z_]+\.py\b", house_map())) <= there
