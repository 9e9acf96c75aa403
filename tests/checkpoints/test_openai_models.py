"""The table of released models, and the server's own list."""

import pandas as pd
import pytest

import tl_sparse as tls
from tl_sparse.checkpoints.openai_models import SWEEP, places, released_name


def test_what_is_known_without_a_network():
    models = tls.openai_models()
    table = models.to_dataframe().set_index("name")
    assert list(table.index) == list(models.names)
    # the Hub states 419.1 M parameters: everything but the buffer final_logits_bias
    assert table.parameters["csp_yolo2"] - 2048 == 419_122_688
    # users report files of 1.68 GB, 47 MB and 35 MB
    assert table.megabytes["csp_yolo2"] == pytest.approx(1680, rel=0.01)
    assert table.megabytes["csp_sweep1_1x_0.9Mnonzero_afrac0.125"] == pytest.approx(47, rel=0.01)
    assert table.megabytes["dense1_1x"] == pytest.approx(35, rel=0.02)
    assert pd.isna(table.parameters["dense1_2x"])
    assert "broken on the server" in table.note["csp_bridges1"]
    assert repr(models).startswith("OpenAIModels(9 released models: csp_yolo1, csp_yolo2")
    assert "csp_bridges2" in models._repr_html_()
    assert "on_server" not in table


def test_what_the_server_lists_page_by_page(container):
    base, root, handler = container
    handler.page = 2
    for name in ("csp_new/final_model.pt", "csp_new/deep/x.pt", "csp_yolo1/beeg_config.json"):
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    models = tls.openai_models(online=True, base_url=base)
    assert models.listed["csp_new"] == {"deep/x.pt": 5, "final_model.pt": 5}
    assert models.names[-1] == "csp_new"
    table = models.to_dataframe().set_index("name")
    size = sum(p.stat().st_size for p in (root / "models" / "csp_yolo2").iterdir())
    assert table.on_server["csp_yolo2"] == pytest.approx(size / 1e6)
    assert table.files["csp_yolo2"] == "beeg_config.json, final_model.pt"
    assert pd.isna(table.on_server["dense1_1x"])
    assert "10 released models, 3 of them on the server" in repr(models)


def test_another_server_is_asked_if_the_first_does_not_answer(container):
    base, _, _ = container
    urls = ["http://127.0.0.1:9/c", base]
    assert list(tls.openai_models(online=True, base_url=urls).listed) == ["csp_yolo2"]
    with pytest.raises(FileNotFoundError, match=r"cannot be listed.*is no http or https address"):
        tls.openai_models(online=True, base_url=["http://127.0.0.1:9/c", "/folder"])


ENTRY = (
    "<Blob><Name>models/a/b</Name><Properties><Content-Length>{}</Content-Length></Properties>"
    "</Blob>"
)
LIST = "<EnumerationResults><Blobs>{}</Blobs><NextMarker>{}</NextMarker></EnumerationResults>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html></html>", "it is a html"),
        ("<EnumerationResults>", "no element found"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><EnumerationResults>&a;</EnumerationResults>',
         "a document type of its own"),
        (LIST.format(ENTRY.format("-1"), ""), "a file 'models/a/b' of '-1' bytes"),
        (LIST.format(ENTRY.format("9" * 5000), ""), "of '9999"),
        (LIST.format("<Blob/>", ""), "a file '' of '' bytes"),
        (LIST.format("", "again"), "leads in a circle"),
        (LIST.format("<Blob><Name>a&#13;b</Name></Blob>", ""), "a file 'a.rb' of"),
        ("\x00", "no list of a container"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_list(container, text, message):
    base, _, handler = container
    handler.raw_list = text
    with pytest.raises(ValueError, match=message):
        tls.openai_models(online=True, base_url=base)


def test_a_list_that_never_ends_is_not_read(container, monkeypatch):
    from tl_sparse.checkpoints import openai_listing

    base, _, handler = container
    monkeypatch.setattr(openai_listing, "MAX_BYTES", 1000)
    handler.raw_list = "<" + "a" * 2000
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        tls.openai_models(online=True, base_url=base)
    monkeypatch.setattr(openai_listing, "MAX_PAGES", 1)
    monkeypatch.setattr(openai_listing, "MAX_BYTES", 1 << 24)
    handler.raw_list, handler.page = None, 1
    with pytest.raises(ValueError, match="more than 1 pages"):
        tls.openai_models(online=True, base_url=base)


def test_from_pretrained_says_who_loads_these(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="one of OpenAI's released models: load it with"):
        tls.SparseTransformer.from_pretrained("csp_bridge1")


def test_names_of_the_sweep():
    assert released_name("csp_sweep1_16x_14.8Mnonzero_afrac1.000")
    assert released_name("csp_sweep1_1x_0.9Mnonzero_afrac0.3") is None
    known = [name for name in tls.openai_models().names if name.startswith("csp_sweep1")]
    assert all(SWEEP.fullmatch(name) for name in known)


def test_where_a_name_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TL_SPARSE_OPENAI_URL", raising=False)
    base = "https://openaipublic.blob.core.windows.net/circuit-sparsity"
    assert places("csp_bridge2") == (f"{base}/models/csp_bridges2",)
    assert places("viz/a/b") == (f"{base}/viz/a/b",)
    assert places("some/folder") == ("some/folder",)
    monkeypatch.setenv("TL_SPARSE_OPENAI_URL", " http://a/x/  /mirror ")
    assert places("own") == ("http://a/x/models/own", "/mirror/models/own")
    assert places("csp_yolo2", "http://b") == ("http://b/models/csp_yolo2",)
    (tmp_path / "csp_yolo2").mkdir()
    assert places("csp_yolo2") == ("csp_yolo2",)
