import json
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import flags
import step
import train
from augment import Policy
from model import build
from optimise import make_training

CPU = torch.device("cpu")
NOTHING = Policy(flip_p=0, affine_p=0, cutout_p=0)


def test_what_the_net_sees():
    dataset = data.load("synthetic", None, CPU, train_images=50)

    def seen(policy):
        return step.prepared(dataset.train_images, policy, dataset.mean, dataset.std)

    normal = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    assert torch.equal(seen(NOTHING), normal)
    cut = seen(replace(NOTHING, cutout_p=1))
    assert ((cut == 0).all(1).flatten(1).sum(1) >= 16 * 16).all()  # the mean colour
    cut = seen(replace(NOTHING, cutout_p=1, fill=0))
    level = cut * dataset.std.view(-1, 1, 1) + dataset.mean.view(-1, 1, 1)
    assert (level.abs() < 1e-3).all(1).flatten(1).sum(1).min() >= 16 * 16
    moved = Policy(flip_p=0, affine_p=1, shift=0, scale=0, rotate=45, cutout_p=0, border="constant")
    corners = seen(moved)[..., 0, 0]
    assert (corners.abs() < 1e-5).all(1).float().mean() > 0.5  # outside: the mean colour
    assert not torch.equal(seen(Policy()), seen(Policy()))


@pytest.mark.parametrize("name", [name for name in vars(Policy()) if name.endswith("_p")])
def test_every_probability_reaches_the_net(name, images):
    none, limits = Policy(0, affine_p=0, cutout_p=0), {"brightness": 0.5, "rgb_shift": (90, 90, 90)}
    unit = torch.zeros(3), torch.ones(3)
    plain = step.prepared(images[:50], none, *unit)
    assert torch.equal(plain, images[:50].float())
    assert not torch.equal(
        plain, step.prepared(images[:50], replace(none, **limits, **{name: 1}), *unit)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_lower_the_loss(precision):
    given = ["--schedule", "step", "--lr", "0.05", "--precision", precision]
    batches, _, take_step = learner(given, device="cpu")
    losses, right, _ = zip(*(take_step(*batches[0]) for _ in range(14)), strict=True)
    assert losses[-1] < 0.7 * losses[0]
    assert right[-1] > right[0]
    assert losses[0].dtype == torch.float32


def test_a_radius_takes_the_gradient_uphill_along_that_of_a_quarter():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 10)
    net, copy = nn.Sequential(*layers), deepcopy(nn.Sequential(*layers))
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler(enabled=False)
    images = torch.randn(6, 3, 32, 32)
    labels = deepcopy(net)(images[:2]).argmax(1).repeat(3)
    figures = step.train_step(net, optimizer, scaler, images, labels, "fp32", 0.2, radius=0.5)

    loss_of = nn.CrossEntropyLoss(label_smoothing=0.2)
    start = [p.detach().clone() for p in copy.parameters()]
    loss = loss_of(copy(images[:2]), labels[:2])
    torch.testing.assert_close(figures[0], loss.detach())
    assert figures[1] == 6
    statistics = [buffer.clone() for buffer in copy.buffers()]
    gradients = torch.autograd.grad(loss, list(copy.parameters()))
    length = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(copy.parameters(), gradients, strict=True):
            weight += 0.5 * gradient / length
    assert loss_of(copy(images[:2]), labels[:2]) > loss
    uphill = loss_of(copy(images), labels)
    gradients = torch.autograd.grad(uphill, list(copy.parameters()))
    for weight, before, gradient in zip(net.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(weight, before - 0.1 * gradient)
    for ours, seen in zip(net.buffers(), statistics, strict=True):
        torch.testing.assert_close(ours, seen)


@pytest.mark.parametrize(("radius", "times"), [(0.0, 1), (0.1, 2)])
def test_processes_go_uphill_and_down_together(radius, times, monkeypatch):
    monkeypatch.setattr(step.ranks, "average_gradients", averaged := MagicMock())
    net, scaler = nn.Conv2d(3, 2, 32), torch.amp.GradScaler(enabled=False)
    labels = torch.zeros(4, 1, 1, dtype=torch.long)
    given = net, torch.optim.SGD(net.parameters(), 0.1), scaler, torch.randn(4, 3, 32, 32), labels
    step.train_step(*given, "fp32", 0.0, radius)
    assert averaged.call_count == times


def test_no_norm_keeps_statistics_uphill():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(144))
    net(torch.randn(5, 3, 8, 8)).sum().backward()
    with step.uphill(net, 0.1):
        net(torch.randn(5, 3, 8, 8))
    assert [net[1].num_batches_tracked, net[3].num_batches_tracked] == [1, 1]


def test_weights_come_back_whatever_happens_uphill():
    net = build("net136k", 10)
    net(torch.randn(8, 3, 32, 32)).sum().backward()
    before = deepcopy(net.state_dict())
    with suppress(MemoryError), step.uphill(net, 0.1):
        moved = deepcopy(net.state_dict())
        raise MemoryError
    assert any(not torch.equal(value, before[name]) for name, value in moved.items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_gradient_of_zero_leads_nowhere():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10, bias=False))
    net[1].weight.grad, before = torch.zeros(10, 3072), net[1].weight.clone()
    with step.uphill(net, 0.1):
        assert torch.equal(net[1].weight, before)


class Mirror(nn.Module):
    """Logits that are the brightness of the left half and of the right half."""

    def forward(self, x):
        return torch.stack([x[..., :16].mean((1, 2, 3)), x[..., 16:].mean((1, 2, 3))], dim=1)


def test_logits_of_mirror_images():
    dataset = replace(data.load("synthetic", None, CPU), classes=["left", "right"])
    plain = step.predict_logits(Mirror(), dataset, "fp32")
    mirrored = step.predict_logits(Mirror(), dataset, "fp32", flip=True)
    assert plain.shape == (1000, 2)
    assert step.forward(nn.Conv2d(3, 2, 1), torch.ones(1, 3, 4, 4), "bf16").dtype == torch.float32
    torch.testing.assert_close(mirrored, plain.flip(1))


def test_fewer_test_images_than_processes(monkeypatch):
    dataset = replace(data.load("synthetic", None, CPU), classes=["left", "right"])
    monkeypatch.setattr(step.ranks, "count", lambda: 2)
    monkeypatch.setattr(step.ranks, "total", lambda logits: logits)
    for images, busy in ((1, [True, False]), (4, [True, True])):
        few = replace(dataset, test_images=dataset.test_images[:images])
        for rank in (0, 1):
            monkeypatch.setattr(step.ranks, "rank", lambda rank=rank: rank)
            assert step.predict_logits(Mirror(), few, "fp32").any() == busy[rank]


@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_an_fp16_overflow_is_skipped_and_counted(radius):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10))
    before = net[2].weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-52)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss, _, skipped = step.train_step(net, optimizer, scaler, images, labels, "fp16", 0.0, radius)
    assert skipped == 1
    assert loss.isfinite()
    assert torch.equal(net[2].weight, before)
    assert net[0].running_mean.isfinite().all()
    _, _, skipped = step.train_step(net, optimizer, scaler, images, labels, "fp16", 0.0, radius)
    assert skipped == 0
    assert not torch.equal(net[2].weight, before)


# The step as a CUDA graph


@pytest.mark.parametrize("extra", [[], ["--optimizer", "sgd", "--border", "constant"]])
@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_a_step_reads_nothing_on_the_host(extra, radius, monkeypatch):
    """As a CUDA graph requires: tensors on the device `meta` have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which `meta` lacks
    colours = ["--rgb-shift", "9", "9", "9", "--rgb-shift-p", "0.5"]
    args = flags.parse_flags(["--precision", "fp32", *colours, *extra])
    dataset = data.load("synthetic", None, CPU, train_images=32)
    tensors = {name: value for name, value in vars(dataset).items() if torch.is_tensor(value)}
    dataset = replace(dataset, **{name: value.to("meta") for name, value in tensors.items()})
    training = make_training(build(args.net, 10), args, torch.device("meta"), 1)
    take_step = step.make_step(training, dataset, args, radius)
    for _ in range(2):
        statistics = dataset.mean, dataset.std
        inputs = step.prepared(dataset.train_images, flags.policy_of(args), *statistics)
        figures = take_step(inputs, dataset.train_labels)
    assert figures.is_meta
    assert all(state["momentum_buffer"].is_meta for state in training.optimizer.state.values())


def learner(argv, radius=0.0, device="cuda"):
    """Two batches, a Training for seven epochs of them, and its step."""
    base = ["--net", "net136k", "--batch-size", "32", "--epochs", "7", "--precision", "fp32"]
    args = flags.parse_flags([*base, *argv])
    device = torch.device(device)
    dataset = data.load("synthetic", None, device, train_images=2 * args.batch_size)
    torch.manual_seed(0)
    training = make_training(build(args.net, 10, args.dropout), args, device, 2)
    inputs = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    batches = list(zip(inputs.chunk(2), dataset.train_labels.chunk(2), strict=True))
    return batches, training, step.make_step(training, dataset, args, radius)


def learnt(batches, training, take_step):
    """Rates and losses of 14 steps, past the first drop of `step`, and the final state."""
    training.net.train()
    losses, rates = [], []
    for number in range(14):
        rates.append(float(training.scheduler.get_last_lr()[0]))
        losses.append(take_step(*batches[number % 2])[0])
        training.scheduler.step()
    weights = [tensor.flatten().float() for tensor in training.net.state_dict().values()]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert len(set(rates)) > 1
    return torch.tensor(rates), torch.stack(losses), torch.cat(weights)


@pytest.mark.parametrize(
    ("given", "processes", "graph"),
    [([], 1, True), (["--eager"], 1, False), (["--precision", "fp16"], 1, False), ([], 2, False)],
)
def test_a_step_on_one_gpu_is_a_graph(given, processes, graph, monkeypatch):
    monkeypatch.setattr(step, "captured", lambda *_: "graph")
    monkeypatch.setattr(step, "normalize", lambda *_: None)
    monkeypatch.setattr(step.ranks, "count", lambda: processes)
    dataset = replace(data.load("synthetic", None, CPU, 32), train_images=MagicMock(is_cuda=True))
    args = flags.parse_flags(given)
    made = step.make_step(make_training(build("net136k", 10), args, CPU, 1), dataset, args, 0.0)
    assert (made == "graph") is graph


class Tape(TorchDispatchMode):
    """Repeats operations with the same memory and numbers as at first, like a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for tensor, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(tensor) and tensor is not value:
                    tensor.copy_(value)


@pytest.mark.parametrize(
    ("schedule", "radius"), [("onecycle", 0.1), ("cyclic", 0.0), ("step", 0.0)]
)
def test_repeated_operations_learn_what_steps_learn(schedule, radius, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, stream: tape)
    monkeypatch.setattr(step, "warmed_up", lambda job: [job() for _ in range(3)])
    taken = []
    for graph in (True, False):
        given = ["--net", "atrous", "--batch-size", "5", "--schedule", schedule, "--lr", "0.05"]
        batches, training, take_step = learner(given, radius, "cpu")
        for group in training.optimizer.param_groups:
            group["fused"] = True
            group["lr"] = group["lr"] if graph else torch.tensor(group["lr"])  # rounded alike
        if graph:
            training.net.eval()  # as an evaluation leaves it
            take_step = step.captured(take_step, training, *batches[0])
        taken.append(learnt(batches, training, take_step))
    for repeated, stepped in zip(*taken, strict=True):
        assert torch.equal(repeated, stepped)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["atrous", "net136k"])
@pytest.mark.parametrize(
    ("schedule", "radius"), [("onecycle", 0.0), ("onecycle", 0.1), ("cyclic", 0.0), ("step", 0.0)]
)
def test_a_graph_learns_what_eager_steps_learn(net, schedule, radius, deterministic):
    taken = []
    for way in ([], ["--eager"]):
        given = ["--net", net, "--schedule", schedule, "--lr", "0.05", *way]
        batches, training, take_step = learner(given, radius)
        for group in training.optimizer.param_groups:  # rounded alike
            group["lr"] = torch.as_tensor(group["lr"], device="cuda")
        taken.append(learnt(batches, training, take_step))
    for graph, eager in zip(*taken, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "extra",
    [
        ["--momentum", "0"],
        ["--label-smoothing", "0.1", "--border", "constant", "--fill", "9"],
        ["--augment", "albumentations", "--workers", "0"],
        ["--compile"],
    ],
)
def test_what_is_captured_with_other_flags(extra, tmp_path, no_pictures):
    flags = ["--data", "synthetic", "--train-images", "512", "--batch-size", "64", "--lr", "0.1"]
    folder = tmp_path / "run"
    flags += ["--device", "cuda", "--epochs", "4", "--out", str(folder), *extra]
    assert train.main(flags) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", ["0", "0.5"])
def test_replays_draw_anew_and_seeds_hold(dropout):
    still = ["--lr", "1e-30", "--weight-decay", "0", "--dropout", dropout]
    (batch, *_), _, take_step = learner(still)
    torch.manual_seed(1)
    first, second = take_step(*batch), take_step(*batch)
    torch.manual_seed(1)
    again = take_step(*batch)
    assert torch.equal(first, second) is (dropout == "0")
    assert torch.equal(first, again)
