"""Which part of the package may import which, and that it does not name the programs that use it."""

import ast
import re

import pytest

from processes import ROOT

PACKAGE = ROOT / "projects" / "SAMDETR" / "samdetr"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ("cli", "__main__", "about")  # what is called from a shell, and speaks of its options
# What each part must not import; "" is the package itself with all its parts.
FORBIDDEN = {
    "ops": [""],
    "modeling": ["config", "checks", "checkpoint", "data", "engine", "predictor", "visualization"],
    "checkpoint": ["modeling", "checks", "data", "engine"],
    "data": ["modeling", "engine"],
    "engine": ["predictor", "checks", "visualization"],
}


def name_of(path):
    """The module's name inside the package, such as "modeling.decoder"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Names, inside the package, of all modules that a module imports, at its top or in a function."""
    own = ["samdetr", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return {name.removeprefix("samdetr").removeprefix(".") for name in found if name.split(".")[0] == "samdetr"}


def is_part(name, of):
    return not of or name == of or name.startswith(f"{of}.")


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_forbidden_arrow(part):
    paths = [path for path in MODULES if is_part(name_of(path), part)]
    assert len(paths) > 3
    for path in paths:
        for imported in imports_of(path):
            inside = part == "ops" and is_part(imported, "ops")
            assert inside or not any(is_part(imported, other) for other in FORBIDDEN[part]), (path.name, imported)


def test_the_papers_parts_do_not_need_the_baselines():
    for path in MODULES:
        name = name_of(path)
        if is_part(name, "modeling") and name != "modeling" and not is_part(name, "modeling.baselines"):
            assert not any(is_part(imported, "modeling.baselines") for imported in imports_of(path)), name


def test_nothing_but_the_commands_imports_the_commands():
    for path in MODULES:
        if not any(is_part(name_of(path), command) for command in COMMANDS):
            assert not any(is_part(imported, "cli") for imported in imports_of(path)), path


def test_no_string_of_the_package_names_an_option_or_a_program():
    """The package is used from Python, too; only the commands name their options."""
    programs = {path.name for path in [ROOT / "train_net.py", *(ROOT / "tools").rglob("*.py")]}
    assert {"train_net.py", "predict.py", "benchmark.py"} <= programs
    words = "|".join(re.escape(name) for name in sorted(programs))
    pattern = re.compile(rf"(?<![\w-])--[a-z]|\btools/|(?<!\w)({words})")
    for path in MODULES:
        if any(is_part(name_of(path), command) for command in COMMANDS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not pattern.search(node.value), f"{path}:{node.lineno}: {node.value!r}"


def test_every_kernel_has_a_readable_twin():
    """In ops/: ``_Name`` is the autograd function behind ``name``, beside ``name_plain``; Triton's have the same twins."""
    found = 0
    files = {path.name: ast.parse(path.read_text()).body for path in (PACKAGE / "ops").glob("*.py")}
    functions = {
        file: {node.name for node in nodes if isinstance(node, ast.FunctionDef)} for file, nodes in files.items()
    }
    for file, nodes in files.items():
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.name).lower().strip("_")
                assert name in functions[file], (file, node.name)
                beside = set().union(*functions.values()) if file.startswith("triton_") else functions[file]
                assert f"{name.removesuffix('_triton')}_plain" in beside, (file, node.name)
                found += 1
    assert found == 6
