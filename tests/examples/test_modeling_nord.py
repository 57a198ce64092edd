"""Tests of NordForCausalLM: checkpoints of the published Nord code, and the interface of transformers."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from convert_original import main
from helpers import DATA, load_reference, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.models.nord.original import load_original, our_name, to_original
from nord_snn.monitor import SpikeMonitor

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "n_clusters": 4,
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "persistent"])
def test_published_checkpoints_give_the_expected_logits(name):
    expected = load_reference(f"{name}_expected")
    model = load_original(DATA / f"{name}_checkpoint.pt")
    assert model.num_parameters() == expected["n_params"]
    with SpikeMonitor(model) as monitor:
        out = model(input_ids=expected["ids"], labels=expected["ids"])
    out.loss.backward()
    assert torch.allclose(out.logits, expected["logits"], atol=1e-5, rtol=0)
    assert out.loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    rates = {name.replace("readout.lif", "readout_lif"): rate for name, rate in monitor.rates().items()}
    assert rates == pytest.approx(expected["lif_rates"], abs=1e-9)
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(expected["grads"])
    for published, gradient in expected["grads"].items():
        assert relative_error(parameters[our_name(published)].grad.reshape(gradient.shape), gradient) < 5e-4, published


@pytest.mark.quick
def test_the_published_size_has_the_exact_number_of_parameters():
    with torch.device("meta"):
        model = NordForCausalLM(NordConfig())
    assert model.num_parameters() == 144_334_525


@pytest.mark.quick
def test_a_converted_folder_loads_with_auto_classes(tmp_path, capsys):
    main([str(DATA / "tiny_checkpoint.pt"), str(tmp_path / "out")])
    assert "25,577 parameters" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, NordForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "out"), NordConfig)
    expected = load_reference("tiny_expected")
    assert torch.allclose(model(input_ids=expected["ids"]).logits, expected["logits"], atol=1e-5, rtol=0)
    with pytest.raises(SystemExit, match="not an empty folder"):
        main([str(DATA / "tiny_checkpoint.pt"), str(tmp_path / "out")])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "persistent"])
def test_to_original_gives_the_published_checkpoint_again(name, tmp_path, capsys):
    main([str(DATA / f"{name}_checkpoint.pt"), str(tmp_path / "folder")])
    main(["--to-original", str(tmp_path / "folder"), str(tmp_path / "back.pt")])
    published, back = load_reference(f"{name}_checkpoint"), torch.load(tmp_path / "back.pt", weights_only=True)
    weights = {key: x for key, x in published["model_state_dict"].items() if not key.endswith("_state")}
    assert back["model_state_dict"].keys() == weights.keys()
    for key, expected in weights.items():
        got = back["model_state_dict"][key]
        assert got.dtype == expected.dtype, key
        assert torch.equal(got, expected), key
    assert back["config"].items() <= (published["config"] | {"persistent_mem": False}).items()
    assert back["config"]["tokenizer_id"] == "meta-llama/Llama-3.2-1B"  # the default: the folder has no tokenizer
    loaded = load_original(tmp_path / "back.pt")
    expected = load_reference(f"{name}_expected")
    assert torch.allclose(loaded(input_ids=expected["ids"]).logits, expected["logits"], atol=1e-5, rtol=0)
    with pytest.raises(SystemExit, match="expected a new file in a folder that exists"):
        main(["--to-original", str(tmp_path / "folder"), str(tmp_path / "back.pt")])


def test_models_that_the_published_code_cannot_express_raise(tmp_path):
    for setting, name in (
        ({"recency": True}, "recency"),
        ({"resonance": False}, "resonance"),
        ({"n_clusters": None}, "n_clusters"),
    ):
        with pytest.raises(ValueError, match=f"does not support {name}"):
            to_original(NordForCausalLM(NordConfig(**{**SMALL, **setting})))
    NordForCausalLM(NordConfig(**SMALL, recency=True)).save_pretrained(tmp_path / "model")
    for source, message in (
        ("model", "does not support recency"),
        ("none", "expected a folder with config.json, model.safetensors and a tokenizer"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["--to-original", str(tmp_path / source), str(tmp_path / "out.pt")])
    with pytest.raises(SystemExit, match="expected a new file in a folder that exists"):
        main(["--to-original", str(tmp_path / "model"), str(tmp_path / "nowhere" / "out.pt")])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"do not fit the configuration \(missing keys: norm.weight\)"):
        main(["--to-original", str(tmp_path / "model"), str(tmp_path / "out.pt")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_saved_folder_loads_with_only_the_library_installed(tmp_path):
    """A new process outside the repository loads it; the model's Python files are in the folder."""
    NordForCausalLM(NordConfig(**SMALL)).save_pretrained(tmp_path / "model")
    code = (
        "from transformers import AutoModelForCausalLM as Auto; "
        f"print(Auto.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True).num_parameters())"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert process.stdout.strip() == str(NordForCausalLM(NordConfig(**SMALL)).num_parameters()), process.stderr


class CodeWhenUnpickled:
    """Object whose unpickling raises SystemError."""

    def __reduce__(self):
        """Return the call that unpickling makes."""
        return (exec, ("raise SystemError('executed')",))


def test_bad_checkpoints_raise_one_sentence_and_execute_nothing(tmp_path):
    good = load_reference("tiny_checkpoint")
    bad = tmp_path / "bad.pt"

    def sentence(content) -> str:
        if isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            torch.save(content, bad)
        with pytest.raises(ValueError, match=r"bad\.pt") as caught:
            load_original(bad)
        return str(caught.value)

    assert "nothing in it was executed" in sentence({"config": CodeWhenUnpickled(), "model_state_dict": {}})
    assert "the file is empty; expected a published checkpoint" in sentence(b"")
    assert "expected a checkpoint" in sentence(b"hello")
    assert "damaged" in sentence((DATA / "tiny_checkpoint.pt").read_bytes()[:5000])
    assert "expected a dictionary with 'config'" in sentence([1, 2])
    missing = copy.deepcopy(good)
    del missing["model_state_dict"]["lm_head.weight"]
    assert "lm_head.weight" in sentence(missing)
    wider = copy.deepcopy(good)
    wider["config"]["d_model"] = 64
    assert "expected tensors that fit the configuration" in sentence(wider)
    for field, value in (("tau_mem", 1), ("n_heads", 0), ("d_model", "64")):
        wrong = copy.deepcopy(good)
        wrong["config"][field] = value
        assert "expected tensors that fit the configuration" in sentence(wrong)
    assert "expected 'config' and 'model_state_dict' to be" in sentence({"config": None, "model_state_dict": {}})
    shuffled = copy.deepcopy(good)
    shuffled["model_state_dict"]["input_lif.cluster_ids"] += 1
    assert "modulo 8" in sentence(shuffled)
    with pytest.raises(ValueError, match="no such file"):
        load_original(tmp_path / "none.pt")
    with pytest.raises(SystemExit, match=r"error: .*no such file"):
        main([str(tmp_path / "none.pt"), str(tmp_path / "out2")])


@pytest.mark.quick
def test_save_and_load_are_exact(tmp_path):
    model = NordForCausalLM(NordConfig(**SMALL, recency=True)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = NordForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.config.top_k == 64
    assert loaded.generation_config.top_k != 64  # the resonance's top_k is not the sampler's


def test_a_model_without_cascade_returns_logits_as_a_tuple():
    model = NordForCausalLM(NordConfig(**{**SMALL, "n_clusters": None}))
    assert not any("cascade" in name for name, _ in model.named_parameters())
    (logits,) = model(input_ids=torch.zeros(1, 3, dtype=torch.long), return_dict=False)
    assert logits.shape == (1, 3, 50)


def test_tied_embeddings_share_one_tensor_also_after_loading(tmp_path):
    model = NordForCausalLM(NordConfig(**SMALL, tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = NordForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.quick
def test_initial_values_are_those_of_the_published_model():
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**SMALL))
    block = model.blocks[0]
    assert block.resonance_gain.tolist() == pytest.approx([0.05] * 16)  # 0.1 / n_layers
    assert block.clamp.floor.tolist() == pytest.approx([-0.1] * 16)
    assert model.readout.decay_logit.item() == pytest.approx(1.4)
    assert model.input_lif.v_threshold.tolist() == [0.25] * 16
    # Kaiming-uniform with a = sqrt(5) has the bound 1 / sqrt(fan in)
    assert model.embed_tokens.weight.abs().max() <= (1 / 16) ** 0.5
    assert model.lm_head.weight.abs().max() <= (1 / 16) ** 0.5
    assert all(p.ndim >= 1 for p in model.parameters())


@pytest.mark.quick
def test_the_model_is_causal_starts_from_rest_and_sequences_are_independent():
    model = NordForCausalLM(NordConfig(**SMALL, recency=True)).eval()
    ids = torch.randint(50, (2, 10))
    before = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)  # no state is stored
    assert torch.allclose(model(input_ids=ids[:1]).logits, before[:1], atol=1e-5)  # rows are independent
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 1) % 50
    after = model(input_ids=changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.allclose(model(input_ids=ids, logits_to_keep=1).logits, before[:, -1:], atol=1e-5)


def test_without_resonance_logits_depend_only_on_the_token_at_their_position():
    model = NordForCausalLM(NordConfig(**SMALL, resonance=False)).eval()
    ids = torch.randint(50, (1, 8))
    assert torch.allclose(model(input_ids=ids).logits[:, -1], model(input_ids=ids[:, -1:]).logits[:, -1], atol=1e-5)


@pytest.mark.quick
def test_padding_on_either_side_does_not_change_the_logits():
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    ids = torch.randint(50, (1, 6))
    unpadded = model(input_ids=ids).logits
    for before in range(4):
        padded = torch.nn.functional.pad(ids, (before, 3 - before), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, 3 - before))
        logits = model(input_ids=padded, attention_mask=mask).logits
        assert torch.allclose(logits[:, before : before + 6], unpadded, atol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] = \[1, 9\]"):
        model(input_ids=padded, attention_mask=mask[:, :4])


def test_greedy_generation_equals_repeated_argmax_also_beyond_the_window():
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    ids = torch.randint(1, 50, (1, 10))  # without 0, the padding token
    out = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    expected = ids
    for _ in range(6):
        logits = model(input_ids=expected[:, -12:]).logits[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


def test_gradient_checkpointing_stores_less_and_gives_the_same_gradients():
    ids = torch.randint(50, (2, 10))
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = NordForCausalLM(NordConfig(**SMALL, recency=True)).train()
        if recompute:
            model.activation_checkpointing_enable()
        n_stored = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, n_stored=n_stored: n_stored.append(x.numel()) or x, lambda x: x
        ):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((sum(n_stored), loss, [p.grad for p in model.parameters()]))
    (n_plain, loss, grads), (n_checkpointed, same_loss, same_grads) = results
    assert n_checkpointed < 0.6 * n_plain
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))
    with pytest.raises(ValueError, match="needs use_cache=False"):
        model(input_ids=ids, use_cache=True)


@pytest.mark.quick
def test_bad_input_raises():
    model = NordForCausalLM(NordConfig(**SMALL))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 12 positions, got 13"):
        model(input_ids=torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one position"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"integers \[B, S\]"):
        model(input_ids=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="D = 16 and H = 3"):
        NordConfig(**{**SMALL, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="D = 18 and C = 4"):
        NordConfig(**{**SMALL, "intermediate_size": 18})
    for field, value in (
        ("n_clusters", 0),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("t_fast", 0),
        ("t_slow", -1),
        ("top_k", 0),
        ("beta_mem", 1.0),
        ("surrogate", "relu"),
        ("backend", "cuda"),
        ("vocab_size", 10**12),
    ):
        with pytest.raises(ValueError, match=str(value).replace(".", r"\.")):
            NordConfig(**{**SMALL, field: value})
    with pytest.raises(ValueError, match="does not support output_hidden_states"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), output_hidden_states=True)
    with pytest.raises(ValueError, match="block must be 'published'"):
        NordConfig(**SMALL, block="transformer")


def test_the_configs_have_the_documented_values():
    from nordlm.training.settings import CONFIGS, Settings
    from variants import SIZES

    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"tiny", "small", "base", "nord-144m", "tiny-published"}
    published = Settings.read(CONFIGS / "nord-144m.yaml")
    assert published.model_config().to_dict() == NordConfig().to_dict()
    training = published.training
    assert (training.lr, training.weight_decay, training.beta1, training.beta2) == (6e-4, 0.05, 0.9, 0.95)
    assert (training.batch_size, training.grad_accum, published.block_size) == (4, 12, 512)
    assert training.tokenizer == "meta-llama/Llama-3.2-1B"
    spike_fed = [Settings.read(CONFIGS / f"{name}.yaml") for name in ("tiny", "small", "base")]
    mechanisms = [{k: v for k, v in settings.model.items() if k not in SIZES} for settings in spike_fed]
    assert mechanisms[0] == mechanisms[1] == mechanisms[2]
    assert mechanisms[0]["block"] == "spike_fed"
    assert mechanisms[0]["recency"]
    small_published = Settings.read(CONFIGS / "tiny-published.yaml")
    assert {k: v for k, v in small_published.model.items() if k not in SIZES} == {"recency": True}


SHARDED = """
import os, sys, torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from nord_snn.models.nord import NordConfig, NordForCausalLM

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
settings, ids = torch.load(f"{folder}/case.pt")
torch.manual_seed(0)
model = NordForCausalLM(NordConfig(**settings))
mesh = init_device_mesh("cpu", (2,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
loss = model(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss
loss.backward()
grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
torch.save((loss.detach(), grads), f"{folder}/{rank}.pt")
distributed.barrier()
os._exit(0)  # destroying the process group may abort a process that has finished
"""


def test_gradients_under_fsdp_equal_those_of_one_process(tmp_path):
    """Two processes shard every block and have one half of the batch each."""
    settings, ids = SMALL | {"recency": True}, torch.randint(50, (2, 10))
    torch.save((settings, ids), tmp_path / "case.pt")
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()[-2000:]
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**settings))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(result[0] for result in results).item() / 2 == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert relative_error(results[0][1][name], parameter.grad) < 5e-4, name


def test_the_deprecated_name_selects_the_published_block():
    assert NordConfig(block="nord").to_dict() == NordConfig().to_dict()
    assert NordConfig().block == "published"


@pytest.mark.parametrize("block", ["published", "spike_fed"])
def test_the_whole_model_compiles_without_a_graph_break(block):
    """Also with padding."""
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**SMALL, recency=True, block=block))
    ids, mask = torch.randint(50, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for more in ({}, {"attention_mask": mask}):
        results = []
        for run in (model, compiled):
            loss = run(input_ids=ids, labels=ids, **more).loss
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for one, other in zip(*results, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    with pytest.raises(RuntimeError, match="got padding between tokens"):
        compiled(input_ids=ids, attention_mask=mask.roll(2, 1), labels=ids)


def test_trainer_shifts_labels_when_it_computes_the_loss(tmp_path):
    """With label smoothing Trainer shifts labels only for causal models that it knows by name."""
    ids = torch.randint(50, (4, 10))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    loss = Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"]
    log = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = -(0.9 * log.gather(-1, ids[:, 1:, None])[..., 0] + 0.1 * log.mean(-1)).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_unsupported_outputs_also_raise_from_the_configuration():
    for field in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{field} is not supported"):
            NordConfig(**SMALL, **{field: True})


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5, 2])
def test_a_mask_with_other_values_than_0_and_1_raises(value):
    """A mask that is added to scores has 0 for tokens: read as a mask of ones it would select the padding."""
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    mask = torch.ones(2, 6)
    mask[0, :2] = value
    with pytest.raises(ValueError, match="attention_mask must be 1 for tokens and 0 for padding"):
        model(torch.ones(2, 6, dtype=torch.long), attention_mask=mask)


@pytest.mark.parametrize(
    "labels",
    [
        torch.ones(6, 2).long(),
        torch.ones(12).long(),
        torch.ones(1, 6).long(),
        torch.ones(2, 6),
        torch.ones(2, 6).bool(),
    ],
)
def test_labels_of_another_shape_or_dtype_raise(labels):
    """Twelve labels in another shape would be compared with the logits of other positions."""
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"labels must be integers \[B, S\] = \[2, 6\]"):
        model(torch.ones(2, 6, dtype=torch.long), labels=labels)
