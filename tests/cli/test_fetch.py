"""``tl-sparse fetch``."""

from pathlib import Path

import pytest

from tl_sparse import cli
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage import hub


def test_a_model_is_fetched_to_the_cache_or_a_folder(container, tmp_path, capsys):
    base, _, _ = container
    cli.main(["fetch", "csp_yolo2", "--base-url", base])
    place = Path(capsys.readouterr().out.strip())
    assert place.is_relative_to(tmp_path / "cache")
    assert (place / "final_model.pt").is_file()
    cli.main(["fetch", "csp_yolo2", "--base-url", base, "--out", str(tmp_path / "here")])
    assert SparseTransformer.from_openai(tmp_path / "here").tokenizer is not None


def test_the_list(container, capsys):
    base, _, handler = container
    cli.main(["fetch", "--list"])
    told = capsys.readouterr().out
    assert "csp_yolo1" in told
    assert "on_server" not in told
    assert not handler.asked
    cli.main(["fetch", "--list", "--online", "--base-url", base])
    assert "beeg_config.json, final_model.pt" in capsys.readouterr().out


def test_a_model_of_the_hub(monkeypatch, tmp_path, capsys):
    def snapshot(repo_id, revision, allow_patterns):
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path / f"{repo_id}@{revision}".replace("/", "_"))

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    cli.main(["fetch", "hf:openai/circuit-sparsity@main"])
    assert capsys.readouterr().out.strip().endswith("openai_circuit-sparsity@main")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which model to fetch; --list says which there are"),
        (["frobnicate"], "neither a folder here nor a released model"),
        (["hf:a/b", "--out", "x"], "stays in the Hub's cache"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["fetch", *arguments])
