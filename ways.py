"""The ways of training on a batch, and of augmenting one, that bench.py compares."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import epochs
import flags
import machine
import model
import step
from augment import Policy
from common import SIZE
from measure import Phases, Way
from optimise import Training, make_training

BATCH = 256


def settings(net: str, batch_size: int, precision: str, *argv: str) -> Namespace:
    """train.py's flags, parsed."""
    given = ["--net", net, "--batch-size", str(batch_size), "--precision", precision, *argv]
    return flags.parse_flags(given)


def training(dataset: data.Dataset, args: Namespace, radius: float = 0.0) -> Way:
    """train.py's own steps, sharpness-aware if there is a radius."""
    learner = _learner(dataset, args)
    machine.be_deterministic(args.deterministic)
    take_step = step.make_step(learner, dataset, args, radius)

    def way() -> Iterator[Tensor]:
        machine.be_deterministic(args.deterministic)
        learner.net.train()
        while True:
            for inputs, labels in epochs.training_batches(dataset, args):
                yield take_step(inputs, labels)
                learner.scheduler.step()

    return way


def phases(dataset: data.Dataset, args: Namespace) -> Phases:
    """train.py's own step in five parts, the first two for all batches augmented at once."""
    device, batch = dataset.device, args.batch_size
    images = batch * epochs.batches_at_once(batch, device)
    index = torch.randint(len(dataset.train_images), (images,), device=device)
    learner, policy = _learner(dataset, args), flags.policy_of(args)
    learner.net.train()
    between: dict[str, Tensor] = {}

    def gather() -> None:
        between["images"] = dataset.train_images.index_select(0, index)
        between["labels"] = dataset.train_labels[index]

    def augment() -> None:
        between["inputs"] = step.prepared(between["images"], policy, dataset.mean, dataset.std)

    def forward() -> None:
        logits = step.forward(learner.net, between["inputs"][:batch], args.precision)
        between["loss"] = F.cross_entropy(logits, between["labels"][:batch])

    def backward() -> None:
        between.pop("loss").backward()

    def optimiser() -> None:
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

    return {
        **{part.__name__: (part, images) for part in (gather, augment)},
        **{part.__name__: (part, batch) for part in (forward, backward, optimiser)},
    }


def layers(dataset: data.Dataset, args: Namespace, names: list[str]) -> Phases:
    """Forward and backward of each of the net's layers on its own, with the input that a batch
    gives it; norms without their skip."""
    learner, batch = _learner(dataset, args), args.batch_size
    learner.net.train()
    phases: Phases = {}

    def add(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs = given[0].detach().requires_grad_(given[0].requires_grad)
        wanted = [x for x in (inputs, *layer.parameters()) if x.requires_grad]
        between: dict[str, Tensor] = {}

        def forward() -> None:
            with step.autocast(inputs.device, args.precision):
                between["outputs"] = layer(inputs)

        def backward() -> None:
            outputs = between.pop("outputs")
            if wanted:  # not a pooling of the images themselves
                torch.autograd.grad(outputs, wanted, outputs.detach())

        phases[f"{name} forward"], phases[f"{name} backward"] = (forward, batch), (backward, batch)

    hooks = [
        learner.net.get_submodule(name).register_forward_pre_hook(partial(add, name))
        for name in names
    ]
    images = dataset.train_images[:batch]
    step.forward(learner.net, data.normalize(images, dataset.mean, dataset.std), args.precision)
    for hook in hooks:
        hook.remove()
    return phases


def plain_loop(dataset: data.Dataset, args: Namespace) -> Way:
    """The loop that one writes first around the same net: no augmentation, all defaults. On a GPU
    its norms and mirrored weights still run our kernels, its depthwise convolutions do not."""
    device = dataset.device
    net = model.build(args.net, len(dataset.classes)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    dtype = machine.DTYPES[args.precision]

    def way() -> Iterator[Tensor]:
        net.train()
        for index in _index_batches(dataset, args.batch_size):
            inputs = data.normalize(dataset.train_images[index], dataset.mean, dataset.std)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(net(inputs), dataset.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach()

    return way


def augmentations(dataset: data.Dataset, cores: int) -> dict[str, Way]:
    """Batches of uint8 images flipped, shifted, scaled, rotated, cut and normalised: by ours; by
    albumentations, image by image on the host; by kornia; by torchvision, which draws one set of
    parameters for a whole batch and has no mirrored border."""
    policy, mean, std = Policy(), dataset.mean, dataset.std

    def batched(augment: Callable[[Tensor], Tensor]) -> Way:
        def way() -> Iterator[Tensor]:
            for index in _index_batches(dataset, BATCH):
                yield augment(dataset.train_images.index_select(0, index))

        return way

    def albumentations(workers: int) -> Way:
        import reference

        def way() -> Iterator[Tensor]:
            while True:
                batches = islice(_index_batches(dataset, BATCH), 1000)
                for images, _ in reference.augmented(dataset, batches, policy, workers):
                    yield images

        return way

    ways = {"ours": batched(lambda images: step.prepared(images, policy, mean, std))}
    ways["albumentations, one process"] = albumentations(0)
    for workers in sorted({2, cores}):
        ways[f"albumentations, {workers} workers"] = albumentations(workers)
    for name, make in (("kornia", _kornia), ("torchvision v2, a draw a batch", _torchvision)):
        transforms = make(policy)
        ways[name] = batched(lambda x, t=transforms: t(data.normalize(x, mean, std)))
    return ways


def _kornia(policy: Policy) -> nn.Module:
    import kornia.augmentation as K

    area = policy.cutout**2 / SIZE**2
    scale = (1 - policy.scale, 1 + policy.scale)
    return nn.Sequential(
        K.RandomHorizontalFlip(policy.flip_p),
        K.RandomAffine(
            policy.rotate,
            (policy.shift, policy.shift),
            scale * 2,
            padding_mode="reflection",
            align_corners=True,
            p=policy.affine_p,
        ),
        K.RandomErasing((area, area), (1.0, 1.0), p=policy.cutout_p),
    )


def _torchvision(policy: Policy) -> nn.Module:
    from torchvision.transforms import InterpolationMode, v2

    affine = v2.RandomAffine(
        policy.rotate,
        (policy.shift, policy.shift),
        (1 - policy.scale, 1 + policy.scale),
        interpolation=InterpolationMode.BILINEAR,
    )
    area = policy.cutout**2 / SIZE**2
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(policy.flip_p),
            v2.RandomApply([affine], policy.affine_p),
            v2.RandomErasing(policy.cutout_p, (area, area), (1.0, 1.0)),
        ]
    )


def _index_batches(dataset: data.Dataset, batch_size: int) -> Iterator[Tensor]:
    images = dataset.train_images
    while True:
        yield from data.epoch_batches(len(images), batch_size, images.device)


def _learner(dataset: data.Dataset, args: Namespace) -> Training:
    net = model.build(args.net, len(dataset.classes), args.dropout)
    return make_training(net, args, dataset.device, steps=10_000)
