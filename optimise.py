"""What changes as a net learns – weights, optimiser, schedule, loss scale – and its state."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, StepLR

import ranks


@dataclass
class Training:
    """What a run changes as it goes, and what a checkpoint holds: all but `parallel`."""

    net: nn.Module
    parallel: nn.Module  # the net, averaging gradients over the processes
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]] = field(default_factory=list)
    elapsed: float = 0.0  # seconds of preparing the step, of epochs and evaluations
    reached: dict[str, float] | None = None  # epoch and seconds at which --target was

    def state(self) -> dict[str, Any]:
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in vars(self).items()
            if name != "parallel"
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.state():
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # a tensor where a CUDA graph read it
            group["fused"] = self.optimizer.defaults["fused"]  # of this device, not of that one


def make_training(net: nn.Module, args: Namespace, device: torch.device, steps: int) -> Training:
    """`steps` is the number of optimiser steps in an epoch."""
    net.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        keep_depthwise_in_float32(net)
    weights = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": args.weight_decay}, {"params": others}],
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    scheduler = make_scheduler(optimizer, args, steps)
    return Training(net, ranks.parallel(net), optimizer, scheduler, scaler)


def keep_depthwise_in_float32(net: nn.Module) -> None:
    """Have depthwise convolutions computed in float32 under autocast as well: on a CPU their
    backward in bfloat16 takes up to 40 times as long (3×3, stride 2, 64 channels at 16×16, batch
    256, torch 2.15, AMX: 54 ms against 1.3), while dense ones take a quarter of it."""

    def in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.forward = partial(in_float32, module.forward)


def make_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps: int) -> LRScheduler:
    """Stepped once a batch: `onecycle` rises for a quarter of the run and falls to zero (Smith and
    Topin 2018); `cyclic` is triangles of eight to fifteen epochs (Smith 2017); `step` halves the
    rate every six epochs."""
    total = args.epochs * steps
    if args.schedule == "onecycle":
        rise = 0.25 if total != 4 else 0.3  # OneCycleLR divides by rise × total - 1
        return OneCycleLR(
            optimizer, args.lr, total_steps=total, pct_start=rise, cycle_momentum=False
        )
    if args.schedule == "cyclic":
        half = max(1, total // (2 * max(1, args.epochs // 8)))
        return CyclicLR(optimizer, args.lr / 25, args.lr, step_size_up=half, cycle_momentum=False)
    return StepLR(optimizer, step_size=6 * steps, gamma=0.5)
