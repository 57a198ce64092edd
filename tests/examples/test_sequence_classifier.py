"""Tests of examples/sequence_classifier: kinds of attention, split of the data by modules, and learning."""

import pytest
import sequence_classifier as script
import torch


def test_positions_depend_on_each_other_in_each_kind_but_none():
    x = torch.randint(0, 2000, (3, 32))
    for name, make in script.KINDS.items():
        torch.manual_seed(0)
        net = script.Classifier(5, make).eval()
        assert net(x).shape == (3, 5)
        kinds = {type(layer.self_attn).__name__ for layer in net.encoder.layers}
        assert len(kinds) == 1
        changed = x.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 2000
        encoded = [net.encoder(net.words(ids) + net.positions) for ids in (x, changed)]
        unchanged = [k for k in range(32) if k != 7]
        depends_on_position_7 = not torch.allclose(encoded[0][:, unchanged], encoded[1][:, unchanged])
        assert depends_on_position_7 is (name != "no attention")


@pytest.mark.quick
def test_resonance_attends_in_both_directions():
    torch.manual_seed(0)
    attention = script.ResonanceAttention(16, 2)
    x = 3 * torch.randn(2, 6, 16)
    first, _ = attention(x, x, x, need_weights=False)
    changed = x.clone()
    changed[:, 5] += 3
    second, _ = attention(changed, changed, changed)
    assert first.shape == x.shape
    assert not torch.allclose(first[:, 0], second[:, 0])


def test_masks_raise():
    x = torch.randn(2, 6, 16)
    attention = script.ResonanceAttention(16, 2)
    for mask in ("attn_mask", "key_padding_mask"):
        with pytest.raises(ValueError, match="takes no masks"):
            attention(x, x, x, **{mask: torch.zeros(2, 6)})


def test_passages_have_equal_length_and_modules_are_not_split():
    data = script.documentation()
    assert data.train_x.shape[1] == data.test_x.shape[1] == 32
    assert len(data.train_x) > 1000
    assert len(data.test_x) > 200
    assert set(data.train_y.tolist()) == set(range(len(data.names)))
    assert data.train_x.max() < script.VOCABULARY


def test_training_learns_and_the_script_prints_a_table(tmp_path, capsys, monkeypatch):
    data = script.documentation()
    subset = data.train_x[::10], data.train_y[::10]
    small = script.Data(*subset, *subset, data.names)  # test on training passages; learning held-out text takes longer
    monkeypatch.setattr(script, "documentation", lambda: small)
    monkeypatch.setattr(script, "KINDS", {"co-firing resonance": script.KINDS["co-firing resonance"]})
    accuracy, rates = script.train(script.KINDS["co-firing resonance"], 0, 15, small)
    assert accuracy > small.test_y.bincount().max() / len(small.test_y) + 0.3
    assert all(0 < rate < 1 for rate in rates.values())
    assert script.main(["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "co-firing resonance" in capsys.readouterr().out
    assert (tmp_path / "sequence_classifier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        script.main(["--epochs", "0"])
