"""Files are read in storage/ alone, where they are opened with care; read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tl_sparse"
READING = {
    "read_text", "read_bytes", "safe_open", "load_file", "from_file", "memmap", "fromfile",
    "loadtxt", "genfromtxt", "ZipFile", "is_zipfile", "unpack_archive",
}  # fmt: skip
"""Functions and methods that read a file, whoever's they are."""
READING_OF = {
    "json": {"load"}, "torch": {"load"}, "np": {"load"}, "numpy": {"load"}, "pickle": {"load"},
    "sqlite3": {"connect"}, "os": {"open", "fdopen"}, "io": {"open"}, "mmap": {"mmap"},
    "Tokenizer": {"from_str"}, "AutoTokenizer": {"from_pretrained"},
    "PreTrainedTokenizerFast": {"from_pretrained"},
}  # fmt: skip
"""The same, of these modules and classes."""


def root(node: ast.AST) -> str:
    """The name that a chain of attributes and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def reads(tree: ast.AST) -> list[str]:
    """The expressions of a module that read a file in their own way."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            pandas = of in ("pd", "pandas") and node.attr.startswith("read_")
            package = root(node) == "files"  # importlib's: what ships with the package
            named = node.attr in READING or node.attr in READING_OF.get(of, ())
            bad = (named and not package) or pandas
        elif isinstance(node, ast.Name):
            ours = node.id in ("read_text", "read_bytes")  # as names, those of storage
            bad = (node.id in READING and not ours) or node.id == "open"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            mode = node.args[0] if node.args else None
            writes = isinstance(mode, ast.Constant) and str(mode.value)[:1] in ("w", "x")
            # a text that was made in this line, to be as it will be read back, is no file's
            loads = node.func.attr == "loads" and not isinstance(mode, ast.Call)
            opens = node.func.attr == "open" and root(node.func) not in ("os", "io") and not writes
            bad = loads or opens
        else:
            bad = False
        if bad:
            found.append(ast.unparse(node))
    return found


def test_files_are_read_in_storage_alone():
    found = {
        path.relative_to(PACKAGE).as_posix(): wrong
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "storage"
        and (wrong := reads(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}, "use storage.read_file, json_files, tensor_files, torch_files or their like"


@pytest.mark.parametrize(
    "line",
    [
        "open(p)", "p.open()", "p.open('a')", "Path(p).read_text()", "json.load(f)",
        "json.loads(text)", "torch.load(p)", "safe_open(p, 'pt')", "np.memmap(p)", "np.load(p)",
        "Tokenizer.from_file(p)", "pd.read_csv(p)", "partial(sqlite3.connect, p)",
        "np.fromfile(p)", "map(Path.read_bytes, paths)",
    ],
)  # fmt: skip
def test_a_bare_read_is_found(line):
    assert reads(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "files('a').joinpath(n).read_text()",
        "json.loads(json.dumps(x))",
        "p.open('wb')",
        "choose_open(p)",
    ],
)
def test_what_reads_no_file_of_others_is_allowed(line):
    assert not reads(ast.parse(line))
