"""The layers: a module imports only what stands above it, and two sides never meet."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pgbgw"

CLIENT_SIDE = ["latch", "_attachment", "_channels", "handle", "client", "watch"]
WORKER_SIDE = ["_launch", "_database", "_child"]
SUPERVISOR_SIDE = ["_poller", "_connections", "_launcher", "_workers", "_domain", "_loop", "_serve"]
ORDER = [
    *["errors", "worker", "_policy", "_slots", "_kernel", "_runtime", "_wire", "_log", "_cgroup"],
    *CLIENT_SIDE,
    *WORKER_SIDE,
    *SUPERVISOR_SIDE,
    *["config", "_systemd", "supervisor", "_show", "_bench_workers", "_bench", "cli", "__main__"],
]

# Against the order, but only when it is called: Client.watch() makes a Watch, which is one of its
# client.
EXCEPTIONS = {("client", "watch")}

# pgbgw itself names all, and loads each on first use.
MODULES = sorted(
    {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", ".pyx")} - {"__init__"}
)


def imports(module: str) -> dict[str, bool]:
    """What a module imports of the package, and whether it does so when it is itself imported.

    What stands under `if TYPE_CHECKING:` is for type checkers alone.
    """
    found: dict[str, bool] = {}
    python = PACKAGE / f"{module}.py"
    if not python.exists():
        text = (PACKAGE / f"{module}.pyx").read_text()
        return dict.fromkeys(re.findall(r"^\s*(?:from|c?import) pgbgw\.(\w+)", text, re.M), True)

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            at_once = False
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            head, _, rest = (node.module or "").partition(".")
            if head == "pgbgw":
                names = [rest] if rest else [alias.name for alias in node.names]
                for name in names:
                    found[name] = found.get(name, False) or at_once
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "pgbgw" for a in node.names), module
        for child in ast.iter_child_nodes(node):
            visit(child, at_once)

    visit(ast.parse(python.read_text()), True)
    found.pop("__version__", None)
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(MODULES)


def test_the_architecture_page_lists_the_modules_in_the_same_order() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = re.search(r"\| module \| is \|\n(.*?)\n\n", text, re.DOTALL)
    assert table
    cells = [row.split("|")[1] for row in table[1].splitlines()[1:]]
    named = [name.partition(".")[0] for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    modules = [name for name in dict.fromkeys(named) if name in ORDER]
    # Within a row the order is the reader's.
    rows = {name: row for row, cell in enumerate(cells) for name in re.findall(r"`(\w+)", cell)}
    places = {name: ORDER.index(name) for name in modules}
    assert modules
    for one in modules:
        for other in modules:
            if rows[one] < rows[other]:
                assert places[one] < places[other], f"{one} stands above {other} there"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    for name, at_once in imports(module).items():
        if (module, name) in EXCEPTIONS:
            assert not at_once
        else:
            assert ORDER.index(name) < ORDER.index(module), f"{module} imports {name}"


def test_client_side_and_supervisor_side_never_import_each_other() -> None:
    for one, other in (
        (CLIENT_SIDE, SUPERVISOR_SIDE),
        (CLIENT_SIDE, WORKER_SIDE),
        (SUPERVISOR_SIDE, CLIENT_SIDE),
    ):
        for module in one:
            met = imports(module).keys() & set(other)
            assert not met, f"{module} imports {met}"


@pytest.mark.parametrize(
    ("loaded", "absent"),
    [
        ("client", [*WORKER_SIDE, *SUPERVISOR_SIDE, "supervisor", "config"]),
        ("_serve", [*CLIENT_SIDE, "_database", "supervisor", "config"]),
        ("_child", [*CLIENT_SIDE, *SUPERVISOR_SIDE, "_slots", "_runtime", "supervisor"]),
    ],
)
def test_no_process_loads_what_is_the_others(loaded: str, absent: list[str]) -> None:
    code = f"import sys, pgbgw.{loaded}; print(*(m for m in sys.modules if m[:6] == 'pgbgw.'))"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert f"pgbgw.{loaded}" in found
    assert not {f"pgbgw.{name}" for name in absent} & set(found)
