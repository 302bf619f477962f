"""Checkpoints and nets: saved whole or not at all, loaded without running any code in them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import UserError, written_whole
from model import build

FORMAT = 1  # of both files; raise when their keys change


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, a dict of tensors, strings, numbers, lists and dicts, with the format."""
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises UserError where the file is not such a one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is no whole checkpoint of atrous: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is no checkpoint of atrous")
    if content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']}, newer than this atrous ({FORMAT})")
    return content


def load_net(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained net of a `model.pt`, in evaluation mode, and the file's content.

    Raises UserError where the file is not such a one.
    """
    content = load(path)
    try:
        net = build(content["net"], content["num_classes"])
        net.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} holds no net that fits this atrous: {reason}") from error
    return net.eval(), content
