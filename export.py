"""Carry a trained net to ONNX: pixels in, probabilities out, checked before it is called done.

python export.py RUN [--int8]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
from common import SIZE, Parser, UserError, exit_status, require, written_whole

CHECKED = 1000  # images or so that PyTorch and onnxruntime are compared on, and that calibrate int8
TOLERANCE = 1e-4  # of a probability


class Classifier(nn.Module):
    """The net between pixels uint8 (N, 3, 32, 32) and probabilities float32 (N, classes)."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(data.normalize(images, self.mean, self.std)).softmax(1)


def to_onnx(classifier: Classifier, metadata: dict[str, str]) -> bytes:
    import onnx

    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    program = torch.onnx.export(
        classifier,
        (images,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def to_int8(model: bytes, images: np.ndarray) -> bytes:
    """Weights and activations of `model` as int8, by onnxruntime's static quantisation, calibrated
    on `images` uint8 (N, 3, 32, 32)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, max(1, len(images) // 100)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, quantised = (Path(folder, f"{name}.onnx") for name in "abc")
        source.write_bytes(model)
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            quantised,
            Batches(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add"],
        )
        return quantised.read_bytes()


def session(model: bytes, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The probabilities that onnxruntime gets of images uint8 (N, 3, 32, 32), on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: runtime.run(None, {"images": images})[0]


def in_batches(classify: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    return np.concatenate([classify(images[i : i + 500]) for i in range(0, len(images), 500)])


def export(run: Path, int8: bool) -> None:
    """Write RUN/model.onnx, and RUN/model.int8.onnx if asked for, each with its figures."""
    require("onnx", "onnxscript", "onnxruntime")
    net, content = checkpoint.load_net(run / "model.pt")
    dataset = checkpoint.load_data(run, torch.device("cpu"))
    classifier = Classifier(net, content["mean"], content["std"]).eval()
    metadata = {key: content[key] for key in ("net", "classes")} | {"data": dataset.name}
    blob = to_onnx(classifier, {key: json.dumps(value) for key, value in metadata.items()})
    images, labels = dataset.test_images.numpy(), dataset.test_labels.numpy()
    some = images[:: max(1, len(images) // CHECKED)]  # the test images are sorted by class
    with torch.no_grad():
        expected = classifier(torch.from_numpy(some)).numpy()
    difference = np.abs(in_batches(session(blob), some) - expected).max()
    if not difference <= TOLERANCE:
        raise UserError(f"onnxruntime differs from PyTorch by {difference:.1e}: nothing is written")
    print(f"{len(some):,} test images: at most {difference:.1e} from PyTorch's probabilities")
    models = {"model.onnx": blob}
    if int8:
        step = max(1, len(dataset.train_images) // CHECKED)
        models["model.int8.onnx"] = to_int8(blob, dataset.train_images[::step].numpy())
    for name, model in models.items():
        right = in_batches(session(model), images).argmax(1) == labels
        with written_whole(run / name) as file:
            file.write(model)
        rate = one_core_rate(model, images)
        print(
            f"{run / name}: {len(model) / 1000:.0f} kB, {right.mean():.2%} of {len(images):,} test "
            f"images of {dataset.name}, {rate:,.0f} images/s on one CPU core"
        )


def one_core_rate(model: bytes, images: np.ndarray) -> float:
    """Images/s in batches of 100: the median of nine, after a warm-up."""
    classify, batch = session(model, threads=1), images[:100]
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        classify(batch)
        seconds.append(time.perf_counter() - start)
    return len(batch) / statistics.median(seconds[1:])


def main(argv: list[str]) -> int:
    """The exit status: 0, or 2 for a user's mistake."""

    def job() -> None:
        parser = Parser(prog="export.py", description="Carry a trained net to ONNX.")
        parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
        parser.add_argument("--int8", action="store_true", help="a quantised one too")
        args = parser.parse_args(argv)
        export(args.run, args.int8)

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
