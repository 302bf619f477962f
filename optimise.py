"""What changes as a net learns – weights, optimiser, schedule, loss scale – and its saved state."""

import warnings
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, StepLR

import onednn
from machine import triton_kernels


@dataclass
class Training:
    """All that changes during a run, and what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]] = field(default_factory=list)
    elapsed: float = 0.0  # seconds spent on preparing steps, on epochs and evaluations
    prepared: float = 0.0  # of these, before the first step
    reached: dict[str, float] | None = None  # when --target was: epoch, seconds since `prepared`

    def state(self) -> dict[str, Any]:
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in vars(self).items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # saved as a tensor if a CUDA graph read it
            group["fused"] = self.optimizer.defaults["fused"]  # for this device, not the old one


def make_training(net: nn.Module, args: Namespace, device: torch.device, steps: int) -> Training:
    """Move `net` to `device`, have its slow layers taken over, and make its optimiser, schedule and
    loss scaler. `steps` is the number of optimiser steps in an epoch."""
    net.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        onednn.take_over(net)
    elif triton_kernels(next(net.parameters())):
        import depthwise

        depthwise.take_over(net)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if scaler.is_enabled():  # it may skip the first step, of which PyTorch would warn
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    optimizer = Muon(
        parameter_groups(net, args),
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
        # The scaler lets a fused optimiser skip steps by itself: too late for Muon's momentum.
        fused=(device.type == "cuda" and not scaler.is_enabled()) or None,
    )
    scheduler = make_scheduler(optimizer, args, steps)
    return Training(net, optimizer, scheduler, scaler)


def parameter_groups(net: nn.Module, args: Namespace) -> list[dict[str, Any]]:
    """Groups of weights, of one-dimensional parameters, which never decay, and, with Muon, of the
    kernels that mix channels."""
    dense = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    by_muon = {p for m in dense for p in m.parameters()} if args.optimizer == "muon" else set()
    weights = [p for p in net.parameters() if p.ndim >= 2]
    groups = [
        {"params": [p for p in weights if p not in by_muon], "weight_decay": args.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim < 2]},
    ]
    if by_muon:
        rates = {"lr": MUON_LR * args.lr, "weight_decay": MUON_DECAY * args.weight_decay}
        momenta = {"momentum": 0.0, "muon_momentum": args.momentum}
        groups.append({"params": [p for p in weights if p in by_muon], **rates, **momenta})
    return groups


MUON_LR, MUON_DECAY = 1 / 10, 200  # times SGD's: 0.4 and 5e-4 become 0.04 and 0.1


class Muon(torch.optim.SGD):
    """SGD; but in groups with a `muon_momentum` each kernel's gradient is first replaced by its
    Nesterov momentum, orthogonalised as a matrix with a row for each output (Jordan 2024,
    kellerjordan.github.io/posts/muon). The `momentum` of such a group is 0, as its gradients have
    it already.

    torch.optim.Muon accepts only matrices and reads rates on the host, which a CUDA graph cannot.
    """

    # Unwrapped, for the wrappers that hide these from torch.compile import it: 150 MiB, 1 to 2 s.
    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            kernels = [kernel for kernel in group["params"] if kernel.grad is not None]
            if kernels and "muon_momentum" in group:
                self._make_orthogonal(kernels, group["muon_momentum"])
        unwrap(torch.optim.SGD.step)(self)

    def _make_orthogonal(self, kernels: list[Tensor], momentum: float) -> None:
        gradients = [kernel.grad for kernel in kernels]
        for kernel in kernels:
            if "momentum_buffer" not in self.state[kernel]:
                self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)
        buffers = [self.state[kernel]["momentum_buffer"] for kernel in kernels]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(gradients, buffers, alpha=momentum)
        alike = defaultdict(list)
        for gradient in gradients:
            alike[gradient.shape].append(gradient)
        stacks = [torch.stack(group).flatten(2) for group in alike.values()]
        stacks = orthogonal_at_once(stacks) if stacks[0].is_cuda else map(orthogonal, stacks)
        for group, stack in zip(alike.values(), stacks, strict=True):
            _, rows, columns = stack.shape
            stack = stack * max(1, rows / columns) ** 0.5
            torch._foreach_copy_(group, stack.reshape(-1, *group[0].shape).unbind())


def orthogonal_at_once(stacks: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of each stack, all padded with zeros into one: a GPU takes as long to multiply
    a few small matrices as many."""
    rows, columns = (max(stack.shape[dim] for stack in stacks) for dim in (1, 2))
    padded = [F.pad(s, (0, columns - s.shape[2], 0, rows - s.shape[1])) for s in stacks]
    found = orthogonal(torch.cat(padded)).split([len(stack) for stack in stacks])
    return [x[:, : s.shape[1], : s.shape[2]] for x, s in zip(found, stacks, strict=True)]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with all but their smallest singular values brought near 1, by
    five Newton–Schulz iterations with the coefficients of Jordan 2024."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x


def make_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps: int) -> LRScheduler:
    """The schedule, stepped once a batch: `onecycle` rises for a quarter of the run, then falls to
    zero (Smith and Topin 2018); `cyclic` is triangles of eight to fifteen epochs, or one over a
    shorter run (Smith 2017); `step` halves the rate every six epochs."""
    total = max(2, args.epochs * steps)  # a lone step would have OneCycleLR's lowest rate
    highest = [group["lr"] for group in optimizer.param_groups]
    if args.schedule == "onecycle":
        rise = 0.25 if total != 4 else 0.3  # OneCycleLR divides by rise × total - 1, not to be 0
        return OneCycleLR(
            optimizer, highest, total_steps=total, pct_start=rise, cycle_momentum=False
        )
    if args.schedule == "cyclic":
        half = total // (2 * max(1, args.epochs // 8))
        lowest = [rate / 25 for rate in highest]
        return CyclicLR(optimizer, lowest, highest, step_size_up=half, cycle_momentum=False)
    return StepLR(optimizer, step_size=6 * steps, gamma=0.5)
