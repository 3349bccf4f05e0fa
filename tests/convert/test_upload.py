"""`bestrq2 push` with the real client against a local stand-in for the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READER, TOKEN, hub_server
from huggingface_hub import constants
from safetensors.torch import load

from bestrq2 import cli
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining


@pytest.fixture(scope="module")
def model(tiny_pretraining) -> BestRQ2ForPreTraining:
    return tiny_pretraining()


@pytest.fixture(scope="module")
def source(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("somewhere private") / "source"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Points the hub's client in this process somewhere; HF_HUB_OFFLINE, which tests are run under, is lifted."""

    def point(url: str, token: str, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()

    yield point
    huggingface_hub.close_session()


def test_a_pushed_model_is_the_source_with_its_card(model, source, client, capsys):
    with hub_server() as hub:
        client(hub.url, TOKEN)
        assert cli.run(["push", str(source), "user/my-encoder", "--private", "--license", "mit"]) == 0
        assert capsys.readouterr().out.strip() == f"{hub.url}/user/my-encoder"
        assert cli.run(["push", str(source), "user/my-encoder", "--revision", "v2", "--with-predictor"]) == 0
    repository = hub.repositories["user/my-encoder"]
    assert repository["private"]
    assert hub.commits == ["Upload by bestrq2 push"] * 2
    files = repository["branches"]["main"]
    assert {"config.json", "preprocessor_config.json", "modeling_bestrq2.py", "README.md"} < files.keys()
    weights = load(files["model.safetensors"])
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(weights[name], value), name
    assert weights.keys() == model.base_model.state_dict().keys()
    card = files["README.md"].decode()
    assert 'bestrq2.load("user/my-encoder")' in card
    assert "license: mit" in card
    assert not any(b"somewhere private" in content for content in files.values())
    assert "head.weight" in load(repository["branches"]["v2"]["model.safetensors"])
    assert "license: " not in repository["branches"]["v2"]["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "token", "code", "said"),
    [
        ("user/model", "", 2, "user/model: there is no token for the hub; run `hf auth login` or set HF_TOKEN"),
        ("user/model", "hf_wrong", 2, "user/model: the token is not valid (the hub answered 401: Invalid username"),
        (
            "user/model",
            READER,
            2,
            "user/model: the token may not write there (the hub answered 403: You don",
        ),
        (
            "other/model",
            TOKEN,
            2,
            "other/model: the token may not write there (the hub answered 403: You don",
        ),
        ("broken/model", TOKEN, 1, "broken/model: the hub failed (the hub answered 500: Internal Error"),
        ("model", TOKEN, 2, "'model' is not a name on the hub: it lacks its owner; write USER/model"),
        ("user/mo del", TOKEN, 2, "'user/mo del' is not a name on the hub ("),
        ("a/b/c", TOKEN, 2, "'a/b/c' is not a name on the hub ("),
    ],
)
def test_refusals_of_the_hub_are_errors_of_one_sentence(source, client, capsys, name, token, code, said):
    with hub_server() as hub:
        client(hub.url, token)
        assert cli.run(["push", str(source), name]) == code
    output = capsys.readouterr()
    assert output.err.startswith(f"bestrq2 push: {said}"), output.err
    assert len(output.err.splitlines()) == 1
    assert not output.out
    assert not hub.repositories


def test_an_unknown_licence_is_an_error_of_one_sentence(source, client, capsys):
    with hub_server() as hub:
        client(hub.url, TOKEN)
        assert cli.run(["push", str(source), "user/model", "--license", "sold"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bestrq2 push: user/model: the hub refuses the model card (")
    assert '"license" must be one of [apache-2.0, mit, ...]' in said
    assert not hub.commits


def test_an_unreachable_hub_is_an_error_of_one_sentence(source, client, capsys):
    client("http://127.0.0.1:9", TOKEN)
    assert cli.run(["push", str(source), "user/model"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bestrq2 push: user/model: http://127.0.0.1:9 cannot be reached (")
    assert len(said.splitlines()) == 1
    client("http://127.0.0.1:9", TOKEN, offline=True)
    assert cli.run(["push", str(source), "user/model"]) == 2
    assert "offline (HF_HUB_OFFLINE is set); unset it" in capsys.readouterr().err
