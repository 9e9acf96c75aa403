"""Pruning finds a planted circuit, node by node, in a fifth of its default steps."""

from tl_sparse import ground_truth
from tl_sparse.circuits import PruningConfig, prune


def test_pruning_finds_exactly_the_planted_circuit():
    model = ground_truth.quote_closing(distractors=27)
    config = PruningConfig(
        headroom=0.0, steps=60, batch_pairs=4, selection_pairs=16, report_pairs=16
    )
    circuit = prune(model.model, model.task, config, means=model.means, progress=False)
    assert ground_truth.recovery(model, circuit.kept).exact, ground_truth.recovery(
        model, circuit.kept
    )
    assert (circuit.n_nodes, circuit.n_edges) == (12, 9)
    assert circuit.accuracy == 1.0
