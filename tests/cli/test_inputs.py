import json

import pytest

from tl_sparse.cli.inputs import check_out, circuit_folder, task_of
from tl_sparse.model.transformer import SparseTransformer


def test_a_task_is_a_name_or_a_file_of_pairs(tmp_path):
    model = SparseTransformer.from_pretrained("python-sparse")
    assert task_of(model, "var_if").name == "var_if"
    rows = [
        {"prompts": [f"{word} = 'a", f'{word} = "a'], "answers": ["'", '"']}
        for word in ("value", "item", "name", "key")
    ]
    path = tmp_path / "closing.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = task_of(model, str(path))
    assert (task.name, task.max_tokens) == ("closing", model.config.n_ctx)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        task_of(model, str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="unknown task 'closing': choose from"):
        task_of(model, "closing")


def test_what_is_there_is_replaced_only_if_that_is_wanted(tmp_path):
    made = ("circuit", "circuit.html")
    check_out(str(tmp_path / "new"), made, False)
    (tmp_path / "notes.txt").touch()
    check_out(str(tmp_path), made, False)
    (tmp_path / "circuit.html").touch()
    with pytest.raises(ValueError, match=r"has circuit\.html already: choose another --out"):
        check_out(str(tmp_path), made, False)
    check_out(str(tmp_path), made, True)
    assert (tmp_path / "circuit.html").exists()


def test_a_circuit_s_folder_is_found_in_what_prune_wrote(tmp_path):
    assert circuit_folder(str(tmp_path)) == tmp_path
    (tmp_path / "circuit").mkdir()
    assert circuit_folder(str(tmp_path)) == tmp_path / "circuit"
    assert circuit_folder(str(tmp_path / "circuit")) == tmp_path / "circuit"
