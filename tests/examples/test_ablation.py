"""Tests of ablation.py: every ablation changes only the named mechanism; losses are compared by seed."""

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
EVERY = [(block, ablation) for block, (_, ablations) in ABLATIONS.items() for ablation in ablations]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text()], 300)


@pytest.fixture
def settings(tmp_path):
    return read_config(str(write_config(tmp_path, block="spike_fed", refractory_steps=0, surrogate="sigmoid")))


def build(settings, tokenizer, block, ablation):
    torch.manual_seed(0)
    model = ablated_maker(ABLATIONS[block][0], ablation)(settings, tokenizer).eval()
    fire_easily(model)
    return model


@pytest.mark.parametrize(("block", "ablation"), EVERY, ids=lambda value: getattr(value, "description", value))
def test_every_ablation_changes_the_model_and_trains(settings, tokenizer, block, ablation):
    ids = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
    changed = build(settings, tokenizer, block, ablation)
    with ablation.learner(changed) as after_step:
        before = {name: p.clone() for name, p in changed.named_parameters()}
        loss = changed(input_ids=ids, labels=ids).loss
        loss.backward()
        after_step(loss.item() + 1)  # which is the baseline
        changed(input_ids=ids)
        after_step(loss.item())
    learned = {name for name, p in changed.named_parameters() if not torch.equal(p, before[name])}
    if ablation.mechanism == "STDP":
        assert learned == {"blocks.0.up.weight" if block == "spike-fed" else "blocks.0.ffn.down.weight"}
        return
    assert not learned
    whole = build(settings, tokenizer, block, FULL_MODEL)
    if "clamp_floor" in ablation.changes:  # which so small a model does not reach
        assert changed.blocks[0].clamp.floor[0] == ablation.changes["clamp_floor"] != whole.blocks[0].clamp.floor[0]
        return
    shared = {
        n: p for n, p in changed.state_dict().items() if getattr(whole.state_dict().get(n), "shape", None) == p.shape
    }
    for name, parameter in changed.named_parameters():
        if not parameter.requires_grad:  # fixed by the ablation
            del shared[name]
    whole.load_state_dict(shared, strict=False)
    before = whole(input_ids=ids, labels=ids).loss
    before.backward()
    gradients = [model.encoder.projection.weight.grad for model in (whole, changed)]
    assert before != loss or (ablation.mechanism == "surrogate" and not torch.equal(*gradients))
    silent = [n for n, p in changed.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_ablations_remove_the_named_part(settings, tokenizer):
    def has(block, says, kind):
        (found,) = (ablation for ablation in ABLATIONS[block][1] if ablation.description == says)
        return any(isinstance(module, kind) for module in build(settings, tokenizer, block, found).modules())

    assert not has("recency", "no clamp", LeakyClamp)
    assert has("recency", "clamp on what is added, not on the stream", LeakyClamp)
    assert not any(isinstance(m, LeakyClamp) for m in build(settings, tokenizer, "spike-fed", FULL_MODEL).modules())
    assert has("spike-fed", "published clamp on the stream", LeakyClamp)
    for block in ("recency", "spike-fed"):
        (constant,) = (a for a in ABLATIONS[block][1] if a.description == "the same current at every step")
        x = torch.randn(2, 16)
        currents, whole = (build(settings, tokenizer, block, a).encoder(x) for a in (constant, FULL_MODEL))
        assert currents.std().item() == pytest.approx(whole.mean(0).std().item(), rel=0.1)
        assert torch.equal(currents, currents[:1].expand_as(currents))
        assert len(currents) == (10 if block == "recency" else 4)


@pytest.mark.parametrize("block", ABLATIONS)
def test_with_recency_alone_queries_and_keys_have_no_effect(settings, tokenizer, block):
    (alone,) = (a for a in ABLATIONS[block][1] if a.description == "recency alone, no coincidences")
    ids = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
    for ablation, same in ((FULL_MODEL, False), (alone, True)):
        model = build(settings, tokenizer, block, ablation)
        before = model(input_ids=ids).logits
        model.blocks[0].resonance.q_proj.weight.data.mul_(-1)
        assert torch.equal(model(input_ids=ids).logits, before) is same
        model.blocks[0].resonance.recency_log.data.add_(1)
        assert not torch.equal(model(input_ids=ids).logits, before)


def test_a_clamped_stream_is_never_below_its_floor(settings, tokenizer):
    (clamped,) = (a for a in ABLATIONS["spike-fed"][1] if a.description == "published clamp on the stream")
    model, seen = build(settings, tokenizer, "spike-fed", clamped), []
    model.stream_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].min()))
    model(input_ids=torch.randint(50, (3, 10)))
    assert seen[0] >= -0.1


def test_the_opposite_reward_reverses_the_weight_changes(settings, tokenizer):
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


def test_diverged_runs_are_counted():
    def runs(*losses):
        return {s: {"diverged": loss is None, "loss": loss, "firing_rates": {}} for s, loss in enumerate(losses)}

    whole = runs(4.0, 4.1, None)
    rows = [
        Row("recency", Ablation("clamp", "a change"), found, whole)
        for found in (runs(4.3, None, 4.0), runs(None, None, None))
    ]
    assert [line[2:4] for line in ablation_script.ablation_table(rows, "recency")[1:]] == [
        ["4.150 (4.000 to 4.300), 1 of 3 diverged", "+0.300"],
        ["3 of 3 diverged", ""],
    ]


def test_the_table_matches_the_runs(tmp_path, capsys):
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
    shown = (out / "table.md").read_text()
    assert "| cascade | no cascade | " in shown
    assert f" | {spread(differences, '{:+.3f}'.format)} | " in shown
    assert "ablation.py --config" in shown
    assert "no cascade" in capsys.readouterr().out
    assert ablation_script.main([*arguments, "--blocks", "recency", "--steps", "9"]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_queries_and_keys_without_norms_are_silent_before_and_after_training(tokenizer):
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
            scored = [rate for layer, rate in rates.items() if layer.endswith(("lif_q", "lif_k"))]
            assert len(scored) == 4
            assert all((rate == 0) is silent for rate in scored)


def test_the_page_has_the_tables_of_the_stored_runs():
    runs: dict[str, dict[int, dict]] = {}
    for line in (DOCS / "runs" / "ablation.jsonl").read_text().splitlines():
        run = json.loads(line)
        runs.setdefault(run["kind"], {})[run["seed"]] = run
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for block, (_, ablations) in ABLATIONS.items():
        whole = runs[f"{block}: {FULL_MODEL.description}"]
        rows = [Row(block, a, runs.pop(f"{block}: {a.description}"), whole) for a in (FULL_MODEL, *ablations)]
        assert markdown_table(ablation_script.ablation_table(rows, block)) in page
    assert not runs
