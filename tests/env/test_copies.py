"""Copies of networks: what a duplicate has in common with its original, and what not."""

import pytest
import torch
from torch import nn
from zoo import NETWORKS

from env.copies import duplicate


@pytest.mark.parametrize("name", NETWORKS)
def test_a_duplicate_is_the_same_and_shares_nothing(name: str) -> None:
    network = NETWORKS[name]().train()
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    twin = duplicate(network)
    assert repr(twin) == repr(network)
    assert [m.training for m in twin.modules()] == [m.training for m in network.modules()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in parameters]
    theirs, ours = twin.state_dict(), network.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    assert not {id(m) for m in twin.modules()} & {id(m) for m in network.modules()}
    held = {t.data_ptr() for t in (*parameters, *network.buffers())}
    assert not held & {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())}


def test_a_duplicate_of_a_layer_with_a_hook_has_it_too() -> None:
    network, called = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), []
    network[0].register_forward_hook(lambda *_: called.append(1))
    twin = duplicate(network)
    twin(torch.zeros(1, 3))
    assert called == [1]
    twin[1].register_forward_hook(lambda *_: called.append(2))
    network(torch.zeros(1, 3))
    assert called == [1, 1]  # a hook of the copy is not the original's
