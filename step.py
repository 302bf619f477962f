"""What is done to one batch: the training step, and the way of images through the net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranks
from augment import Policy, apply, jitter_colours, sample
from data import Dataset, normalize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVALUATION_BATCH = 2000


def augmented(images: Tensor, policy: Policy, mean: Tensor, std: Tensor) -> Tensor:
    """Newly augmented images float32 (N, 3, H, W), normalised, of images uint8 (N, 3, H, W)."""
    params = sample(policy, len(images), images.shape[-1], images.device)
    if policy.rgb_shift_p or policy.brightness_contrast_p:
        images = jitter_colours(images, params)
    fill = 0.0 if policy.fill is None else ((policy.fill - mean) / std).view(-1, 1, 1)
    return apply(normalize(images, mean, std), params, fill, policy.border)


def forward(net: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Logits float32 (N, classes) of normalised images float32 (N, 3, H, W)."""
    inputs = inputs.to(dtype=DTYPES[precision], memory_format=torch.channels_last)
    with torch.autocast(inputs.device.type, DTYPES[precision], enabled=precision != "fp32"):
        return net(inputs).float()


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: Tensor,
    labels: Tensor,
    precision: str,
    label_smoothing: float,
) -> Tensor:
    """One optimiser step; float32 (3,), left on the device: the batch's mean loss, its count of
    right answers, and 1 where the loss scaler skipped the step because a gradient overflowed."""
    logits = forward(net, inputs, precision)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    skipped = torch.zeros_like(loss)
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(p.grad for p in net.parameters() if p.grad is not None)
        skipped = 1 - norm.isfinite().float()
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum().float(), skipped])


@torch.no_grad()
def predict_logits(net: nn.Module, data: Dataset, precision: str, flip: bool = False) -> Tensor:
    """Logits float32 (N, classes) of the test images; `flip` averages in their mirror images'.

    Several processes share the batches and sum what each has, zero where it has nothing.
    """
    net.eval()
    images = data.test_images
    logits = torch.zeros(len(images), len(data.classes), device=images.device)
    for start in ranks.share(range(0, len(images), EVALUATION_BATCH)):
        batch = slice(start, start + EVALUATION_BATCH)
        inputs = normalize(images[batch], data.mean, data.std)
        logits[batch] = forward(net, inputs, precision)
        if flip:
            logits[batch] = (logits[batch] + forward(net, inputs.flip(3), precision)) / 2
    return ranks.total(logits)
