import copy

import pytest
import torch
from torch import Tensor
from zoo import CLASSES, EXAMPLE, PRUNABLE

from env.data import DataConfig, Dataset
from env.measure import Measure
from env.recognizer import Recognizer
from env.splits import Split


def recognizer(name: str) -> Recognizer:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, *EXAMPLE.shape[1:]), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(7) % CLASSES)
    dataset = Dataset(
        train=split, validation=split, test=split, classes=("a", "b", "c"), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PRUNABLE[name]().eval()
    return Recognizer(network, dataset, DataConfig(), measure=Measure("parameters", 10**6))


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", list(PRUNABLE))
def test_a_body_is_restored_as_it_was_whatever_the_network(name: str) -> None:
    made = recognizer(name)
    body = made.full()
    for step in range(2):  # its weights come from cutting twice, and have changed since
        keep_mask = body.keep_mask.clone()
        keep_mask[[layer.first + step for layer in made.plan.layers if layer.units > step + 1]] = False
        body = made.zero(body, keep_mask)
        with torch.no_grad():
            for tensor in body.network.parameters():
                tensor.mul_(1.01)
    state = copy.deepcopy(made.state_of(body))
    again = made.restored(state)
    mine, theirs = made.state_of(body)["network"], made.state_of(again)["network"]
    assert shapes(mine) == shapes(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(again.keep_mask, body.keep_mask)
    assert repr(again.network) == repr(body.network)
    flags = [[part.requires_grad for part in one.network.parameters()] for one in (body, again)]
    assert flags[0] == flags[1]
    assert made.evaluate(again, made.dataset.validation) == made.evaluate(body, made.dataset.validation)
    assert all(torch.equal(state["network"][name], theirs[name]) for name in theirs)
    assert not {tensor.data_ptr() for tensor in state["network"].values() if len(tensor.shape)} & {
        tensor.data_ptr() for tensor in theirs.values() if len(tensor.shape)
    }
