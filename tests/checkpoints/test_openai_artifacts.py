import math

import pytest

from tl_sparse.checkpoints.openai_artifacts import train_curves


@pytest.fixture
def curves(tmp_path):
    def write(text):
        (tmp_path / "progress.json").write_text(text)
        return tmp_path / "progress.json"

    return write


def test_a_row_a_line_and_a_column_a_metric(curves):
    path = curves(
        '{"step": 0, "test_xent": 7.6, "L0": 930000}\n\n'
        '{"step": 100, "test_xent": NaN, "num_alive_neurons/c_fc/layer_0": 12, "note": "x"}\n'
    )
    for place in (path, str(path), path.parent):
        frame = train_curves(place)
        assert list(frame) == ["step", "test_xent", "L0", "num_alive_neurons/c_fc/layer_0", "note"]
        assert frame["step"].tolist() == [0, 100]
        assert frame["test_xent"][0] == 7.6
        assert math.isnan(frame["test_xent"][1])
        assert math.isnan(frame["L0"][1])
        assert frame["num_alive_neurons/c_fc/layer_0"][1] == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ('{"a": 1}\n[2]\n', "line 2 must be an object of metrics"),
        ('{"a": 1}\n{"a": 1', "line 2 is no valid JSON"),
        ('{"a": [1]}\n', "line 1: 'a' is no number"),
        ('{"a": 1, "a": 2}\n', "the key 'a' is there twice"),
    ],
)
def test_broken_curves_are_named_by_their_line(curves, text, message):
    with pytest.raises(ValueError, match=message):
        train_curves(curves(text))


def test_lines_that_share_no_metric_are_no_table_without_end(curves, monkeypatch):
    monkeypatch.setattr("tl_sparse.checkpoints.openai_artifacts.MAX_CELLS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 numbers"):
        train_curves(curves("".join(f'{{"m{i}": 1}}\n' for i in range(50))))


def test_curves_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"progress\.json is missing"):
        train_curves(tmp_path)


def test_curves_are_found_by_the_models_name(container):
    base, root, _ = container
    (root / "train_curves" / "csp_yolo2").mkdir(parents=True)
    (root / "train_curves" / "csp_yolo2" / "progress.json").write_text('{"step": 3}\n')
    for place in ("csp_yolo2", "train_curves/csp_yolo2", "train_curves/csp_yolo2/progress.json"):
        assert train_curves(place, progress=False, base_url=base)["step"].tolist() == [3]
    with pytest.raises(FileNotFoundError, match="did you mean csp_yolo2"):
        train_curves("csp_yola2")
    assert train_curves(f"{base}/train_curves/csp_yolo2", progress=False)["step"].tolist() == [3]
