"""Tests of studies/language_model/ablation.py: every ablation changes only the named mechanism; losses are paired by seed."""

import json
from pathlib import Path

import ablation as ablation_script
import pytest
import torch
from ablation import ABLATIONS, FULL_MODEL, Ablation, Row, ablated_maker
from accelerate.state import AcceleratorState
from helpers import fire_easily, make_text, write_config
from nordlm.data.tokenizer import train_tokenizer
from nordlm.training.settings import read_config
from study_cli import markdown_table, spread

from nord_snn.layers import LeakyClamp
from nord_snn.monitor import SpikeMonitor

DOCS = Path(__file__).parents[2] / "docs"
ALL_ABLATIONS = [(block, ablation) for block, (_, ablations) in ABLATIONS.items() for ablation in ablations]


@pytest.fixture(autouse=True)
def _reset_accelerator():
    """Reset the process-wide state of accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text()], 300)


@pytest.fixture
def settings(tmp_path):
    return read_config(str(write_config(tmp_path, block="spike_fed", refractory_steps=0, surrogate="sigmoid")))


def build(settings, tokenizer, block, ablation):
    """Return a model with an ablation and with thresholds so low that its neurons fire."""
    torch.manual_seed(0)
    model = ablated_maker(ABLATIONS[block][0], ablation)(settings, tokenizer).eval()
    fire_easily(model)
    return model


@pytest.mark.parametrize(("block", "ablation"), ALL_ABLATIONS, ids=lambda value: getattr(value, "description", value))
def test_every_ablation_changes_the_output_and_all_its_parameters_get_gradients(settings, tokenizer, block, ablation):
    ids = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
    changed = build(settings, tokenizer, block, ablation)
    with ablation.learner(changed) as after_step:
        before = {name: p.clone() for name, p in changed.named_parameters()}
        loss = changed(input_ids=ids, labels=ids).loss
        loss.backward()
        after_step(loss.item() + 1)  # sets the baseline of the reward
        changed(input_ids=ids)
        after_step(loss.item())
    changed_by_stdp = {name for name, p in changed.named_parameters() if not torch.equal(p, before[name])}
    if ablation.mechanism == "STDP":
        assert changed_by_stdp == {"blocks.0.up.weight" if block == "spike-fed" else "blocks.0.ffn.down.weight"}
        return
    assert not changed_by_stdp
    full_model = build(settings, tokenizer, block, FULL_MODEL)
    if "clamp_floor" in ablation.changes:  # no value of so small a model is below the floor
        assert (
            changed.blocks[0].clamp.floor[0] == ablation.changes["clamp_floor"] != full_model.blocks[0].clamp.floor[0]
        )
        return
    shared = {
        n: p
        for n, p in changed.state_dict().items()
        if getattr(full_model.state_dict().get(n), "shape", None) == p.shape
    }
    for name, parameter in changed.named_parameters():
        if not parameter.requires_grad:  # fixed by the ablation
            del shared[name]
    full_model.load_state_dict(shared, strict=False)
    full_loss = full_model(input_ids=ids, labels=ids).loss
    full_loss.backward()
    gradients = [model.encoder.projection.weight.grad for model in (full_model, changed)]
    assert full_loss != loss or (ablation.mechanism == "surrogate" and not torch.equal(*gradients))
    without_gradient = [n for n, p in changed.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == []


def test_ablations_remove_or_add_the_part_in_their_description(settings, tokenizer):
    def has(block, description, layer_class):
        (ablation,) = (a for a in ABLATIONS[block][1] if a.description == description)
        return any(isinstance(module, layer_class) for module in build(settings, tokenizer, block, ablation).modules())

    assert not has("recency", "no clamp", LeakyClamp)
    assert has("recency", "clamp on what is added, not on the stream", LeakyClamp)
    assert not any(isinstance(m, LeakyClamp) for m in build(settings, tokenizer, "spike-fed", FULL_MODEL).modules())
    assert has("spike-fed", "published clamp on the stream", LeakyClamp)
    for block in ("recency", "spike-fed"):
        (constant,) = (a for a in ABLATIONS[block][1] if a.description == "the same current at every step")
        x = torch.randn(2, 16)
        currents, of_full_model = (build(settings, tokenizer, block, a).encoder(x) for a in (constant, FULL_MODEL))
        assert currents.std().item() == pytest.approx(of_full_model.mean(0).std().item(), rel=0.1)
        assert torch.equal(currents, currents[:1].expand_as(currents))
        assert len(currents) == (10 if block == "recency" else 4)


@pytest.mark.parametrize("block", ABLATIONS)
def test_with_recency_alone_queries_and_keys_have_no_effect(settings, tokenizer, block):
    (alone,) = (a for a in ABLATIONS[block][1] if a.description == "recency alone, no coincidences")
    ids = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
    for ablation, unchanged in ((FULL_MODEL, False), (alone, True)):
        model = build(settings, tokenizer, block, ablation)
        before = model(input_ids=ids).logits
        model.blocks[0].resonance.q_proj.weight.data.mul_(-1)
        assert torch.equal(model(input_ids=ids).logits, before) is unchanged
        model.blocks[0].resonance.recency_log.data.add_(1)
        assert not torch.equal(model(input_ids=ids).logits, before)


def test_a_clamped_residual_stream_is_never_below_its_floor(settings, tokenizer):
    (clamped,) = (a for a in ABLATIONS["spike-fed"][1] if a.description == "published clamp on the stream")
    model, minima = build(settings, tokenizer, "spike-fed", clamped), []
    model.stream_norm.register_forward_pre_hook(lambda _, inputs: minima.append(inputs[0].min()))
    model(input_ids=torch.randint(50, (3, 10)))
    assert minima[0] >= -0.1


def test_the_ablation_with_the_opposite_reward_reverses_the_weight_changes(settings, tokenizer):
    ids, changes = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0)), []
    stdp = [a for a in ABLATIONS["spike-fed"][1] if a.mechanism == "STDP"][1:]
    for ablation in stdp:
        model = build(settings, tokenizer, "spike-fed", ablation)
        before = model.blocks[0].up.weight.clone()
        with ablation.learner(model) as after_step:
            for loss in (5.0, 4.0):
                model(input_ids=ids)
                after_step(loss)
            assert model.blocks[0].up._forward_hooks or model.blocks[0].up._forward_pre_hooks
        changes.append(model.blocks[0].up.weight - before)
        assert not model.blocks[0].up._forward_hooks
        with SpikeMonitor(model):
            model(input_ids=ids)
    assert changes[0].abs().sum() > 0
    assert torch.allclose(changes[0], -changes[1], atol=1e-7)


def test_the_table_counts_diverged_runs_and_leaves_them_out_of_means():
    def runs(*losses):
        return {s: {"diverged": loss is None, "loss": loss, "firing_rates": {}} for s, loss in enumerate(losses)}

    full_model = runs(4.0, 4.1, None)
    rows = [
        Row("recency", Ablation("clamp", "a change"), ablated, full_model)
        for ablated in (runs(4.3, None, 4.0), runs(None, None, None))
    ]
    assert [line[2:4] for line in ablation_script.ablation_table(rows, "recency")[1:]] == [
        ["4.150 (4.000 to 4.300), 1 of 3 diverged", "+0.300"],
        ["3 of 3 diverged", ""],
    ]


def test_the_command_writes_a_table_of_its_runs_and_continues_only_with_the_same_settings(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": make_text(300, seed)}) + "\n" for seed in range(20)))
    config, out = write_config(tmp_path, block="spike_fed", steps=3), tmp_path / "out"
    arguments = ["--config", str(config), "--data", str(text), "--seeds", "0", "1", "--out", str(out)]
    arguments += ["--blocks", "spike-fed", "--only", "cascade"]
    assert ablation_script.main(arguments) == 0
    runs = [json.loads(path.read_text()) for path in (out / "runs").glob("*.json")]
    loss = {(run["kind"], run["seed"]): run["loss"] for run in runs}
    assert len(loss) == 4
    differences = [loss["spike-fed: no cascade", s] - loss["spike-fed: the whole model", s] for s in (0, 1)]
    assert sorted(map(json.dumps, runs)) == sorted((out / "runs.jsonl").read_text().splitlines())
    table = (out / "table.md").read_text()
    assert "| cascade | no cascade | " in table
    assert f" | {spread(differences, '{:+.3f}'.format)} | " in table
    assert "ablation.py --config" in table
    assert "no cascade" in capsys.readouterr().out
    assert ablation_script.main([*arguments, "--blocks", "recency", "--steps", "9"]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_without_norms_queries_and_keys_are_silent_before_training_and_in_the_stored_runs(tokenizer):
    (bare,) = (a for a in ABLATIONS["spike-fed"][1] if a.description == "no norms behind linear maps and mixing")
    lines = (DOCS / "runs" / "ablation.jsonl").read_text().splitlines()
    trained = [run["firing_rates"] for run in map(json.loads, lines) if run["kind"] == f"spike-fed: {bare.description}"]
    assert len(trained) == 3
    for ablation, silent in ((FULL_MODEL, False), (bare, True)):
        torch.manual_seed(0)
        model = ablated_maker(ABLATIONS["spike-fed"][0], ablation)(read_config("tiny"), tokenizer)
        with SpikeMonitor(model) as monitor, torch.no_grad():
            model(input_ids=torch.randint(len(tokenizer), (2, 64)))
        for rates in (monitor.rates(), *(trained if silent else [])):
            query_and_key_rates = [rate for layer, rate in rates.items() if layer.endswith(("lif_q", "lif_k"))]
            assert len(query_and_key_rates) == 4
            assert all((rate == 0) is silent for rate in query_and_key_rates)


def test_results_md_has_the_tables_of_the_stored_runs():
    runs: dict[str, dict[int, dict]] = {}
    for line in (DOCS / "runs" / "ablation.jsonl").read_text().splitlines():
        run = json.loads(line)
        runs.setdefault(run["kind"], {})[run["seed"]] = run
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for block, (_, ablations) in ABLATIONS.items():
        full_model = runs[f"{block}: {FULL_MODEL.description}"]
        rows = [Row(block, a, runs.pop(f"{block}: {a.description}"), full_model) for a in (FULL_MODEL, *ablations)]
        assert markdown_table(ablation_script.ablation_table(rows, block)) in page
    assert not runs
