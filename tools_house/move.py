"""Moves a checkout of expertcut to the layout of layout.py. Run: python3 /work/house/move.py REPO

Reads src/expertcut of REPO as it is, writes the new tree in its place, and rewrites tests,
benchmarks and texts. Format and import order are left to ruff (finish.sh).
"""

import ast
import builtins
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import layout as L  # noqa: E402

REPO = Path(sys.argv[1]).resolve()  # and perhaps --step NAME, one of L.STEPS
SRC = REPO / "src" / "expertcut"
PROBLEMS: list[str] = []
NOTES: list[str] = []


def problem(text: str) -> None:
    PROBLEMS.append(text)


def dotted(file: str) -> str:
    parts = ["expertcut", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OLD_FILES = sorted(str(p.relative_to(SRC)) for p in SRC.rglob("*.py"))
OLD = {dotted(f): f for f in OLD_FILES}  # module -> old file
STEP = sys.argv[sys.argv.index("--step") + 1] if "--step" in sys.argv else None


def in_step(target: str) -> bool:
    return STEP is None or any(
        target.startswith(p) if p.endswith("/") else target == p for p in L.STEPS[STEP])


def step_of(target: str) -> str:
    return next(s for s, ps in L.STEPS.items()
                for p in ps if (target.startswith(p) if p.endswith("/") else target == p))


TARGETS = {t: v for t, v in L.TARGETS.items() if in_step(t)}
TARGET_OF = {part: target for target, (_, parts) in TARGETS.items() for part in parts}
MOVING = set(TARGET_OF)  # old files that this run merges or moves
SYMBOLS = {k: v for k, v in L.SYMBOLS.items() if k[0] in MOVING}
RENAMES = {k: v for k, v in L.RENAMES.items() if k in MOVING}
ALL_PARTS = {p for _, parts in L.TARGETS.values() for p in parts}
DROPPED: list[str] = []
if STEP is None:
    DROPPED = list(L.DROPPED)
    for f in OLD_FILES:
        if f not in TARGET_OF and f not in DROPPED:
            problem(f"{f}: not in layout.py")
    for f in [*TARGET_OF, *DROPPED]:
        if f not in OLD_FILES:
            problem(f"{f}: in layout.py, not in the checkout")
else:
    for f in OLD_FILES:
        if f not in ALL_PARTS and f not in L.DROPPED and f not in L.TARGETS:
            problem(f"{f}: not in layout.py")
    for f in TARGET_OF:
        if f not in OLD_FILES:
            problem(f"{f}: in layout.py, not in the checkout")
    for f in L.DROPPED:
        inside = [x for x in OLD_FILES if x.startswith(f.removesuffix("__init__.py")) and x not in MOVING and x not in L.DROPPED]
        if f in OLD_FILES and not inside:
            DROPPED.append(f)
    for f in OLD_FILES:
        if f not in TARGET_OF and f not in DROPPED:
            TARGET_OF[f] = f
            if any(t == f for t in SYMBOLS.values()):
                TARGETS[f] = (None, [f])
                MOVING.add(f)
if PROBLEMS:
    sys.exit("\n".join(PROBLEMS))


def bound_in_target(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def is_tc(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


class Text:
    """A source text with edits by character offsets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []

    def at(self, lineno: int, col: int) -> int:
        line = self.lines[lineno - 1]
        return self.starts[lineno - 1] + len(line.encode()[:col].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def edit(self, start: int, end: int, new: str) -> None:
        if (start, end, new) not in self.edits:
            self.edits.append((start, end, new))

    def result(self, start: int = 0, end: int | None = None) -> str:
        end = len(self.text) if end is None else end
        out, at = [], start
        for s, e, new in sorted(self.edits):
            if s < start or e > end:
                continue
            if s < at:
                raise AssertionError(f"overlapping edits at {self.text[s:e]!r} -> {new!r}")
            out += [self.text[at:s], new]
            at = e
        return "".join([*out, self.text[at:end]])


class Module:
    """An old module: its tree, what it binds at the top, and from where."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.path = name, path
        self.src = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.src)
        self.imports: list[tuple[ast.stmt, bool]] = []  # statement, is type checking only
        self.defs: dict[str, ast.stmt] = {}
        self.bound: dict[str, tuple] = {}  # local name -> ("def",)|("ext",m,n)|("int",m,n)|("mod",m)
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports.append((node, False))
            elif is_tc(node):
                for inner in node.body:
                    self.imports.append((inner, True))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.defs.setdefault(node.name, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.If | ast.Try | ast.With | ast.Expr | ast.Assert | ast.Delete | ast.Raise):
                names = []
                if isinstance(node, ast.Assign):
                    for t in node.targets:
                        names += bound_in_target(t)
                elif isinstance(node, ast.AnnAssign):
                    names += bound_in_target(node.target)
                elif isinstance(node, ast.For):
                    names += bound_in_target(node.target)
                    for s in node.body:
                        names += bound_in_target(s)
                elif isinstance(node, ast.If | ast.With | ast.Try):
                    names += bound_in_target(node)
                for n in names:
                    self.defs.setdefault(n, node)
            else:
                problem(f"{name}: statement {type(node).__name__} at top")
        for stmt, _ in self.imports:
            for local, origin in origins(stmt):
                self.bound[local] = origin
        for n in self.defs:
            self.bound[n] = ("def",)


def origins(stmt: ast.stmt) -> list[tuple[str, tuple]]:
    found = []
    if isinstance(stmt, ast.Import):
        for a in stmt.names:
            local = a.asname or a.name.partition(".")[0]
            if a.name.split(".")[0] == "expertcut":
                found.append((local, ("mod", a.name)) if a.asname else (local, ("root", a.name)))
            else:
                found.append((local, ("ext", a.name, None, a.asname)))
    elif isinstance(stmt, ast.ImportFrom):
        for a in stmt.names:
            local = a.asname or a.name
            if stmt.module == "__future__":
                continue
            if stmt.module.split(".")[0] == "expertcut" and stmt.level == 0:
                full = f"{stmt.module}.{a.name}"
                found.append((local, ("mod", full) if full in OLD else ("int", stmt.module, a.name)))
            else:
                found.append((local, ("ext", "." * stmt.level + (stmt.module or ""), a.name, a.asname)))
    return found


MODULES = {name: Module(SRC / f, name) for name, f in OLD.items()}


def home(module: str, name: str) -> tuple[str, str]:
    """(old module, name) where a name is defined, through re-exports."""
    seen = set()
    while (module, name) not in seen:
        seen.add((module, name))
        m = MODULES.get(module)
        if m is None:
            problem(f"unknown module {module} (for {name})")
            return module, name
        if name in m.defs:
            return module, name
        origin = m.bound.get(name)
        if origin is None:
            return module, name
        if origin[0] == "int":
            module, name = origin[1], origin[2]
        else:
            return module, name
    raise AssertionError((module, name))


def renamed(file: str, name: str) -> str:
    return RENAMES.get(file, {}).get(name, name)


def place(module: str, name: str) -> tuple[str, str]:
    """(new module, new name) of a name as it is imported from an old module."""
    module, name = home(module, name)
    file = OLD[module]
    target = SYMBOLS.get((file, name)) or TARGET_OF.get(file)
    if target is None:
        problem(f"{module}.{name}: in a dropped file")
        return module, name
    return dotted(target), renamed(file, name)


def place_import(module: str, name: str) -> tuple[str, str]:
    """As `place`, but packages that stay go on re-exporting."""
    file = OLD[module]
    if TARGET_OF.get(file, "").endswith("__init__.py") and MODULES[module].bound.get(name, ("def",))[0] == "int":
        return dotted(TARGET_OF[file]), place(module, name)[1]
    return place(module, name)


def attr_of(module: str, name: str) -> str:
    """What a name that a module imports is called there now."""
    origin = MODULES[module].bound.get(name, ("",))
    return place(module, name)[1] if origin[0] == "int" and origin[2] == name else name


def module_place(module: str) -> str:
    file = OLD[module]
    target = TARGET_OF.get(file)
    if target is None:
        new = L.PACKAGES.get(module.removeprefix("expertcut."))
        if new is None:
            problem(f"module {module} has no place")
            return module
        return f"expertcut.{new}"
    return dotted(target)


# ---------------------------------------------------------------- scopes


class Scope:
    def __init__(self, kind: str, parent: "Scope | None") -> None:
        self.kind, self.parent = kind, parent
        self.bound: set[str] = set()
        self.outer: set[str] = set()  # global or nonlocal


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef,
          ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def collect(scope: Scope, nodes: list[ast.AST]) -> None:
    """What is bound in a scope, inner scopes aside."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope.bound.add(node.name)
            inner = [*node.decorator_list]
            if not isinstance(node, ast.ClassDef):
                a = node.args
                inner += [*a.defaults, *(d for d in a.kw_defaults if d)]
            else:
                inner += [*node.bases, *(k.value for k in node.keywords)]
            collect(scope, inner)
        elif isinstance(node, ast.Lambda):
            collect(scope, [*node.args.defaults, *(d for d in node.args.kw_defaults if d)])
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for w in ast.walk(node):
                if isinstance(w, ast.NamedExpr):
                    scope.bound.add(w.target.id)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                scope.bound.add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                scope.bound |= {a.asname or a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ExceptHandler) and node.name:
                scope.bound.add(node.name)
            elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
                scope.bound.add(node.name)
            elif isinstance(node, ast.MatchMapping) and node.rest:
                scope.bound.add(node.rest)
            elif isinstance(node, ast.Global | ast.Nonlocal):
                scope.outer |= set(node.names)
            collect(scope, list(ast.iter_child_nodes(node)))


def resolve(scope: Scope, name: str) -> Scope | None:
    """The scope that a name belongs to; None is builtin (or unbound)."""
    s: Scope | None = scope
    is_first = True
    while s is not None:
        if s.kind == "module":
            return s if name in s.bound else None
        if (s.kind != "class" or is_first) and name in s.bound and name not in s.outer:
            return s
        is_first = False
        s = s.parent
    return None


def walk_names(tree: ast.Module, visit, extra: set[str] = frozenset()) -> None:  # type: ignore[no-untyped-def]
    """Calls visit(name node, scope it belongs to, innermost scope) for every Name and string annotation."""
    top = Scope("module", None)
    collect(top, list(tree.body))
    top.bound |= extra

    def go(node: ast.AST, scope: Scope, ann: bool = False) -> None:
        if isinstance(node, ast.Name):
            visit(node, resolve(scope, node.id), scope)
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ann:
            visit(node, None, scope)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for d in node.decorator_list:
                go(d, scope)
            a = node.args
            for d in [*a.defaults, *(x for x in a.kw_defaults if x)]:
                go(d, scope)
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]
            for x in every:
                if x.annotation:
                    go(x.annotation, scope, True)
            if node.returns:
                go(node.returns, scope, True)
            inner = Scope("function", scope)
            inner.bound |= {x.arg for x in every}
            collect(inner, list(node.body))
            for s in node.body:
                go(s, inner)
        elif isinstance(node, ast.Lambda):
            a = node.args
            for d in [*a.defaults, *(x for x in a.kw_defaults if x)]:
                go(d, scope)
            inner = Scope("function", scope)
            inner.bound |= {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]}
            go(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            for d in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
                go(d, scope)
            inner = Scope("class", scope)
            collect(inner, list(node.body))
            for s in node.body:
                go(s, inner)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            inner = Scope("comprehension", scope)
            go(node.generators[0].iter, scope)
            for g in node.generators:
                inner.bound |= set(bound_in_target(g.target))
            for i, g in enumerate(node.generators):
                go(g.target, inner)
                if i:
                    go(g.iter, inner)
                for c in g.ifs:
                    go(c, inner)
            if isinstance(node, ast.DictComp):
                go(node.key, inner)
                go(node.value, inner)
            else:
                go(node.elt, inner)
        elif isinstance(node, ast.AnnAssign):
            go(node.target, scope)
            go(node.annotation, scope, True)
            if node.value:
                go(node.value, scope)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("cast", "TypeVar"):
            go(node.func, scope)
            for i, x in enumerate(node.args):
                go(x, scope, i == 0 and node.func.id == "cast")
            for k in node.keywords:
                go(k.value, scope, True)
        elif isinstance(node, ast.Subscript) and ann and ast.unparse(node.value).endswith("Literal"):
            go(node.value, scope)
            go(node.slice, scope)
        else:
            for c in ast.iter_child_nodes(node):
                go(c, scope, ann)

    for s in tree.body:
        go(s, top)


# ---------------------------------------------------------------- rewriting one file


def statement(module: str, name: str, asname: str | None) -> str:
    return f"from {module} import {name}" + (f" as {asname}" if asname and asname != name else "")


class Rewriter:
    """Edits of one old source or test file: names, lazy imports, dotted texts.

    target: new module when the file is a part of one, else None. Top-level imports of a part are
    taken out and kept as `top` and `tc` lines; those of other files are replaced in place.
    """

    def __init__(self, path: Path, target: str | None, old_file: str | None) -> None:
        self.path, self.target, self.old_file = path, target, old_file
        self.text = Text(path.read_text(encoding="utf-8"))
        self.tree = ast.parse(self.text.text)
        self.local_renames: dict[str, str] = {}  # module-global local name -> new
        self.top: list[str] = []
        self.tc: list[str] = []
        self.binds: dict[str, tuple] = {}  # new local name -> origin
        self.names_in_file = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)} | {
            n.arg for n in ast.walk(self.tree) if isinstance(n, ast.arg)} | {
            n.name for n in self.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        self.modules: dict[str, str] = {}  # local name of an imported old module -> old module

    def import_lines(self, stmt: ast.stmt, *, is_top: bool, scope_names: set[str]) -> list[str]:
        """New statements for one import statement; records renames for those at the top."""
        lines = []
        for local, origin in origins(stmt):
            kind = origin[0]
            if kind == "ext":
                if origin[2] is None:
                    lines.append(f"import {origin[1]}" + (f" as {origin[3]}" if origin[3] else ""))
                else:
                    asname = origin[3]
                    new = renamed(self.old_file, local) if self.old_file and is_top else local
                    if new != local:
                        self.local_renames[local] = asname = local = new
                    lines.append(statement(origin[1], origin[2], asname))
                if is_top:
                    self.binds[local] = ("ext", origin[1], origin[2])
            elif kind == "root":
                problem(f"{self.path}: import {origin[1]}")
            elif kind == "mod":
                old = origin[1]
                lines += self.module_import(local, old, is_top, stmt)
            else:
                new_module, new_name = place_import(origin[1], origin[2])
                asname = local if local != origin[2] else None
                in_same = new_module == self.target
                if in_same:
                    if is_top:
                        if new_name != local:
                            self.local_renames[local] = new_name
                        continue
                    if new_name != local:
                        problem(f"{self.path}: lazy {local} is {new_name} of the same file")
                    continue
                if asname is None and new_name != local:
                    if is_top and new_name not in self.names_in_file:
                        self.local_renames[local] = new_name
                        local = new_name
                    elif not is_top and new_name not in self.names_in_file:
                        self.rename_lazy(local, new_name, stmt)
                    else:
                        asname = local
                        NOTES.append(f"{self.path}: {new_name} as {local}")
                elif asname == new_name:
                    asname = None
                lines.append(statement(new_module, new_name, asname))
                if is_top:
                    self.binds[asname or new_name] = ("int", new_module, new_name)
        if isinstance(stmt, ast.ImportFrom) and stmt.module == "__future__":
            lines.append("from __future__ import annotations")
        comment = re.match(r"\s*#.*", self.text.text[self.text.span(stmt)[1]:].split("\n", 1)[0])
        if self.target and is_top and comment and len(lines) == 1:
            lines[0] += "  " + comment[0].strip()
        return lines

    def rename_lazy(self, local: str, new: str, stmt: ast.stmt) -> None:
        mine = self.names_of(local, False, stmt)
        for n in ast.walk(self.tree):
            if isinstance(n, ast.Name) and id(n) in mine:
                s, e = self.text.span(n)
                self.text.edit(s, e, new)

    def names_of(self, local: str, is_top: bool, stmt: ast.stmt) -> set[int]:
        """Name nodes that mean what an import statement binds."""
        found: set[int] = set()
        around = None
        if not is_top:
            functions = [f for f in ast.walk(self.tree) if isinstance(f, ast.FunctionDef)
                         and f.lineno <= stmt.lineno <= f.end_lineno]
            around = max(functions, key=lambda f: f.lineno)

        def visit(node: ast.AST, scope: Scope | None, inner: Scope) -> None:
            if not isinstance(node, ast.Name) or node.id != local or scope is None:
                return
            if is_top and scope.kind == "module":
                found.add(id(node))
            if around is not None and scope.kind == "function" and around.lineno <= node.lineno <= around.end_lineno:
                found.add(id(node))

        walk_names(self.tree, visit)
        return found

    def module_import(self, local: str, old: str, is_top: bool, stmt: ast.stmt) -> list[str]:
        """`from pkg import module`: its attributes decide which new modules are needed."""
        new_of_file = module_place(old)
        mine = self.names_of(local, is_top, stmt)
        uses = [n for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)
                and isinstance(n.value, ast.Name) and id(n.value) in mine]
        needed: dict[str, None] = {}
        todo = []
        for n in uses:
            m = MODULES[old]
            if n.attr in m.defs or False:
                new_module, new_name = place(old, n.attr)
            else:
                new_module, new_name = new_of_file, attr_of(old, n.attr)
            needed[new_module] = None
            todo.append((n, new_module, new_name))
        if not needed:
            needed[new_of_file] = None
        lines, names = [], {}
        for new_module in needed:
            package, _, base = new_module.rpartition(".")
            stems = {Path(f).stem for f in OLD_FILES}
            name = local
            if local == old.rpartition(".")[2] or len(needed) > 1:
                name = base
            if name != local and name in self.names_in_file:
                name = f"{base}_module"
                NOTES.append(f"{self.path}: {local} -> {name}")
            names[new_module] = name
            lines.append(statement(package, base, name if name != base else None))
            if is_top:
                self.binds[name] = ("mod", new_module)
        for n, new_module, new_name in todo:
            s, e = self.text.span(n.value)
            self.text.edit(s, e, names[new_module])
            if new_name != n.attr:
                a, b = self.text.span(n)
                self.text.edit(b - len(n.attr), b, new_name)
        # bare uses: monkeypatch.setattr(module, "attr", …)
        handled = {id(n.value) for n, *_ in todo}
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Name) and id(call.args[0]) in mine:
                if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, str):
                    attr = call.args[1].value
                    if attr in MODULES[old].defs:
                        new_module, new_name = place(old, attr)
                    else:
                        new_module, new_name = new_of_file, attr_of(old, attr)
                    if new_module not in names:
                        package, _, base = new_module.rpartition(".")
                        names[new_module] = base
                        lines.append(statement(package, base, None))
                    s, e = self.text.span(call.args[0])
                    self.text.edit(s, e, names[new_module])
                    handled.add(id(call.args[0]))
                    if new_name != attr:
                        s, e = self.text.span(call.args[1])
                        self.text.edit(s, e, f'"{new_name}"')
        for n in ast.walk(self.tree):
            if isinstance(n, ast.Name) and id(n) in mine and id(n) not in handled and isinstance(n.ctx, ast.Load):
                if new_of_file in names:
                    s, e = self.text.span(n)
                    self.text.edit(s, e, names[new_of_file])
                else:
                    problem(f"{self.path}:{n.lineno}: bare module {local}")
        return lines

    def run(self) -> None:
        t = self.text
        top_stmts = set()
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                top_stmts.add(node)
                lines = self.import_lines(node, is_top=True, scope_names=set())
                if self.target:
                    self.top += lines
                else:
                    s, e = t.span(node)
                    if any(o[0] in ("int", "mod") for _, o in origins(node)):
                        t.edit(s, e, "\n".join(lines))
            elif is_tc(node):
                for inner in node.body:
                    top_stmts.add(inner)
                    lines = self.import_lines(inner, is_top=True, scope_names=set())
                    if self.target:
                        self.tc += lines
                    else:
                        s, e = t.span(inner)
                        t.edit(s, e, "\n    ".join(lines))
        if self.old_file:
            for name in MODULES[dotted(self.old_file)].defs:
                new = renamed(self.old_file, name)
                if new != name:
                    self.local_renames[name] = new
                if (self.old_file, name) not in SYMBOLS:
                    self.binds[new] = ("def", self.old_file)
        self.lazy(top_stmts)
        self.rename()
        self.strings()

    def lazy(self, top_stmts: set[ast.stmt]) -> None:
        """Imports inside functions, in place."""
        t = self.text

        def go(node: ast.AST, function: ast.AST | None) -> None:
            for c in ast.iter_child_nodes(node):
                if c in top_stmts:
                    continue
                if isinstance(c, ast.ImportFrom | ast.Import):
                    if not any(o[0] in ("int", "mod") for _, o in origins(c)):
                        continue
                    lines = self.import_lines(c, is_top=False, scope_names=set())
                    s, e = t.span(c)
                    indent = " " * c.col_offset
                    if lines:
                        t.edit(s, e, f"\n{indent}".join(lines))
                    else:
                        # the whole line with its comment goes, and an empty one behind it
                        start = t.starts[c.lineno - 1]
                        end = t.starts[c.end_lineno]
                        if t.text[end:end + 1] == "\n" and t.text[max(0, start - 1):start] == "\n":
                            siblings = getattr(node, "body", [])
                            at = siblings.index(c) if c in siblings else -1
                            before = siblings[at - 1] if at > 0 else None
                            if not isinstance(before, ast.Import | ast.ImportFrom):
                                end += 1
                        t.edit(start, end, "")
                else:
                    go(c, c if isinstance(c, ast.FunctionDef) else function)

        go(self.tree, None)

    def rename(self) -> None:
        if not self.local_renames:
            return
        t = self.text
        renames = self.local_renames
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global):
                problem(f"{self.path}: global statement")

        def visit(node: ast.AST, scope: Scope | None, inner: Scope) -> None:
            if isinstance(node, ast.Name):
                if node.id in renames and scope is not None and scope.kind == "module":
                    s, e = t.span(node)
                    t.edit(s, e, renames[node.id])
                    new = renames[node.id]
                    p: Scope | None = inner
                    while p is not None and p.kind != "module":
                        if new in p.bound:
                            problem(f"{self.path}:{node.lineno}: {node.id} -> {new}, which is local there")
                        p = p.parent
            else:
                s, e = t.span(node)
                raw = t.text[s:e]
                new = re.sub(r"(?<![\w.])([A-Za-z_]\w*)", lambda m: renames.get(m[1], m[1]), raw)
                if new != raw:
                    t.edit(s, e, new)

        walk_names(self.tree, visit)
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in renames:
                s, _ = t.span(node)
                found = re.compile(rf"(def|class)\s+{node.name}\b").search(t.text, s)
                assert found
                t.edit(found.end() - len(node.name), found.end(), renames[node.name])
        # words in docstrings and comments: `name`
        for m in re.finditer(r"`([A-Za-z_]\w*)`", t.text):
            if m[1] in renames and not any(s <= m.start() < e for s, e, _ in t.edits):
                t.edit(m.start(1), m.end(1), renames[m[1]])

    def strings(self) -> None:
        """Dotted names of old modules in strings and comments, and paths."""
        t = self.text
        for start, end, new in text_edits(t.text):
            if any(s <= start < e for s, e, _ in t.edits):
                continue
            line = t.text[t.text.rfind("\n", 0, start) + 1:start]
            if re.match(r"\s*(from|import)\s", line) and "import" in line + t.text[start:t.text.find("\n", start)]:
                if re.match(r"\s*(from|import) $", line):
                    continue
            t.edit(start, end, new)


DOTTED = re.compile(r"\bexpertcut(?:\.[A-Za-z_]\w*)+")
BARE = re.compile(r"(?<=[`\"'])((?:" + "|".join(sorted({m.split(".")[1] for m in OLD if "." in m})) + r")(?:\.[A-Za-z_]\w*)+)(?=[`\"'])")
PATHS = re.compile(r"(?<![\w/.-])((?:src/expertcut/)?)((?:[a-z_]+/)*[a-z_]+\.py)\b")


def new_dotted(name: str) -> str | None:
    parts = name.split(".")
    for n in range(len(parts), 1, -1):
        head = ".".join(parts[:n])
        if head in OLD:
            rest = parts[n:]
            if rest and rest[0] in MODULES[head].defs:
                module, new = place(head, rest[0])
                return ".".join([module, new, *rest[1:]])
            if rest and MODULES[head].bound.get(rest[0], ("",))[0] == "int":
                module, new = place(head, rest[0])
                if not OLD[head].endswith("__init__.py"):
                    module = module_place(head)
                return ".".join([module, new, *rest[1:]])
            if OLD[head] in TARGET_OF or head.removeprefix("expertcut.") in L.PACKAGES:
                return ".".join([module_place(head), *rest])
            return None
    return None


def text_edits(text: str) -> list[tuple[int, int, str]]:
    edits = []
    for m in DOTTED.finditer(text):
        new = new_dotted(m[0])
        if new and new != m[0]:
            edits.append((m.start(), m.end(), new))
    for m in BARE.finditer(text):
        if m[1].endswith((".py", ".json", ".yaml")):
            continue
        new = new_dotted("expertcut." + m[1])
        is_quoted = text[m.start() - 1] != "`"
        if is_quoted and "expertcut." + m[1] not in OLD:
            continue
        if new:
            edits.append((m.start(1), m.end(1), new.removeprefix("expertcut.")))
    for m in PATHS.finditer(text):
        file = m[2]
        if file in TARGET_OF and ("/" in file):
            new = m[1] + TARGET_OF[file]
            if new != m[0]:
                edits.append((m.start(), m.end(), new))
    return edits


# ---------------------------------------------------------------- targets


def docstring_of(node: ast.Module) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first if is_doc else None


def order_parts(parts: list[str]) -> list[str]:
    """Parts so that what runs at import is defined before."""
    needs = {p: set() for p in parts}
    for p in parts:
        m = MODULES[dotted(p)]
        for stmt, is_tc_only in m.imports:
            if is_tc_only:
                continue
            for _, origin in origins(stmt):
                if origin[0] == "int":
                    h, n = home(origin[1], origin[2])
                    if OLD[h] in needs and OLD[h] != p:
                        needs[p].add(OLD[h])
    done: list[str] = []
    while len(done) < len(parts):
        ready = [p for p in parts if p not in done and needs[p] <= set(done)]
        if not ready:
            problem(f"parts in a circle: {parts}")
            return parts
        done.append(ready[0])
    return done


def body_of(r: Rewriter, skip: set[str]) -> tuple[str, dict[str, str]]:
    """The text behind docstring and imports, and the chunks of symbols that go elsewhere."""
    t = r.text
    last = 0
    body = r.tree.body
    doc = docstring_of(r.tree)
    rest = []
    for node in body:
        if node is doc or isinstance(node, ast.Import | ast.ImportFrom) or is_tc(node):
            assert not rest, f"{r.path}: imports after code"
            if last and "#" in t.text[last:t.starts[node.lineno - 1]]:
                problem(f"{r.path}: a comment among the imports would be lost")
            last = t.starts[node.end_lineno]
        else:
            rest.append(node)
    moved = {}
    pieces = []
    at = last
    ends = [t.starts[n.end_lineno] for n in rest]
    for i, node in enumerate(rest):
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        begin = ends[i - 1] if i else last
        if name in skip:
            pieces.append(t.result(at, begin))
            moved[name] = t.result(begin, ends[i]).strip("\n")
            at = ends[i]
    pieces.append(t.result(at, len(t.text)))
    return "".join(pieces).strip("\n"), moved


def dedupable(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and len(node.targets) == 1


def build() -> dict[str, str]:
    rewriters: dict[str, Rewriter] = {}
    for part in [p for _, ps in TARGETS.values() for p in ps]:
        target = TARGET_OF[part]
        r = Rewriter(SRC / part, dotted(target), part)
        r.run()
        rewriters[part] = r
    out: dict[str, str] = {}
    bodies: dict[str, str] = {}
    moved_of: dict[tuple[str, str], str] = {}
    for part, r in rewriters.items():
        skip = {n for (f, n) in SYMBOLS if f == part}
        bodies[part], moved = body_of(r, skip)
        for name in skip:
            if name not in moved:
                problem(f"{part}: {name} is not there to be moved")
                continue
            moved_of[part, name] = moved[name]
            # what is left may need it
            module, new = place(dotted(part), name)
            if module != r.target:
                r.top.append(statement(module, new, None))
    moved_text: dict[str, list[tuple[str, str, str]]] = {}
    for (part, name), target in SYMBOLS.items():
        if (part, name) in moved_of:
            moved_text.setdefault(target, []).append((part, name, moved_of[part, name]))
    for target, (summary, parts) in TARGETS.items():
        ordered = order_parts(parts)
        check_collisions(target, [rewriters[p] for p in ordered])
        docs = [ast.get_docstring(rewriters[p].tree, clean=False) or "" for p in parts]
        if summary is None:
            # exactly as it stands
            r = rewriters[parts[0]]
            d = docstring_of(r.tree)
            s, e = r.text.span(d)
            doc = r.text.result(s, e)
        else:
            tails = []
            for p in parts:
                r = rewriters[p]
                d = docstring_of(r.tree)
                s, e = r.text.span(d)
                full = r.text.result(s, e)
                inner = full.removeprefix('r').strip('"')
                begin, _, tail = inner.partition("\n\n")
                tail = tail.strip("\n")
                if tail.strip():
                    is_same = begin.split()[:3] == summary.split()[:3]
                    is_alone = len(parts) == 1 or is_same
                    tails.append(tail.rstrip() if is_alone else with_context(begin, tail.rstrip()))
            tails += [L.EXTRA_DOCS[target]] if target in L.EXTRA_DOCS else []
            raw = "r" if any("\\" in x for x in tails) else ""
            doc = f'{raw}"""{summary}"""' if not tails else f'{raw}"""{summary}\n\n' + "\n\n".join(tails) + '\n"""'
        top: dict[str, None] = {}
        tc: dict[str, None] = {}
        for p in ordered:
            for line in rewriters[p].top:
                top[line] = None
            for line in rewriters[p].tc:
                tc[line] = None
        moved_chunks = []
        for part, name, chunk in moved_text.get(target, []):
            is_quoted = (part, name) in L.QUOTED
            used = {n.id for n in ast.walk(ast.parse(chunk)) if isinstance(n, ast.Name)}
            used |= set(re.findall(r"\w+", " ".join(
                n.value for n in ast.walk(ast.parse(chunk)) if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) < 80)))
            own_defs = MODULES[dotted(part)].defs
            lines = [*rewriters[part].top, *(statement(*place(dotted(part), u), None) for u in sorted(used) if u in own_defs)]
            for line in lines:
                if line.startswith(f"from {dotted(target)} import "):
                    continue
                if "__future__" not in line and not used & set(re.findall(r"\w+", line.partition("import ")[2])):
                    continue
                is_light = any(x.startswith(line.partition(" import ")[0] + " ") for x in top)
                (tc if is_quoted and " expertcut." in line and not is_light else top)[line] = None
            for line in rewriters[part].tc:
                if not line.startswith(f"from {dotted(target)} import ") and used & set(re.findall(r"\w+", line.partition("import ")[2])):
                    tc[line] = None
            late = {w for x in tc for w in re.findall(r"\w+", x.partition(" import ")[2])}
            moved_chunks.append(quoted(chunk, late) if is_quoted else chunk)
        future = [x for x in top if "__future__" in x]
        top_lines = [x for x in top if "__future__" not in x]
        top_lines = [x for x in top_lines if x != "from typing import TYPE_CHECKING"] 
        base = "from expertcut.models.moe_block import "
        if target.startswith(("models/", "scoring/")):
            top_lines += [x for x in tc if x.startswith(base)]
            tc = {x: None for x in tc if not x.startswith(base)}
        tc_lines = [x for x in tc if x not in top]
        if tc_lines:
            top_lines.append("from typing import TYPE_CHECKING")
        seen_defs: dict[str, str] = {}
        texts = []
        for p in ordered:
            body = drop_duplicates(p, bodies[p], seen_defs)
            if body.strip():
                texts.append(body.strip("\n"))
        if len(texts) > 1:
            available = {w for x in top_lines for w in re.findall(r"\w+", x.partition("import ")[2])} | set(dir(builtins))
            texts = hoisted(texts, available)
        if parts:
            texts += moved_chunks
        elif moved_chunks:
            texts = [join_chunks(moved_chunks)]
        blocks = [doc]
        if future:
            blocks.append(future[0])
        if top_lines:
            blocks.append("\n".join(top_lines))
        if tc_lines:
            comment = tc_comment(parts)
            blocks.append(f"if TYPE_CHECKING:{comment}\n" + "\n".join(f"    {x}" for x in tc_lines))
        head = "\n\n".join(blocks)
        out[target] = head + ("\n\n" + "\n\n\n".join(texts) if texts else "") + "\n"
        if target.endswith("modeling_exact.py"):
            out[target] = (SRC / parts[0]).read_text(encoding="utf-8")
    return out


def hoisted(texts: list[str], available: set[str]) -> list[str]:
    """The constants with which parts begin, together at the top where they need nothing else."""
    leads, rests = [], []
    for text in texts:
        t = Text(text)
        end = 0
        for node in ast.parse(text).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                break
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
            if not {n.id for n in names} <= available | stored:
                break
            available |= stored
            end = t.starts[node.end_lineno]
        leads.append(text[:end].strip("\n"))
        rests.append(text[end:].strip("\n"))
    lead = "\n".join(x for x in leads if x)
    return [x for x in [lead, *rests] if x]


def join_chunks(chunks: list[str]) -> str:
    """Assignments close together, classes and functions apart."""
    out = chunks[0]
    for a, b in zip(chunks, chunks[1:], strict=False):
        are_short = all(isinstance(ast.parse(x).body[0], ast.Assign | ast.AnnAssign) for x in (a, b))
        out += ("\n" if are_short else "\n\n\n") + b
    return out


def quoted(chunk: str, late: set[str]) -> str:
    """Annotations in quotes that name what is imported for type checking only."""
    t = Text(chunk)
    for node in ast.walk(ast.parse(chunk)):
        for field in ("annotation", "returns"):
            its = getattr(node, field, None)
            if its is not None and not isinstance(its, ast.Constant):
                s, e = t.span(its)
                if late & set(re.findall(r"\w+", chunk[s:e])):
                    t.edit(s, e, f'"{chunk[s:e]}"')
    return t.result()


def with_context(summary: str, tail: str) -> str:
    """A part's summary before what follows it, as one paragraph where that is prose."""
    first, _, rest = tail.partition("\n\n")
    if first.startswith((" ", "-", "*")) or "\n " in first:
        return f"{summary}\n\n{tail}"
    joined = textwrap.fill(" ".join(f"{summary} {first}".split()), 100, break_long_words=False, break_on_hyphens=False)
    return joined + (f"\n\n{rest}" if rest else "")


def tc_comment(parts: list[str]) -> str:
    for p in parts:
        m = re.search(r"^if TYPE_CHECKING:(  #.*)$", MODULES[dotted(p)].src, re.M)
        if m:
            return m[1]
    return ""


def drop_duplicates(part: str, body: str, seen: dict[str, str]) -> str:
    """Assignments that an earlier part of the same file has word for word: logger, Array, T."""
    tree = ast.parse(body)
    t = Text(body)
    for node in tree.body:
        if dedupable(node) and isinstance(node.targets[0], ast.Name):
            name, dump = node.targets[0].id, ast.unparse(node)
            if seen.get(name) == dump:
                end = t.starts[node.end_lineno]
                t.edit(t.starts[node.lineno - 1], end, "")
            else:
                seen.setdefault(name, dump)
    return t.result()


def same_assignment(name: str, a: str, b: str) -> bool:
    x, y = (MODULES[dotted(p)].defs.get(name) for p in (a, b))
    return bool(x and y and dedupable(x) and dedupable(y) and ast.unparse(x) == ast.unparse(y))


def check_collisions(target: str, parts: list[Rewriter]) -> None:
    bound: dict[str, list[tuple[Rewriter, tuple]]] = {}
    for r in parts:
        for name, origin in r.binds.items():
            bound.setdefault(name, []).append((r, origin))
    for name, entries in bound.items():
        firsts = entries[0]
        for other in entries[1:]:
            if other[1] == firsts[1] and other[1][0] != "def":
                continue
            if firsts[1][0] == other[1][0] == "def" and same_assignment(name, firsts[1][1], other[1][1]):
                continue
            problem(f"{target}: `{name}` is {firsts[1]} ({firsts[0].old_file}) and {other[1]} ({other[0].old_file})")
    # builtins that another part binds
    for r in parts:
        others = {n for q in parts if q is not r for n in q.binds} - set(r.binds)
        def visit(node, scope, inner):  # type: ignore[no-untyped-def]
            if isinstance(node, ast.Name) and scope is None and node.id in others and hasattr(builtins, node.id):
                problem(f"{target}: builtin `{node.id}` of {r.old_file} is bound by another part")
        walk_names(r.tree, visit)


# ---------------------------------------------------------------- other files


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    return [REPO / f for f in done.stdout.splitlines()]


def main() -> None:
    files = tracked()
    new = build()
    others: dict[Path, str] = {}
    for path in files:
        if not path.is_file():
            continue
        if SRC in path.parents:
            rel_src = str(path.relative_to(SRC))
            if path.suffix != ".py" or rel_src in MOVING or rel_src in DROPPED:
                continue
        rel = str(path.relative_to(REPO))
        if path.suffix == ".py":
            if rel == "tests/test_architecture.py" or path.name == "modeling_exact.py":
                continue
            r = Rewriter(path, None, None)
            r.run()
            others[path] = r.text.result()
        elif path.suffix in (".md", ".toml", ".sh", ".yaml", ".yml") or path.name == "Makefile":
            t = Text(path.read_text(encoding="utf-8"))
            for s, e, n in text_edits(t.text):
                t.edit(s, e, n)
            others[path] = t.result()
    if PROBLEMS:
        print("\n".join(dict.fromkeys(PROBLEMS)))
        print(len(set(PROBLEMS)), "problems")
        sys.exit(1)
    data: dict[str, bytes] = {}
    gone = [SRC / f for f in [*MOVING, *DROPPED]]
    known = {SRC / f for f in OLD_FILES}
    for p in files:
        if SRC in p.parents and p not in known:
            rel = str(p.relative_to(SRC))
            for old, target in L.DATA.items():
                if rel == old or (old.endswith("/") and rel.startswith(old)):
                    if "/" in target and in_step(target):
                        data[target + rel.removeprefix(old)] = p.read_bytes()
                        gone.append(p)
                    break
                if rel.startswith(target) and STEP:
                    break
            else:
                sys.exit(f"{rel}: data file without a place")
    exact = "moe/loading/modeling_exact.py"
    exact_bytes = (SRC / exact).read_bytes() if exact in MOVING else None
    for p in gone:
        p.unlink()
    for cache in SRC.rglob("__pycache__"):
        shutil.rmtree(cache)
    for folder in sorted((d for d in SRC.rglob("*") if d.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    for target, text in new.items():
        path = SRC / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if exact_bytes is not None:
        (SRC / "models/modeling_exact.py").write_bytes(exact_bytes)
    for target, content in data.items():
        path = SRC / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path, text in others.items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    import patches
    missing = patches.apply(REPO, STEP)
    if missing:
        print("PATCHES that did not apply:", *missing, sep="\n  ")
    print(STEP or "all:", len(new), "files written")
    print("\n".join(NOTES))


if __name__ == "__main__":
    main()
