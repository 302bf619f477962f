"""What is done to a batch: preparation, the forward pass, the training step."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranks
from augment import Policy, apply, jitter_colours, sample, sample_colours
from data import Dataset, normalize
from machine import DTYPES
from optimise import Training

Step = Callable[[Tensor, Tensor], Tensor]  # takes inputs and labels, returns what train_step does


def prepared(images: Tensor, policy: Policy | None, mean: Tensor, std: Tensor) -> Tensor:
    """Images uint8 (N, 3, H, W) as the net trains on them: float32, normalised and, if there is a
    policy, freshly augmented."""
    if policy is None:
        return normalize(images, mean, std)
    if policy.changes_colours:
        images = jitter_colours(images, sample_colours(policy, len(images), images.device))
    params = sample(policy, len(images), images.shape[-1], images.device)
    fill = mean.view(-1, 1, 1) if policy.fill is None else policy.fill
    return normalize(apply(images, params, fill, policy.border), mean, std)


def forward(net: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Logits float32 (N, classes) of normalised images float32 (N, 3, H, W)."""
    inputs = inputs.to(dtype=DTYPES[precision], memory_format=torch.channels_last)
    with autocast(inputs.device, precision):
        return net(inputs).float()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Without the weight cache, which a CUDA graph must not keep; each weight is used only once."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, DTYPES[precision], enabled, cache_enabled=False)


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: Tensor,
    labels: Tensor,
    precision: str,
    label_smoothing: float,
    radius: float,
) -> Tensor:
    """Take one optimiser step. Returns float32 (3,), left on the device: the batch's mean loss, its
    count of right answers, and 1 if the loss scaler skipped the step because a gradient overflowed.

    With a `radius` the gradient is taken after moving the weights that far uphill: sharpness-aware
    minimisation (Foret et al. 2021, arxiv.org/abs/2010.01412). The uphill direction, the loss and
    the share of right answers then come from the first quarter of the batch.
    """

    def compute_gradients(count: int) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)  # first: old gradients would fragment memory
        logits = forward(net, inputs[:count], precision)
        loss = F.cross_entropy(logits, labels[:count], label_smoothing=label_smoothing)
        scaler.scale(loss).backward()
        ranks.average_gradients(net)
        return loss, logits

    batch = len(labels)
    count = math.ceil(batch / 4) if radius else batch
    loss, logits = compute_gradients(count)
    if radius:
        with uphill(net, radius):
            compute_gradients(batch)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()  # lowers the scale if it skipped the step
    skipped = torch.full_like(loss, scaler.get_scale() < scale)
    right = (logits.argmax(1) == labels[:count]).sum() * (batch / count)
    return torch.stack([loss.detach(), right, skipped])


@contextmanager
def uphill(net: nn.Module, radius: float) -> Iterator[None]:
    """Within this context the weights are moved along their gradient by `radius`, in Euclidean norm
    over them all, and BatchNorm updates no statistics. Then the weights are restored exactly."""
    weights = [p for p in net.parameters() if p.grad is not None]
    gradients = [p.grad for p in weights]
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    length = nn.utils.get_total_norm(gradients).clamp(min=1e-12)
    with torch.no_grad():
        before = torch._foreach_mul(weights, 1)  # copies, on a GPU all in a few launches
        torch._foreach_add_(weights, torch._foreach_mul(gradients, radius / length))
    del gradients  # or they would outlive the next zero_grad
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


def make_step(training: Training, dataset: Dataset, args: Namespace, radius: float) -> Step:
    """The training step for a batch: prepared inputs float32 (B, 3, H, W), labels int64 (B,).

    On one GPU it is a CUDA graph: so small a net's kernel launches take longer than its arithmetic.
    With fp16, whose loss scaler decides on the host, or several processes it stays eager.
    """
    net = torch.compile(training.net, dynamic=False) if args.compile else training.net
    learning = net, training.optimizer, training.scaler

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        return train_step(*learning, inputs, labels, args.precision, args.label_smoothing, radius)

    eager = args.eager or training.scaler.is_enabled() or ranks.count() > 1
    if eager or not dataset.train_images.is_cuda:
        return step
    inputs = normalize(dataset.train_images[: args.batch_size], dataset.mean, dataset.std)
    return captured(step, training, inputs, dataset.train_labels[: args.batch_size])


def captured(step: Step, training: Training, inputs: Tensor, labels: Tensor) -> Step:
    """`step` as one CUDA graph, for batches of the size of `inputs` (PyTorch's notes on CUDA,
    "Whole-network capture"). `training` is left as it was, except that momenta exist, at zero,
    and learning rates are kept on the device: a graph reads them there anew, but would replay a
    Python number for ever."""
    inputs, labels = inputs.clone(), labels.clone()
    optimizer = training.optimizer
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=inputs.device)
    for weight in training.net.parameters():  # a step that creates these differs from later ones
        optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    changing = [*training.net.parameters(), *training.net.buffers(), *momenta]
    before = [tensor.detach().clone() for tensor in changing]
    training.net.train()
    stream = warmed_up(lambda: step(inputs, labels))
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        figures = step(inputs, labels)
    with torch.no_grad():
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)

    def replay(new_inputs: Tensor, new_labels: Tensor) -> Tensor:
        inputs.copy_(new_inputs)
        labels.copy_(new_labels)
        graph.replay()
        return figures.clone()

    replay.keeps = step, training  # a graph by itself does not keep their memory alive
    return replay


def warmed_up(job: Callable[[], object]) -> torch.cuda.Stream:
    """The stream to capture `job` on, which ran there until libraries had chosen algorithms."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    return stream


@cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a 32 MiB workspace for each stream that it has seen."""
    return torch.cuda.Stream()


@torch.no_grad()
def predict_logits(net: nn.Module, dataset: Dataset, precision: str, flip: bool = False) -> Tensor:
    """Logits float32 (N, classes) of the test images, or with `flip` of their mirror images.

    Several processes share the batches, then sum their logits, zero for the others' images.
    """
    net.eval()
    images = dataset.test_images
    size = min(500 if images.device.type == "cpu" else 5000, math.ceil(len(images) / ranks.count()))
    logits = torch.zeros(len(images), len(dataset.classes), device=images.device)
    for start in ranks.share(range(0, len(images), size)):
        batch = slice(start, start + size)
        inputs = normalize(images[batch], dataset.mean, dataset.std)
        logits[batch] = forward(net, inputs.flip(3) if flip else inputs, precision)
    return ranks.total(logits)
