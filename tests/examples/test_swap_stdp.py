"""Tests of examples/swap_stdp: every learner runs in the network of each library."""

import pytest
import swap_stdp as script
import torch


def trained(framework, learner, epochs):
    """Return the accuracy of a network after training with a learner."""
    torch.manual_seed(0)
    train_data, test_data = script.digits()
    net = script.NETS[framework]()
    torch.nn.init.uniform_(net.fc.weight)
    script.train(net, script.LEARNERS[framework][learner], train_data, epochs)
    return script.accuracy(net, train_data, test_data)


@pytest.mark.parametrize("framework", ["SpikingJelly", "snnTorch"])
def test_our_rule_and_that_of_the_framework_learn_digits(framework):
    untrained, with_framework_rule, with_our_rule = (
        trained(framework, name, 6) for name in ("none", "STDPLearner", "nord-snn STDP")
    )
    assert with_framework_rule > untrained + 0.2
    assert with_our_rule > untrained + 0.2


def test_every_learner_runs_and_is_in_the_table(capsys):
    assert script.main(["--seeds", "1", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 8 * 3  # a mean, a lowest and a highest for each learner in each network
    for learners in script.LEARNERS.values():
        assert all(name.split()[-1] in printed for name in learners)


def test_options_out_of_range_raise():
    with pytest.raises(SystemExit):
        script.main(["--seeds", "0"])
