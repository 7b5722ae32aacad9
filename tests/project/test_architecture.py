"""The shape of the code: which part may import which, how long things are, who prints."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "expertcut"
ORDER = (
    "errors",
    "files",
    "documents",
    "settings",
    "stats",
    "data",
    "models",
    "scoring",
    "profiling",
    "edits",
    "checkpoints",
    "evaluation",
    "healing",
    "reporting",
    "hub",
    "commands",
    "recipes",
    "api",
    "cli",
)
ROOT_FILES = ("__init__", "__main__")
MAX_FILES = 214
MAX_FOLDERS = 18
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
PRINTING_NAMES = {"print", "pprint", "echo", "secho"}  # builtin, rich, typer, click


def sources(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def part_of(root: Path, path: Path) -> str:
    """The top-level folder or module that a file belongs to."""
    return path.relative_to(root).with_suffix("").parts[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(root: Path, path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, relative ones spelled out."""
    package = [root.name, *path.relative_to(root).parts[:-1]]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def edges(root: Path) -> Iterator[tuple[Path, str, str]]:
    """File, its part and the part that it imports, for every import inside the package."""
    for path in sources(root):
        for name in imported_names(root, path):
            package, _, rest = name.partition(".")
            if package == root.name:
                yield path, part_of(root, path), rest.partition(".")[0]


def unknown_parts(root: Path) -> list[str]:
    parts = {part_of(root, path) for path in sources(root)} - {*ORDER, *ROOT_FILES}
    return [f"{part} is not in the list of parts" for part in sorted(parts)]


def wrong_imports(root: Path) -> list[str]:
    wrong = []
    for path, part, target in edges(root):
        if part in ROOT_FILES or part not in ORDER or target == "__version__":
            continue
        if target not in ORDER or ORDER.index(target) > ORDER.index(part):
            wrong.append(f"{path.relative_to(root)} imports {target or 'the package itself'}")
    return wrong


def long_pieces(root: Path) -> list[str]:
    long = []
    for path in sources(root):
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        if n_lines > MAX_FILE_LINES:
            long.append(f"{path.relative_to(root)} has {n_lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or 0) - node.lineno + 1
                if n_lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(root)}: {node.name} has {n_lines} lines")
    return long


def prints(node: ast.AST) -> bool:
    """Whether a node calls a printing function or touches the standard streams."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        return name in PRINTING_NAMES
    is_stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
    return is_stream and getattr(node.value, "id", "") == "sys"


def printing_files(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.lineno} prints"
        for path in sources(root)
        for node in ast.walk(tree_of(path))
        if part_of(root, path) != "cli" and prints(node)
    ]


def module_of(root: Path, path: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(root: Path) -> list[str]:
    """Modules that import each other, in functions and for type checkers too; none if empty."""
    modules = {module_of(root, path): path for path in sources(root)}
    graph = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in imported_names(root, path)
        }
        - {module, root.name}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def layout_names(root: Path) -> list[str]:
    """Comparisons with the name of a layout, outside the table of layouts."""
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sources(root)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Compare) and path.name != "layouts.py"
        for part in (node.left, *node.comparators)
        if isinstance(part, ast.Constant) and part.value in ("stock", "exact")
    ]


def double_names(root: Path) -> list[str]:
    names = Counter(path.name for path in sources(root) if path.name != "__init__.py")
    return [f"{name} stands {n} times" for name, n in sorted(names.items()) if n > 1]


def deep_packages(root: Path) -> list[str]:
    depth = {path.parent.relative_to(root) for path in sources(root)}
    return [f"{folder} lies in a package" for folder in sorted(depth) if len(folder.parts) > 1]


def torch_in_data(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in sources(root / "data")
        for name in imported_names(root, path)
        if name.partition(".")[0] == "torch"
    ]


def test_there_is_something_to_check():
    assert len(sources(SRC)) > 3
    assert len(sources(SRC / "data")) > 1
    assert any(part != target and part in ORDER for _, part, target in edges(SRC))


def test_every_folder_and_module_is_in_the_list():
    assert unknown_parts(SRC) == []


def test_imports_go_only_up_the_list():
    assert wrong_imports(SRC) == []


def test_files_and_functions_are_short():
    assert long_pieces(SRC) == []


def test_only_the_cli_prints():
    assert printing_files(SRC) == []


def test_no_modules_import_each_other():
    assert circle(SRC) == []


def test_a_layout_is_asked_for_what_it_does_and_not_for_its_name():
    assert len(layout_names(SRC)) <= 3, layout_names(SRC)


def test_files_and_folders_are_few():
    assert len(sources(SRC)) <= MAX_FILES
    assert len({path.parent for path in sources(SRC)}) <= MAX_FOLDERS


def test_no_file_name_stands_twice():
    assert double_names(SRC) == []


def test_no_package_lies_in_a_package():
    assert deep_packages(SRC) == []


def test_data_needs_no_torch():
    assert torch_in_data(SRC) == []


def plant(tmp_path: Path, file: str, text: str) -> Path:
    path = tmp_path / "expertcut" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return tmp_path / "expertcut"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data/a.py", "from expertcut.models import load\n"),
        ("data/a.py", "from expertcut.models.load import load\n"),
        ("data/a.py", "import expertcut.models.load\n"),
        ("data/a.py", "from expertcut import models\n"),
        ("data/a.py", "from .. import models\n"),
        ("data/a.py", "from ..models import load\n"),
        ("data/deep/a.py", "from ...models import load\n"),
        ("data/__init__.py", "from ..models import load\n"),
        ("data/a.py", "def late():\n    from expertcut.models import load\n"),
        ("errors.py", "from . import data\n"),
        ("recipes.py", "import os, expertcut.cli\n"),
        ("data/a.py", "from expertcut import Plan\n"),
        ("data/a.py", "import expertcut\n"),
        ("data/a.py", "from expertcut.helpers import help_me\n"),
    ],
)
def test_an_import_down_the_list_is_found(tmp_path, file, text):
    assert len(wrong_imports(plant(tmp_path, file, text))) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("models/a.py", "from expertcut.data import read\n"),
        ("models/a.py", "from . import b\nfrom .b import c\n"),
        ("models/a.py", "from expertcut import __version__, errors\n"),
        ("models/a.py", "import expertcutter\nfrom transformers import cli\n"),
        ("cli.py", "from . import recipes\n"),
        ("__main__.py", "from expertcut.cli import main\n"),
    ],
)
def test_an_import_up_the_list_is_allowed(tmp_path, file, text):
    root = plant(tmp_path, file, text)
    assert list(imported_names(root, root / file))  # else there was nothing to allow
    assert wrong_imports(root) == []


@pytest.mark.parametrize("file", ["utils.py", "helpers/__init__.py", "helpers/deep/a.py"])
def test_a_part_outside_the_list_is_found(tmp_path, file):
    plant(tmp_path, "errors.py", "")
    assert len(unknown_parts(plant(tmp_path, file, ""))) == 1


@pytest.mark.parametrize("indent", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_modules_that_import_each_other_are_found(tmp_path, indent):
    plant(tmp_path, "models/a.py", "from expertcut.models import b\n")
    assert circle(plant(tmp_path, "models/b.py", "import os\n")) == []
    root = plant(tmp_path, "models/b.py", f"{indent}from expertcut.models.a import f\n")
    assert {"expertcut.models.a", "expertcut.models.b"} <= set(circle(root))


def test_a_comparison_with_a_layout_is_found(tmp_path):
    plant(tmp_path, "edits/layouts.py", 'is_it = x == "stock"\n')
    assert layout_names(plant(tmp_path, "edits/a.py", 'x = "stock"\n')) == []
    text = 'def f(x):\n    return x.layout != "exact" or x in ("stock",) or "stock" == x\n'
    assert len(layout_names(plant(tmp_path, "edits/a.py", text))) == 2


def test_what_is_too_long_is_found(tmp_path):
    for n_lines, expected in ((MAX_FILE_LINES, 0), (MAX_FILE_LINES + 1, 1)):
        assert len(long_pieces(plant(tmp_path, "cli.py", "x = 1\n" * n_lines))) == expected
    for n_lines, expected in ((MAX_FUNCTION_LINES, 0), (MAX_FUNCTION_LINES + 1, 1)):
        method = "class A:\n    async def f(self):\n" + "        x = 1\n" * (n_lines - 1)
        assert len(long_pieces(plant(tmp_path, "cli.py", method))) == expected


@pytest.mark.parametrize(
    "call",
    ["print(1)", "rich.print(1)", "console.print(1)", "typer.echo(1)", "sys.stdout.write(1)"],
)
def test_printing_outside_the_cli_is_found(tmp_path, call):
    text = f"def show():\n    {call}\n"
    assert printing_files(plant(tmp_path, "cli.py", text)) == []
    assert len(printing_files(plant(tmp_path, "models/a.py", text))) == 1


def test_a_name_that_stands_twice_and_a_deep_package_are_found(tmp_path):
    for file in ("models/a.py", "models/__init__.py", "data/__init__.py", "data/b.py"):
        plant(tmp_path, file, "")
    assert double_names(tmp_path / "expertcut") == deep_packages(tmp_path / "expertcut") == []
    root = plant(tmp_path, "data/deep/a.py", "")
    assert len(double_names(root)) == len(deep_packages(root)) == 1


@pytest.mark.parametrize("line", ["import torch", "from torch import nn", "import torch.nn as nn"])
def test_torch_in_data_is_found(tmp_path, line):
    plant(tmp_path, "models/a.py", f"{line}\n")
    assert len(torch_in_data(plant(tmp_path, "data/a.py", f"def f():\n    {line}\n"))) == 1
