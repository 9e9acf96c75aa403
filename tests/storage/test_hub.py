"""Names of models: folders, bundled models, hub ids; uploads and downloads without a network."""

import inspect

import huggingface_hub
import pytest

from tl_sparse.checkpoints.packed import training_record
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage import hub
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.hub import bundled_models, is_repo_id


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def package(tmp_path, monkeypatch, small_model):
    """A stand-in for the installed package, with two bundled models; returns them by name."""
    models = {"one": small_model("plain"), "two": small_model("tied")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "package" / "bundled" / name)
    (tmp_path / "package" / "bundled" / "notes").mkdir()
    monkeypatch.setattr(hub, "files", lambda name: tmp_path / "package")
    return models


# --------------------------------------------------------------------------------------------------
# names


def test_bundled_models_are_found_by_name(package):
    assert bundled_models() == ("one", "two")
    for name, model in package.items():
        assert fingerprint(SparseTransformer.from_pretrained(name)) == fingerprint(model)
        assert training_record(name) is None


def test_a_folder_of_that_name_comes_first(package, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = small_model("sinks")
    mine.save_pretrained("one")
    assert fingerprint(SparseTransformer.from_pretrained("one")) == fingerprint(mine)


@pytest.mark.parametrize("name", ["three", "notes", "", "/a/b", "../x", "a/b/c", "owner/", "o/-x"])
def test_an_unknown_name_names_the_bundled_models(package, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "package" / "bundled" / "notes")
    assert not is_repo_id(name)
    with pytest.raises(FileNotFoundError, match="bundled models: one, two; a model on the hub"):
        SparseTransformer.from_pretrained(name or "nothing")


def test_every_bundled_model_of_the_package_loads():
    for name in bundled_models():
        assert SparseTransformer.from_pretrained(name).tokenizer is not None


def test_a_revision_is_of_the_hub_only(package):
    with pytest.raises(ValueError, match="only models on the hub have revisions"):
        SparseTransformer.from_pretrained("one", revision="main")


# --------------------------------------------------------------------------------------------------
# download


def test_an_id_that_is_not_in_the_cache_is_one_clear_error_offline(package):
    with pytest.raises(
        FileNotFoundError, match=r"owner/name at revision v1 is no folder here.*one"
    ):
        SparseTransformer.from_pretrained("owner/name", revision="v1")


def test_a_download_fetches_what_is_read_and_nothing_else(small_model, tmp_path, monkeypatch):
    model = small_model()
    model.save_pretrained(tmp_path / "cached")
    asked = {}

    def snapshot(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=set(allow_patterns))
        return str(tmp_path / "cached")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert fingerprint(
        SparseTransformer.from_pretrained("owner/name", revision="abc")
    ) == fingerprint(model)
    assert asked == {
        "repo_id": "owner/name",
        "revision": "abc",
        "allow_patterns": {
            "config.json", "model.safetensors", "README.md", "tokenizer.json",
            "tokenizer_config.json",
        },
    }  # fmt: skip
    inspect.signature(huggingface_hub.snapshot_download).bind(**asked)


# --------------------------------------------------------------------------------------------------
# upload


class FakeHub:
    """Takes the place of HfApi; ``pushed`` holds what was uploaded."""

    def __init__(self):
        self.pushed, self.calls = {}, {}

    def __call__(self, token=None):
        self.calls["token"] = token
        return self

    def create_repo(self, **options):
        self.calls["create_repo"] = options
        return type("Url", (), {"repo_id": options["repo_id"]})

    def upload_folder(self, *, folder_path, **options):
        self.calls["upload_folder"] = options
        self.pushed = contents(folder_path)
        return "https://huggingface.co/owner/name/commit/1"


@pytest.fixture
def fake_hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", fake)
    return fake


@pytest.mark.parametrize("card", [None, "# A card"])
def test_what_is_uploaded_is_what_is_saved(small_model, make_tokenizer, tmp_path, fake_hub, card):
    model = small_model(tokenizer=make_tokenizer())
    address = model.push_to_hub(
        "owner/name", card=card, private=True, token="secret", commit_message="first"
    )
    assert address == "https://huggingface.co/owner/name/commit/1"
    model.save_pretrained(tmp_path / "model", card=card)
    assert fake_hub.pushed == contents(tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fake_hub.pushed)
    assert ("README.md" in fake_hub.pushed) == (card is not None)
    assert fake_hub.calls["token"] == "secret"
    assert fake_hub.calls["create_repo"]["private"] is True
    assert fake_hub.calls["upload_folder"]["commit_message"] == "first"
    assert fake_hub.calls["upload_folder"]["repo_id"] == "owner/name"
    stale = {"tokenizer.json", "tokenizer_config.json"}  # where they are not uploaded anew
    assert set(fake_hub.calls["upload_folder"]["delete_patterns"]) == stale


def test_unknown_upload_options_are_refused(small_model, fake_hub):
    with pytest.raises(TypeError, match="config"):
        small_model().push_to_hub("owner/name", config={})
    assert not fake_hub.calls


def test_the_mixin_is_not_among_the_models_bases():
    """Its loading is lenient, and its constructor would look into every argument."""
    assert not issubclass(SparseTransformer, huggingface_hub.ModelHubMixin)
