"""Every public result is one line in a console and a table or a picture in a notebook."""

import ast
import dataclasses
import re

import pytest
import torch

from tests.rooms import PACKAGE

NOT_PUBLIC = {"cli", "storage", "views"}
MANY = re.compile(r"Tensor|DataFrame|ndarray|Mapping|Module|Model|Circuit|Task\b|Prompts|dict\[")
GIVEN = {"AblationKind", "Check", "Custom", "Intervention", "Measure", "NodeIndex", "Splice"}
"""Public classes without a display: what users write down for a function to use, hooks,
and the parts of a result that has one."""
OTHERS = ("studies/demo.py", "studies/pair_config.py", "studies/grid/results.py")
"""Files with results that no room's ``__init__`` names."""


def named(path):
    """Modules and names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("tl_sparse.").replace(".", "/")
            yield from ((PACKAGE / module, alias.name) for alias in node.names)


def public_classes():
    """The classes that rooms' ``__init__`` and the package's face name, read from the source: to
    import them all would take half a minute."""
    rooms = [p for p in PACKAGE.glob("*/__init__.py") if p.parent.name not in NOT_PUBLIC]
    wanted: dict = {PACKAGE / other: None for other in OTHERS}
    for path in (*rooms, PACKAGE / "__init__.pyi"):
        for module, name in named(path):
            file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else None
            if file is not None and wanted.setdefault(file, set()) is not None:
                wanted[file].add(name)
    for file, names in wanted.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (names is None or node.name in names):
                yield node


def holds_much(node):
    """Whether objects of a dataclass hold arrays, tables, models, or results of those."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return False
    fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return "to_dataframe" in methods or any(MANY.search(ast.unparse(f)) for f in fields)


def test_every_public_result_has_a_display():
    found = [node for node in public_classes() if holds_much(node)]
    assert len(found) > 70
    assert {node.name for node in found} >= {"Circuit", "FaithfulnessReport", "ActivationMeans"}
    lacking = {}
    for node in found:
        methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        if node.name not in GIVEN and (lacks := {"__repr__", "_repr_html_"} - methods):
            lacking[node.name] = lacks
    assert lacking == {}


@pytest.fixture(scope="module")
def results():
    """Results of many kinds, of one small model."""
    from tl_sparse import ablation, analyses, circuits, ground_truth, heads, nodes, tasks
    from tl_sparse.sparsity.weight_masks import WeightMasks

    truth = ground_truth.quote_closing()
    model, task = truth.model, truth.task
    batch = task.batch(4, split="held_out", seed=0)
    circuit = truth.circuit()
    tokens = batch.tokens[:, : int(batch.last.min()) + 1]
    prompts = nodes.prompts_of(model, batch)
    pairs = heads.PromptPairs(prompts, prompts)
    sources = ablation.resample_sources(model, tokens)
    return (
        truth, task, batch, circuit, truth.means, sources, prompts, pairs,
        ground_truth.recovery(truth, circuit.kept), tasks.evaluate_task(model, task, 4),
        tasks.TaskTable({}, {"some": "<no>"}), circuits.ablation_importance(
            model, batch, circuit.index, truth.means.values, keep=circuit.kept
        ),
        circuits.node_activations(circuit, model, batch.tokens), WeightMasks.top_k(model, 0.5),
        analyses.residual_kurtosis(model, tokens),
        nodes.top_examples(model, tokens, circuit.nodes["name"].tolist(), k=2, progress=False),
        nodes.NodeGraph.of(model), circuits.compile_circuit(circuit, model, batch),
    )  # fmt: skip


def test_a_result_is_one_line_and_escaped_html(results):
    assert len({type(result) for result in results}) >= 15
    for result in results:
        line = repr(result)
        assert "\n" not in line, line
        assert 10 < len(line) < 700, line
        html = result._repr_html_()
        assert html.startswith("<div")
        assert "tensor(" not in html
        assert "<no>" not in html


def test_a_result_that_is_no_table_is_shown_field_by_field():
    from tl_sparse.views.display import fields_html

    @dataclasses.dataclass(frozen=True)
    class Found:
        """What was <found>.

        More of it.
        """

        values: torch.Tensor
        name: str
        inner: int = dataclasses.field(default=1, repr=False)

    html = fields_html(Found(torch.zeros(3, 4), "<b>"))
    assert "<b>Found</b> · What was &lt;found&gt;.<" in html
    assert "float32[3, 4]" in html
    assert "&#x27;&lt;b&gt;" in html or "'&lt;b&gt;'" in html
    assert "inner" not in html
