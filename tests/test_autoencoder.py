"""The autoencoder of `fastsae.sparse_autoencoder`: its weights under that library's names, and its files."""

import sys
from types import ModuleType

import pytest
import torch

from fastsae.errors import ConfigError, RunError
from fastsae.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig


def test_weights_under_the_old_names(tmp_path):
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(n_input_features=5, n_learned_features=7, n_components=2)
    autoencoder = SparseAutoencoder(config, geometric_median_dataset=torch.arange(5.0))
    autoencoder.save(tmp_path / "sae.pt")
    loaded = SparseAutoencoder.load(tmp_path / "sae.pt")
    x = torch.randn(3, 2, 5)
    assert torch.equal(loaded(x).decoded_activations, autoencoder(x).decoded_activations)
    state = torch.load(tmp_path / "sae.pt", weights_only=True)["state_dict"]
    assert state["encoder.weight"].shape == (2, 7, 5) and state["decoder.weight"].shape == (2, 5, 7)
    one = SparseAutoencoder.load(tmp_path / "sae.pt", component_idx=1)
    torch.testing.assert_close(one(x[:, 1]).decoded_activations, autoencoder(x).decoded_activations[:, 1])
    bound = (6 / 5) ** 0.5
    W_e = state["encoder.weight"]
    assert 0.9 * bound < W_e.abs().max() <= bound, "Kaiming over d_in alone"


def test_a_pickle_of_that_library_is_read_when_it_is_trusted(tmp_path, monkeypatch):
    """Written by classes of its names and modules, with a pydantic object's state."""
    module = ModuleType("sparse_autoencoder.autoencoder.model")
    for parent in ("sparse_autoencoder", "sparse_autoencoder.autoencoder"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))

    class SparseAutoencoderState:
        def __getstate__(self):
            return {"__dict__": self.__dict__, "__pydantic_fields_set__": set(), "__pydantic_private__": None}

    class SparseAutoencoderConfigOld(SparseAutoencoderState):
        pass

    for kind, name in (
        (SparseAutoencoderState, "SparseAutoencoderState"),
        (SparseAutoencoderConfigOld, "SparseAutoencoderConfig"),
    ):
        kind.__module__, kind.__qualname__, kind.__name__ = module.__name__, name, name
        setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(
        SparseAutoencoderConfig(n_input_features=5, n_learned_features=7, n_components=2)
    )
    state, config = SparseAutoencoderState(), SparseAutoencoderConfigOld()
    config.n_input_features, config.n_learned_features, config.n_components = 5, 7, 2
    state.config, state.state_dict = config, autoencoder.old_state_dict()
    torch.save(state, tmp_path / "old.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(RunError, match="trust_pickle"):
        SparseAutoencoder.load(tmp_path / "old.pt")
    loaded = SparseAutoencoder.load(tmp_path / "old.pt", trust_pickle=True)
    x = torch.randn(3, 2, 5)
    assert torch.equal(loaded(x).decoded_activations, autoencoder(x).decoded_activations)

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(RunError, match="print, which no checkpoint needs"):
        SparseAutoencoder.load(tmp_path / "evil.pt", trust_pickle=True)


def test_a_file_whose_weights_do_not_fit_is_refused_in_one_line(tmp_path):
    config = SparseAutoencoderConfig(n_input_features=7, n_learned_features=5, n_components=2)
    path = tmp_path / "m.pt"
    SparseAutoencoder(config).save(path)
    good = torch.load(path, weights_only=True)

    def damaged(**changes):
        state = {**good["state_dict"], **changes.pop("state", {})}
        torch.save({"config": {**good["config"], **changes}, "state_dict": state}, path)

    cases = [
        {"state": {"encoder.weight": torch.ones(2, 1, 1)}},
        {"state": {"encoder.bias": torch.ones(2)}},
        {"state": {"decoder.weight": 3}},
        {"n_components": 1},
        {"n_components": 3},
    ]
    for case in cases:
        damaged(**case)
        for component in (None, 0):
            with pytest.raises(RunError, match=r"the weights are not those of [^\n]*$"):
                SparseAutoencoder.load(path, component)
    damaged()
    for component in (2, -1, "0"):
        with pytest.raises(ConfigError, match="has 2 components"):
            SparseAutoencoder.load(path, component)
    for content in (torch.ones(3), [1], None):
        torch.save(content, path)
        with pytest.raises(RunError, match="holds no autoencoder"):
            SparseAutoencoder.load(path)
    path.write_bytes(b"hello")
    for trust in (False, True):
        with pytest.raises(RunError):
            SparseAutoencoder.load(path, trust_pickle=trust)
