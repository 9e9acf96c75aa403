import pytest

from tl_sparse import ground_truth
from tl_sparse.circuits import prune


@pytest.mark.parametrize("seed", range(1))
def test_pruning_with_its_defaults_finds_exactly_the_planted_circuit(seed):
    model = ground_truth.quote_closing(distractors=27, seed=seed)
    circuit = prune(model.model, model.task, means=model.means, progress=False)
    assert ground_truth.recovery(model, circuit.kept).exact, ground_truth.recovery(
        model, circuit.kept
    )
    assert (circuit.n_nodes, circuit.n_edges) == (12, 9)
    assert circuit.accuracy == 1.0
