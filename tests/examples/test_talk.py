"""Tests of generate.py, chat.py and the progress panel of train.py: input and output in a terminal."""

import argparse
import io
import re
import shutil

import chat as chat_script
import generate
import pytest
import torch
from helpers import fire_easily
from nordlm.analysis.token_activity import measure_tokens, zone_means
from nordlm.errors import ModelError
from nordlm.inference.chat_session import Chat
from nordlm.inference.loading import newest_model, open_model
from nordlm.inference.plasticity import Plasticity
from nordlm.inference.sampling import generate_arguments
from nordlm.training.progress import TrainingProgress, duration
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from nord_snn.models.nord import NordForCausalLM


@pytest.fixture
def model_folder(trained):
    """Return the folder of a trained model."""
    return trained / "model"


@pytest.mark.quick
def test_generate_continues_a_prompt_and_is_reproducible_by_seed(model_folder, capsys):
    arguments = ["--model", str(model_folder), "--max-new-tokens", "12", "--seed", "3", "the neuron"]
    assert generate.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("the neuron")
    assert len(first) > len("the neuron\n")
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert generate.main([*arguments[:-1], "--temperature", "0", ""]) == 0  # an empty prompt


def test_generate_reads_standard_input_and_warns_if_a_prompt_is_too_long(model_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the neuron fires \xff" * 40)))
    assert generate.main(["--model", str(model_folder), "--max-new-tokens", "2", "-"]) == 0
    assert "only the last 24 tokens of the prompt are used" in capsys.readouterr().err


def test_an_interrupt_or_an_error_during_generation_prints_no_traceback(model_folder, capsys, monkeypatch):
    for error, status in ((KeyboardInterrupt(), 130), (RuntimeError("probability tensor contains nan"), 1)):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(NordForCausalLM, "generate", fail)
        assert generate.main(["--model", str(model_folder), "x"]) == status
    assert "error: probability tensor contains nan" in capsys.readouterr().err


def test_sampling_options_are_those_of_transformers():
    assert generate_arguments(0, 5, 0.9, 1.2) == {"do_sample": False, "repetition_penalty": 1.2}
    assert generate_arguments(0.5, 5, 0.9, 1.2)["temperature"] == 0.5


@pytest.mark.parametrize(
    "option", [["--temperature", "-1"], ["--top-p", "1.5"], ["--max-new-tokens", "0"], ["--top-k", "x"]]
)
def test_options_out_of_range_raise(option, capsys):
    with pytest.raises(SystemExit):
        generate.main(option)
    assert option[0] in capsys.readouterr().err


def test_unusable_models_raise_one_sentence(model_folder, tmp_path, capsys, monkeypatch):
    def sentence(folder) -> str:
        assert generate.main(["--model", str(folder), "x"]) == 1
        assert chat_script.main(["--model", str(folder)]) == 1
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 2
        return errors[0]

    assert "expected a folder with config.json, model.safetensors and a tokenizer" in sentence(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    assert "gpt2" in sentence(tmp_path / "gpt2")
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"short")
    assert "the model cannot be loaded" in sentence(broken)
    wider = shutil.copytree(model_folder, tmp_path / "wider")
    config = (wider / "config.json").read_text()
    (wider / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 32'))
    assert "wider" in sentence(wider)
    deeper = shutil.copytree(model_folder, tmp_path / "deeper")
    (deeper / "config.json").write_text(config.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    assert "the weights do not fit the configuration (missing keys: blocks.1" in sentence(deeper)
    no_tokenizer = shutil.copytree(model_folder, tmp_path / "no_tokenizer")
    for path in no_tokenizer.glob("*token*"):
        path.unlink()
    assert "no usable tokenizer" in sentence(no_tokenizer)
    monkeypatch.chdir(tmp_path)
    assert generate.main(["x"]) == 1
    assert "no finished run in runs/" in capsys.readouterr().err


def test_the_newest_finished_run_is_the_default(trained):
    assert newest_model(trained.parent) == trained / "model"
    with pytest.raises(ModelError):
        newest_model(trained / "nowhere")


# --- chat


@pytest.fixture
def talk(model_folder):
    """Return a chat with a model whose neurons fire, and its output."""
    model, tokenizer = open_model(model_folder)
    fire_easily(model)
    console = Console(file=io.StringIO(), width=120)
    options = argparse.Namespace(temperature=0.8, max_new_tokens=4, top_k=10, top_p=1.0, repetition_penalty=1.1)
    return Chat(model, tokenizer, options, console), console.file


@pytest.mark.quick
def test_the_chat_answers_and_uses_the_conversation_until_reset(talk, capsys):
    chat, printed = talk
    assert chat.handle("the neuron fires")
    assert len(chat.text) > 4
    assert chat.handle("/stats")
    assert "blocks.0.ffn.lif1" in printed.getvalue()
    assert "tokens of context" in printed.getvalue()
    chat.handle("/reset")
    assert chat.text == []
    for _ in range(8):  # longer than the context of 24 tokens
        chat.handle("and rests while a spike")
    assert capsys.readouterr().out


def hooks(chat: Chat) -> int:
    """Return the number of forward hooks of the model; plasticity also has some."""
    return sum(len(module._forward_hooks) for module in chat.model.modules())


def test_rates_of_an_answer_are_those_of_the_positions_that_predicted_it(talk):
    """They equal those of one forward pass over the whole text."""
    chat, printed = talk
    before = hooks(chat)
    chat.handle("the neuron fires")
    shown = chat.answer_rates
    assert shown.tokens == chat.text[-chat.answer_length :]
    measured = measure_tokens(chat.model, torch.tensor([chat.text]))
    for part, rates in zone_means(measured.rates, measured.neurons).items():
        expected = rates[0, -chat.answer_length - 1 : -1]
        assert torch.allclose(torch.tensor(shown.rates[part]), expected, atol=1e-6)
    assert hooks(chat) == before
    printed.truncate(0)
    chat.handle("/stats")
    for part in ("input", "block 0", "readout"):
        assert re.search(
            rf"{part} +[\d.]+%   lowest +[\d.]+% before '.*'   highest +[\d.]+% before '.*'", printed.getvalue()
        )


@pytest.mark.quick
def test_live_rates_are_shown_per_token(talk):
    chat, printed = talk
    chat.handle("/stats")
    assert "there is no answer yet" in printed.getvalue()
    chat.handle("/live")
    assert "expected /live on or /live off" in printed.getvalue()
    chat.handle("/live on")
    printed.truncate(0)
    chat.handle("the neuron")
    lines = [line for line in printed.getvalue().splitlines() if "block 0" in line]
    assert len(lines) == chat.answer_length
    rates = [float(re.search(r"block 0 ([\d.]+)%", line)[1]) / 100 for line in lines]
    assert rates == pytest.approx(chat.answer_rates.rates["block 0"], abs=1e-4)
    chat.handle("/live off")
    printed.truncate(0)
    chat.handle("the neuron")
    assert "block 0" not in printed.getvalue()


def test_in_a_terminal_live_rates_are_bars_below_the_answer(talk):
    chat, _ = talk
    chat.console = Console(file=io.StringIO(), width=120, force_terminal=True)
    chat.handle("/live on")
    chat.handle("the neuron")
    shown = chat.console.file.getvalue()
    assert re.search(r"block 0.*━.*%", shown)
    assert any(c in shown for c in "▁▂▃▄▅▆▇█")
    assert chat.console._live_stack == []  # the display has ended


def test_an_interrupted_answer_restores_the_terminal(talk, monkeypatch):
    chat, _ = talk
    before = hooks(chat)
    chat.console = Console(file=io.StringIO(), width=120, force_terminal=True)
    chat.handle("/live on")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.model, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.handle("the neuron")
    assert chat.console._live_stack == []
    assert hooks(chat) == before


def test_commands_set_the_named_options(talk):
    chat, printed = talk
    for line in ("/temp 0.5", "/tokens 7", "/rep 1.3", "/help"):
        assert chat.handle(line)
    assert (chat.options.temperature, chat.options.max_new_tokens, chat.options.repetition_penalty) == (0.5, 7, 1.3)
    assert "/forget" in printed.getvalue()
    for line in ("/temp hot", "/tokens 0", "/rep nan", "/stdp maybe", "/dance"):
        assert chat.handle(line)
    out = printed.getvalue()
    assert "could not convert string to float: 'hot'; the temperature stays at 0.5" in out
    assert "expected a number from 0.01 to 100, got nan; the repetition penalty stays at 1.3" in out
    assert "unknown command /dance" in out
    assert "expected /stdp on or /stdp off" in out
    assert chat.options.max_new_tokens == 7
    assert not chat.handle("/quit")


def changed(model, before):
    """Return the names of the weights that differ from those of ``before``."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_stdp_learns_from_typed_text_and_forget_reverts_it(talk):
    chat, printed = talk
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    chat.handle("the neuron fires and rests")
    chat.handle("/good")
    assert "STDP is off" in printed.getvalue()
    assert not changed(chat.model, before)
    chat.handle("/stdp on")
    for line in ("while a spike wakes", "xq zzv kk jj qqq", "the neuron fires and rests"):
        chat.handle(line)
    assert "[loss on your text" in printed.getvalue()
    assert changed(chat.model, before) == {"lm_head.weight"}
    assert chat.plasticity.change() > 0
    chat.handle("/stdp off")
    after = chat.model.lm_head.weight.clone()
    chat.handle("some slow current of time")
    assert torch.equal(chat.model.lm_head.weight, after)
    chat.handle("/stats")
    assert "STDP off; synapses that learn: lm_head; learned change so far: " in printed.getvalue()
    chat.handle("/forget")
    assert not changed(chat.model, before)
    assert chat.plasticity.change() == 0


def test_good_makes_the_last_answer_more_likely_and_bad_less(talk):
    chat, printed = talk
    chat.handle("/stdp on")
    chat.handle("/good")
    assert "there is no answer to learn from" in printed.getvalue()
    chat.plasticity = Plasticity(chat.model, learning_rate=0.01)
    chat.handle("the neuron fires")
    answer = chat.text[-chat.answer_length :]
    context = torch.tensor([chat.text])

    def log_likelihood():
        with torch.no_grad():
            logits = chat.model(input_ids=context, use_cache=False).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(answer)[:, None]).sum().item()

    before = log_likelihood()
    for _ in range(3):
        chat.handle("/good")
    after_good = log_likelihood()
    assert after_good > before
    for _ in range(6):
        chat.handle("/bad")
    assert log_likelihood() < after_good
    assert "[loss on the model's answer" in printed.getvalue()


def test_the_learned_change_can_be_saved_and_loaded(talk, tmp_path):
    chat, printed = talk
    path = tmp_path / "mine.safetensors"
    chat.handle(f"/save-plastic {path}")
    assert "nothing to save" in printed.getvalue()
    chat.handle("/stdp on")
    chat.handle("while a spike wakes its neighbours")
    learned = chat.model.lm_head.weight.clone()
    chat.handle(f"/save-plastic {path}")
    chat.handle("/forget")
    assert not torch.equal(chat.model.lm_head.weight, learned)
    chat.handle(f"/load-plastic {path}")
    assert torch.equal(chat.model.lm_head.weight, learned)
    chat.handle(f"/load-plastic {tmp_path / 'none'}")
    chat.handle("/load-plastic")
    out = printed.getvalue()
    assert "no such file" in out
    assert "expected the name of a file" in out
    assert torch.equal(chat.model.lm_head.weight, learned)


def test_the_chat_ends_with_quit_or_the_end_of_the_input(model_folder, monkeypatch, capsys):
    lines = iter(["the neuron", "", "/temp 0", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat_script.main(["--model", str(model_folder), "--max-new-tokens", "2", "--seed", "1"]) == 0

    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert chat_script.main(["--model", str(model_folder)]) == 0
    assert "/help lists the commands" in capsys.readouterr().out


# --- progress


def test_a_terminal_shows_a_panel_with_a_bar_for_every_layer():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TrainingProgress(total=10, console=console) as progress:
        progress.update(5, 4.2, 1e-3, 1234.0, {"input_lif": 0.093, "readout.lif": 0.0001})
        progress.say("[not markup]")
    out = console.file.getvalue()
    for part in ("step 5/10", "loss 4.200", "1,234 tokens/s", "input_lif", "9.30%", "[not markup]"):
        assert part in out


def test_without_a_terminal_progress_is_plain_lines():
    console = Console(file=io.StringIO(), width=300)
    with TrainingProgress(total=10, console=console) as progress:
        progress.update(5, 4.2, 1e-3, 1234.0, {"input_lif": 0.093, "readout.lif": 0.0001})
    out = console.file.getvalue()
    assert "\x1b" not in out
    assert "firing 0.0% (readout.lif) to 9.3% (input_lif)" in out
    hidden = Console(file=io.StringIO())
    with TrainingProgress(total=10, console=hidden, visible=False) as progress:
        progress.update(5, 4.2, 1e-3, 1234.0, {"input_lif": 0.1})
        progress.say("quiet")
    assert hidden.file.getvalue() == ""


def test_durations_are_printed_in_hours_minutes_and_seconds():
    assert [duration(s) for s in (0, 65, 3700)] == ["0m 00s", "1m 05s", "1h 01m"]
