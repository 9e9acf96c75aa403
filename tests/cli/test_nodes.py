import pytest

from tl_sparse import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.conformance.models import build

    folder = tmp_path_factory.mktemp("model")
    build("paper").save_pretrained(folder / "ours")
    return folder


def test_a_node_s_writers_readers_traces_and_tokens_are_printed(capsys, folder):
    cli.main(["nodes", str(folder / "ours"), "0.mlp.resid_delta:3", "-k", "9", "--depth", "2"])
    told = capsys.readouterr().out
    assert "Writers: 25 weights, the 9 largest" in told  # 24 neurons and a bias
    assert "Readers: 126 weights, the 9 largest" in told  # 3 x 24 + 24 + 30 logits
    assert "\nTrace back\n0.mlp.resid_delta:3\n  0.mlp.post_act:" in told
    assert "\nTrace forward\n0.mlp.resid_delta:3\n" in told
    assert "Tokens that write the channel" in told
    assert told.count("writes ") == 9


def test_a_neuron_has_no_tokens_and_a_channel_no_trace(capsys, folder):
    cli.main(["nodes", str(folder / "ours"), "0-mlp/3"])
    told = capsys.readouterr().out
    assert "Tokens" not in told
    assert "Trace back" in told
    cli.main(["nodes", str(folder / "ours"), "3", "--k", "2"])
    told = capsys.readouterr().out
    assert "Tokens" in told
    assert "Trace" not in told
    assert "channel:3" in told
    cli.main(["nodes", str(folder / "ours"), "0.attn.q:3", "--depth", "0"])
    told = capsys.readouterr().out
    assert "Readers: 0 weights\n  (none)" in told
    assert "Trace" not in told


def test_a_name_that_is_none_is_one_line(folder):
    with pytest.raises(SystemExit) as stop:
        cli.main(["nodes", str(folder / "ours"), "4.attn.foo:1"])
    assert "tl-sparse: '4.attn.foo:1': layer 4 has no 'attn.foo'" in str(stop.value)


def test_a_folder_in_openai_s_format_is_read(capsys, tmp_path):
    from tests.conformance.models import build

    build("plain").to_openai(tmp_path / "released", with_tokenizer=False)
    cli.main(["nodes", str(tmp_path / "released"), "1.mlp.act_in:3", "-k", "1", "--depth", "0"])
    assert "1.mlp.act_in:3" in capsys.readouterr().out
