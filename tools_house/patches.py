"""Small texts that a rule cannot change, and the README's tree. Each old text must be there."""

import ast
from pathlib import Path

import layout as L

ARROWS = "errors < files < documents < data < models < scoring < profiling < edits < checkpoints < evaluation < healing < reporting < hub < recipes < commands < cli"

# (step, file, old text, new text)
PATCHES: list[tuple[str, str, str, str]] = [
    ("reporting", "pyproject.toml", '"reporting/page/template/*.*"', '"reporting/template/*.*"'),
    ("reporting", "pyproject.toml", '"reporting/page/template/scripts/*.js"', '"reporting/template/scripts/*.js"'),
    ("texts", "CONTRIBUTING.md",
     "errors < quiz < moe < profiling < interventions < checkpoints < evaluation < healing < reporting < publishing < recipe < cli",
     ARROWS),
    ("texts", "CONTRIBUTING.md", "no torch in `quiz`", "no torch in `data`, no file name twice, no package inside a package"),
    ("reporting", "docs/page.md", "in the list of `reporting/page/sections`", "in the list `SECTIONS` of `reporting/page.py`"),
    ("models", "docs/reliability.md", "(`objects.py`)", "(`models/checkpoint_dir.py`)"),
    ("models", "docs/reliability.md", "(`headers.py`)", "(`models/safetensors_index.py`)"),
    ("models", "docs/reliability.md", "(`counts.py`)", "(`models/validate.py`)"),
    ("recipes", "src/expertcut/recipes/recipe_schema.py", "# Those of interventions.criteria,", "# Those of edits.criteria,"),
    ("healing", "src/expertcut/healing/adapters.py", "The blocks of `moe` stay", "The blocks of `models` stay"),
    ("edits", "src/expertcut/edits/calibrate.py", "Beside the legend of `moe`: a Gram", "With the legend of `models`: a Gram"),
    ("models", "src/expertcut/scoring/attention.py",
     "Beside the legend of `moe`: H heads, S places of the longest question of a group, d width of a head.",
     "With the legend of `models`: H heads, S places of the longest question of a group, d width of a\nhead."),
    ("models", "docs/families.md", "models/find_blocks.py", "models/moe_block.py"),
    # wrapped from the same module now, so the second model would be recorded by the first too
    ("checkpoints", "tests/test_streaming.py",
     """    for source in (olmoe, checkpoint("gpt_oss")):
        headers = read_headers(source)
        edits, fitted = edits_of(open_model(checkpoint(read_config(source)["model_type"])), "cut")
""",
     """    moves = {name: getattr(shards, name) for name in ("copy_ranges", "read_ranges")}
    for source in (olmoe, checkpoint("gpt_oss")):
        headers = read_headers(source)
        edits, fitted = edits_of(open_model(checkpoint(read_config(source)["model_type"])), "cut")
"""),
    ("checkpoints", "tests/test_streaming.py",
     """        for name in ("copy_ranges", "read_ranges"):
            monkeypatch.setattr(shards, name, recorded(getattr(shards, name), read))
""",
     """        for name, move in moves.items():
            monkeypatch.setattr(shards, name, recorded(move, read))
"""),
    # write_atomically is in files.py, which needs more of `os` than fsync
    ("profiling", "tests/processes.py", "        storage.os = SimpleNamespace(fsync=sync)  # type: ignore[attr-defined]\n",
     '        files.os = SimpleNamespace(**{**vars(os), "fsync": sync})  # type: ignore[attr-defined]\n'),
    ("profiling", "tests/processes.py", "from expertcut.profiling import storage\n", "from expertcut import files\n"),
    ("recipes", "tests/processes.py", '        "reporting.eval_tables",\n        "reporting.show",\n        "reporting.eval_tables",\n',
     '        "reporting.eval_tables",\n        "reporting.show",\n'),
    # the architecture
    ("texts", "tests/test_architecture.py", '''ORDER = (
    "errors",
    "documents",
    "quiz",
    "moe",
    "profiling",
    "interventions",
    "checkpoints",
    "evaluation",
    "healing",
    "reporting",
    "publishing",
    "recipe",
    "cli",
)
''', "ORDER = (\n" + "".join(f'    "{x}",\n' for x in L.ORDER) + ")\n"),
    ("texts", "tests/test_architecture.py", "torch_in_quiz", "torch_in_data"),
    ("texts", "tests/test_architecture.py", 'root / "quiz"', 'root / "data"'),
    ("texts", "tests/test_architecture.py", 'SRC / "quiz"', 'SRC / "data"'),
    ("texts", "tests/test_architecture.py", "test_the_quiz_needs_no_torch", "test_data_needs_no_torch"),
    ("texts", "tests/test_architecture.py", "test_torch_in_the_quiz_is_found", "test_torch_in_data_is_found"),
    ("texts", "tests/test_architecture.py", '"quiz/', '"data/'),
    ("texts", "tests/test_architecture.py", '"moe/', '"models/'),
    ("texts", "tests/test_architecture.py", "expertcut.moe", "expertcut.models"),
    ("texts", "tests/test_architecture.py", "import moe", "import models"),
    ("texts", "tests/test_architecture.py", "..moe", "..models"),
    ("texts", "tests/test_architecture.py", "expertcut.quiz", "expertcut.data"),
    ("texts", "tests/test_architecture.py", "from . import quiz", "from . import data"),
    ("texts", "tests/test_architecture.py", '("recipe.py",', '("recipes.py",'),
    ("texts", "tests/test_architecture.py", "from . import recipe", "from . import recipes"),
    ("texts", "tests/test_architecture.py", '''def torch_in_data(''', '''def double_names(root: Path) -> list[str]:
    names = Counter(path.name for path in sources(root) if path.name != "__init__.py")
    return [f"{name} stands {n} times" for name, n in sorted(names.items()) if n > 1]


def deep_packages(root: Path) -> list[str]:
    depth = {path.parent.relative_to(root) for path in sources(root)}
    return [f"{folder} lies in a package" for folder in sorted(depth) if len(folder.parts) > 1]


def torch_in_data('''),
    ("texts", "tests/test_architecture.py", "import ast\nfrom collections.abc", "import ast\nfrom collections import Counter\nfrom collections.abc"),
    ("texts", "tests/test_architecture.py", '''def test_data_needs_no_torch(''', '''def test_no_file_name_stands_twice():
    assert double_names(SRC) == []


def test_no_package_lies_in_a_package():
    assert deep_packages(SRC) == []


def test_data_needs_no_torch('''),
    ("texts", "tests/test_architecture.py", '''@pytest.mark.parametrize("line", ["import torch"''', '''def test_a_name_that_stands_twice_and_a_deep_package_are_found(tmp_path):
    for file in ("models/a.py", "models/__init__.py", "data/__init__.py", "data/b.py"):
        plant(tmp_path, file, "")
    assert double_names(tmp_path / "expertcut") == deep_packages(tmp_path / "expertcut") == []
    root = plant(tmp_path, "data/deep/a.py", "")
    assert len(double_names(root)) == len(deep_packages(root)) == 1


@pytest.mark.parametrize("line", ["import torch"'''),
]


def apply(repo: Path, step: str | None) -> list[str]:
    missing = []
    for at, file, old, new in PATCHES:
        if step not in (None, at):
            continue
        path = repo / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if old not in text:
            missing.append(f"{file}: not found: {old[:70]!r}")
            continue
        path.write_text(text.replace(old, new), encoding="utf-8")
    if step in (None, "texts"):
        readme(repo)
    return missing


def readme(repo: Path) -> None:
    path = repo / "README.md"
    text = path.read_text(encoding="utf-8")
    head, tail = text.split("## Where things are\n", 1)
    before, tree, after = tail.split("```", 2)
    lines = tree.splitlines()
    at = next(i for i, x in enumerate(lines) if x.startswith("recipes/"))
    new = ["", *tree_lines(repo / "src" / "expertcut"), *lines[at:]]
    path.write_text(f"{head}## Where things are\n{before}```" + "\n".join(new) + f"\n```{after}", encoding="utf-8")


def first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0].rstrip(".")


def tree_lines(src: Path) -> list[str]:
    lines = ["src/expertcut/"]
    for name in L.ORDER:
        module = src / f"{name}.py"
        if module.is_file():
            lines.append(f"  {name + '.py':<25}{first_line(module)}")
            continue
        lines.append(f"  {name + '/':<25}{first_line(src / name / '__init__.py')}")
        files = [t for t in L.TARGETS if t.startswith(f"{name}/") and not t.endswith("__init__.py")]
        lines += [f"    {Path(t).name:<23}{first_line(src / t)}" for t in files]
    return lines
