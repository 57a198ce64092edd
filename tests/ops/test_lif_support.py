"""A GPU kernel supports only the dynamics of the published neuron and one decay; other calls get a reason."""

import pytest
import torch

from nord_snn.ops.dispatch import CallSignature
from nord_snn.ops.lif.support import has_published_dynamics

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (True, "runs")),
        ((("published_dynamics", True), ("n_decays", 1)), (True, "runs")),
        (
            (("published_dynamics", False),),
            (False, "it supports the dynamics of the published neuron only, got others"),
        ),
        ((("n_decays", 8),), (False, "it supports one decay shared by all neurons, got one decay per neuron")),
    ],
)
def test_the_reason_names_what_the_kernel_does_not_support(options, expected):
    assert tuple(has_published_dynamics(CallSignature("cuda", torch.float32, 8, options))) == expected
