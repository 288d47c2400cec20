"""Filter replacement: who is copied over whom, by hand, and what of a filter is copied."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, PRUNABLE

from env.channels import ChannelPlan
from env.data import DataConfig, load_dataset
from env.errors import UserError
from env.groups import TRANSPOSED
from env.measure import Measure
from env.networks import NetworkConfig, build_network
from env.recognizer import Recognizer
from env.replacement import COPIES, TREATMENTS, ReplacementConfig, replace_filters, sources, treat, weakest


def network_of(seed: int = 0) -> nn.Sequential:
    """Layers of 5 and 4 filters; the first with batch-norm, the second without; and a classifier."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    norm = network[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return network.eval()


PLAN = ChannelPlan(network_of(), torch.zeros(1, 2, 6, 6))
#: Falling: 1, 3, 0, 4, 2 in the first layer; 8, 5, 6, 7 in the second, where 6 and 7 are equal.
SCORES = torch.tensor([5.0, 9.0, 1.0, 8.0, 2.0, 4.0, 3.0, 3.0, 6.0])


def test_the_weakest_of_each_layer_are_found_and_one_stays() -> None:
    assert [weak.tolist() for weak in weakest(PLAN, SCORES, 0.5)] == [[4, 2], [6, 7]]
    assert [weak.tolist() for weak in weakest(PLAN, SCORES, 0.2)] == [[2], []]
    assert [len(weak) for weak in weakest(PLAN, SCORES, 0.6)] == [3, 2]  # 0.6 of 5 is below 3 in binary fractions
    assert [weak.tolist() for weak in weakest(PLAN, SCORES, 0.999)] == [[3, 0, 4, 2], [5, 6, 7]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("1", {2: 1, 4: 3, 7: 8, 6: 5}),
        ("2", {2: 1, 4: 1, 7: 8, 6: 8}),
        # above those that go: 7, 6, 3, whose halves give the first place to 1, then 7/3 < 6/2 to 3; 3 and 1: 3/2, 3/3
        ("3", {2: 1, 4: 3, 7: 8, 6: 8}),
    ],
)
def test_who_is_copied_over_whom(how: str, expected: dict[int, int]) -> None:
    assert sources(PLAN, SCORES, 0.5, how) == expected


def test_replacement_3_multiplies_in_proportion_to_importance() -> None:
    plan = ChannelPlan(
        nn.Sequential(nn.Conv2d(1, 100, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(100, 2)),
        torch.zeros(1, 1, 2, 2),
    )
    scores = torch.zeros(100)
    scores[:4] = torch.tensor([40.0, 30.0, 20.0, 10.0])  # 96 places, 4 there already: 40, 30, 20 and 10 in the end
    copies = Counter(sources(plan, scores, 0.96, "3").values())
    assert {unit: copies[unit] + 1 for unit in range(4)} == {0: 40, 1: 30, 2: 20, 3: 10}


def test_replacement_3_counts_from_those_that_go_and_not_from_a_dead_filter() -> None:
    plan = ChannelPlan(
        nn.Sequential(nn.Conv2d(1, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
        torch.zeros(1, 1, 2, 2),
    )
    scores = torch.tensor([16.0, 12.0, 11.5, 11.0, 10.5, 10.0, 9.0, 0.0])  # above 10: 6, 2, 1.5, 1, 0.5
    assert sources(plan, scores, 0.4, "3") == {7: 0, 6: 0, 5: 0}  # 6/2, 6/3, 6/4 > 2/2
    assert sources(plan, scores, 0.4, "1") == {7: 0, 6: 1, 5: 2}


def test_replacement_3_lets_equals_take_turns() -> None:
    plan = ChannelPlan(
        nn.Sequential(nn.Conv2d(1, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
        torch.zeros(1, 1, 2, 2),
    )
    assert Counter(sources(plan, torch.full((6,), 3.0), 0.7, "3").values()) == {0: 2, 1: 2}


def treated(how: str, share: float = 0.5) -> tuple[nn.Sequential, nn.Sequential, dict[str, Tensor]]:
    """A network before and after, and a fresh one's tensors."""
    before, fresh = network_of(), network_of(seed=1).state_dict()
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    replace_filters(after, PLAN, SCORES, how=how, share=share, fresh=fresh, generator=generator)
    return before, after, fresh


def own(network: nn.Module, unit: int) -> list[Tensor]:
    """All that makes a filter of `network_of` what it is."""
    state = network.state_dict()
    names = (
        ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"] if unit < 5 else ["3.weight", "3.bias"]
    )
    return [state[name][unit if unit < 5 else unit - 5] for name in names]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_all_of_the_filter_and_nothing_of_its_readers(how: str) -> None:
    before, after, _ = treated(how)
    pairs = sources(PLAN, SCORES, 0.5, how)
    for unit in range(9):
        expected = own(before, pairs.get(unit, unit))
        if unit >= 5:  # what the second layer reads of the first stays, in the copied kernel too
            assert len(expected[0]) == 5
        for mine, theirs in zip(own(after, unit), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(after[7].weight, before[7].weight, rtol=0, atol=0)


def test_copies_drift_apart_in_training_since_their_readers_differ() -> None:
    _, network, _ = treated("2")
    images = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    network.train()(images).square().sum().backward()
    gradient = network[0].weight.grad
    assert gradient is not None
    torch.testing.assert_close(network[0].weight[1], network[0].weight[2], rtol=0, atol=0)
    assert float((gradient[1] - gradient[2]).abs().max()) > 1e-4


@pytest.mark.parametrize("how", ["none", "reinit", "noise"])
def test_the_controls_change_the_weakest_alone(how: str) -> None:
    before, after, fresh = treated(how)
    weak = {2, 4, 6, 7}
    for unit in range(9):
        alike = all(torch.equal(a, b) for a, b in zip(own(before, unit), own(after, unit), strict=True))
        assert alike == (unit not in weak or how == "none")
        if how == "reinit" and unit in weak:
            layer, place = ("0.weight", unit) if unit < 5 else ("3.weight", unit - 5)
            torch.testing.assert_close(own(after, unit)[0], fresh[layer][place], rtol=0, atol=0)
        if how == "noise" and unit < 5:
            for mine, theirs in zip(own(after, unit)[1:], own(before, unit)[1:], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_noise_is_as_large_as_the_layers_weights_vary() -> None:
    network = nn.Sequential(nn.Conv2d(30, 60, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 2))
    plan = ChannelPlan(network, torch.zeros(1, 30, 4, 4))
    before = network[0].weight.detach().clone()
    random = torch.Generator().manual_seed(0)
    replace_filters(network, plan, torch.arange(60.0), how="noise", share=0.5, fresh={}, generator=random)
    added = (network[0].weight.detach() - before)[:30].std()
    assert float(added) == pytest.approx(float(before.std()), rel=0.05)  # of 8,100 numbers: five standard errors


ODD = ("mobilenet", "densenet", "joined", "depthwise", "grouped", "transposed in groups", "flattened", "used twice")


@pytest.mark.parametrize("name", ODD)
def test_in_any_network_a_copied_unit_is_made_of_what_its_original_is(name: str) -> None:
    original = PRUNABLE[name]().eval()
    plan = ChannelPlan(original, EXAMPLE)
    scores = torch.rand(plan.units, generator=torch.Generator().manual_seed(0))
    for how in COPIES:
        network = copy.deepcopy(original)
        replace_filters(network, plan, scores, how=how, share=0.4, fresh={}, generator=torch.Generator())
        assert network(torch.randn_like(EXAMPLE)).isfinite().all()
        pairs = sources(plan, scores, 0.4, how)
        assert pairs
        for unit, source in pairs.items():
            assert compared(network, original, plan, unit, source) > 0


def compared(network: nn.Module, original: nn.Module, plan: ChannelPlan, unit: int, source: int) -> int:
    """Compare all that makes `unit` with what made `source` before; how many channels that were."""
    count, before = 0, original.state_dict()
    for path in plan.layers[int(plan.layer_of[unit])].modules:
        transposed = isinstance(network.get_submodule(path), TRANSPOSED)
        for key, tensor in network.get_submodule(path).state_dict().items():
            axis = int(transposed and key == "weight")
            owner = dict(plan.axes(f"{path}.{key}")).get(axis)
            if owner is not None:
                mine, theirs = ((owner == one).nonzero().flatten() for one in (unit, source))
                expected = before[f"{path}.{key}"].index_select(axis, theirs)
                torch.testing.assert_close(tensor.index_select(axis, mine), expected, rtol=0, atol=0)
                count += len(mine)
    return count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "4"}, "replacement.how: expected one of 1, 2, 3, none, reinit, noise, or nothing, got '4'"),
        ({"share": 0.0}, "replacement.share: expected a share above 0 and below 1, got 0.0"),
        ({"share": 1.0}, "replacement.share: expected a share above 0 and below 1, got 1.0"),
        ({"how": "1", "share": 0.6}, "replacement.share: expected at most 0.5 for replacement 1"),
        ({"importance": "age"}, "replacement.importance: expected one of rank, taylor, gamma, l1, l2, fpgm, got 'age'"),
        ({"images": 0}, "replacement.images: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ReplacementConfig(**given)  # type: ignore[arg-type]
    assert message in str(caught.value)


def recognizer_of() -> tuple[Recognizer, nn.Module]:
    config = NetworkConfig(name="small", width=0.25)
    network, fresh = (build_network(config, channels=1, classes=10, seed=seed) for seed in (0, 1))
    given = sum(parameter.numel() for parameter in network.parameters())
    data = DataConfig(train_limit=200)
    return Recognizer(network.eval(), load_dataset(data), data, measure=Measure("parameters", given)), fresh


@pytest.mark.parametrize("how", TREATMENTS)
def test_a_treatment_is_decided_by_its_seed_alone(how: str) -> None:
    states = []
    for seed in (3, 3, 4):
        recognizer, fresh = recognizer_of()
        treat(recognizer, ReplacementConfig(how=how, share=0.3, images=50), fresh=fresh, seed=seed)
        states.append(torch.cat([tensor.flatten().double() for tensor in recognizer.network.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    untouched, _ = recognizer_of()
    before = torch.cat([tensor.flatten().double() for tensor in untouched.network.state_dict().values()])
    assert torch.equal(states[0], before) == (how == "none")


def test_a_share_that_is_no_filter_is_named() -> None:
    recognizer, fresh = recognizer_of()
    with pytest.raises(UserError, match=r"at least 0\.042, one filter of the widest layer"):
        treat(recognizer, ReplacementConfig(how="2", share=0.04), fresh=fresh, seed=0)
