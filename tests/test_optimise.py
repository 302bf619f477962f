import pytest
import torch
from torch import nn

import flags
from model import build
from optimise import make_training, orthogonal, orthogonal_at_once

CPU = torch.device("cpu")


def test_weight_decay_spares_what_has_one_dimension():
    args = flags.parse_flags(["--weight-decay", "0.01", "--optimizer", "sgd"])
    net = build("atrous", 10)
    groups = make_training(net, args, CPU, 1).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for parameter in net.parameters():
        assert decay[id(parameter)] == (0.01 if parameter.ndim >= 2 else 0)


def test_muon_follows_the_kernels_that_mix_channels():
    net = build("atrous", 10)
    *_, muon = make_training(net, flags.parse_flags([]), CPU, 1).optimizer.param_groups
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    expected = {id(p) for m in convolutions if m.groups == 1 for p in m.parameters()}
    assert {id(kernel) for kernel in muon["params"]} == expected
    assert 0 < len(expected) < sum(p.ndim == 4 for p in net.parameters())


def test_convolutions_that_share_a_kernel_are_one_to_the_optimiser(recwarn):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    *_, muon = make_training(net, flags.parse_flags([]), CPU, 1).optimizer.param_groups
    assert [*map(id, muon["params"])] == [id(net[0].weight), id(net[2].weight)]
    assert not recwarn.list


def test_matrices_of_many_shapes_are_made_orthogonal_at_once():
    for shapes in ([(3, 5, 7), (2, 9, 4), (4, 6, 6)], [(2, 9, 4), (1, 8, 3)]):
        stacks = [torch.randn(shape) for shape in shapes]
        for found, stack in zip(orthogonal_at_once(stacks), stacks, strict=True):
            torch.testing.assert_close(found, orthogonal(stack), rtol=0, atol=1e-4)
    assert not orthogonal(torch.zeros(1, 2, 3)).any()  # nor is it no number


@pytest.mark.parametrize("momentum", ["0", "0.9"])
@pytest.mark.parametrize(("outputs", "inputs", "size"), [(24, 32, 1), (32, 24, 1), (16, 3, 3)])
def test_muon_is_that_of_torch(outputs, inputs, size, momentum):
    """Within the precision of torch's, which iterates in bfloat16."""
    flag = ["--schedule", "step", "--lr", "0.8", "--weight-decay", "0.01", "--momentum", momentum]
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(inputs, outputs, size, bias=False) for _ in range(2)))
    ours = make_training(net, flags.parse_flags(flag), CPU, 1000).optimizer
    matrices = [nn.Parameter(conv.weight.detach().flatten(1).clone()) for conv in net]
    reference = torch.optim.Muon(matrices, lr=0.08, weight_decay=2.0, momentum=float(momentum))
    before = matrices[1].detach().clone()
    for _ in range(10):
        for conv, matrix in zip(net, matrices, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=random)
            conv.weight.grad = matrix.grad.clone().view(conv.weight.shape)
        ours.step()
        reference.step()
    for conv, matrix in zip(net, matrices, strict=True):
        torch.testing.assert_close(conv.weight.flatten(1), matrix, rtol=0, atol=5e-3)
    assert (matrices[1] - before).abs().mean() > 0.05


def test_a_first_step_that_the_scaler_skips_is_nothing_to_warn_of(recwarn):
    net = nn.Linear(1, 1)
    training = make_training(net, flags.parse_flags(["--precision", "fp16"]), CPU, 2)
    net.weight.grad, net.bias.grad = torch.full((1, 1), torch.inf), torch.zeros(1)
    training.scaler.scale(torch.ones(1))
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.scheduler.step()
    assert net.weight.isfinite().all()
    assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]


def test_sgd_is_nesterovs():
    net = nn.Linear(1, 1)
    args = flags.parse_flags(["--schedule", "step", "--lr", "1", "--momentum", "0.8"])
    optimizer = make_training(net, args, CPU, 9).optimizer
    before, net.bias.grad = net.bias.item(), torch.ones(1)
    optimizer.step()
    assert net.bias.item() == pytest.approx(before - 1.8)  # the gradient plus 0.8 of its momentum


@pytest.mark.parametrize("steps", [*range(2, 10), 1000])
def test_onecycle_rises_and_falls_to_zero_however_short_the_run(steps):
    args = flags.parse_flags(["--epochs", "1", "--lr", "0.5"])
    training = make_training(nn.Conv2d(3, 4, 3), args, CPU, steps)
    rates = []
    for _ in range(steps):
        group = training.optimizer.param_groups[0]
        rates.append(group["lr"])
        assert group["momentum"] == 0.9
        training.optimizer.step()
        training.scheduler.step()
    assert rates[-1] < 1e-5
    if steps > 100:
        assert 0.49 < max(rates) == rates[steps // 4 - 1]


def test_a_run_of_one_step_learns():
    args = flags.parse_flags(["--epochs", "1", "--lr", "0.5"])
    training = make_training(nn.Conv2d(3, 4, 3), args, CPU, 1)
    assert training.optimizer.param_groups[0]["lr"] > 0.2


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("cyclic", 16, {0: 0.02, 40: 0.5, 80: 0.02, 120: 0.5}),
        ("cyclic", 15, {0: 0.02, 75: 0.5}),
        ("cyclic", 6, {0: 0.02, 30: 0.5}),
        ("step", 16, {0: 0.5, 59: 0.5, 60: 0.25, 120: 0.125}),
    ],
)
def test_other_schedules(schedule, epochs, expected):
    args = flags.parse_flags(["--schedule", schedule, "--epochs", str(epochs), "--lr", "0.5"])
    training = make_training(nn.Conv2d(3, 4, 3), args, CPU, 10)
    rates = []
    for _ in range(10 * epochs):
        rates.append(training.optimizer.param_groups[0]["lr"])
        assert training.optimizer.param_groups[0]["momentum"] == 0.9
        training.optimizer.step()
        training.scheduler.step()
    assert max(rates) == pytest.approx(0.5)
    assert {number: rates[number] for number in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["onecycle", "cyclic", "step"])
def test_muons_rate_stays_a_tenth(schedule):
    args = flags.parse_flags(["--schedule", schedule, "--epochs", "16"])
    training = make_training(nn.Conv2d(3, 4, 3), args, CPU, 3)
    for _ in range(40):
        sgd, _, muon = (group["lr"] for group in training.optimizer.param_groups)
        assert muon == pytest.approx(sgd / 10, rel=1e-3)
        training.optimizer.step()
        training.scheduler.step()


def test_a_state_from_a_gpu_goes_on_here():
    def learner():
        args = flags.parse_flags(["--precision", "fp16"])
        return make_training(nn.Conv2d(3, 4, 3), args, CPU, 10)

    state = learner().state() | {"prepared": 5.0}
    state["scaler"]["scale"] = 8.0
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "fused": True}
    other = learner()
    other.load_state(state)
    assert all(isinstance(group["lr"], float) for group in other.optimizer.param_groups)
    assert not any(group["fused"] for group in other.optimizer.param_groups)
    assert (other.prepared, other.scaler.get_scale()) == (5, 8)
