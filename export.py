"""Export a trained net to ONNX: pixels in, probabilities out, checked before it is written.

python export.py RUN [--int8]
"""

import json
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import checkpoint
import data
from common import SIZE, Parser, UserError, require, with_exit_status, written_whole

if TYPE_CHECKING:
    from onnx import ModelProto

CHECKED = 1000  # images to compare PyTorch and onnxruntime on, and to calibrate int8 with
TOLERANCE = 1e-4  # of a probability


class Classifier(nn.Module):
    """The net from pixels uint8 (N, 3, 32, 32) to probabilities float32 (N, classes)."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(data.normalize(images, self.mean, self.std)).softmax(1)


def to_onnx(classifier: Classifier, metadata: dict[str, str]) -> bytes:
    import onnx

    for layer in filter(parametrize.is_parametrized, classifier.modules()):
        for name in list(layer.parametrizations):
            parametrize.remove_parametrizations(layer, name)
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    program = torch.onnx.export(
        classifier,
        (images,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with this machine's paths
    onnx.helper.set_model_props(model, metadata)
    return halved(model)


def halved(model: "ModelProto") -> bytes:
    """The model with only one half of each weight that mirror.py made, and the few operations that
    make the other half from it, which onnxruntime runs once, when it loads the file."""
    from onnx import checker, helper
    from onnx.numpy_helper import from_array, to_array

    graph, nodes, tensors = model.graph, [], []
    backwards = {"last": -1, "first": np.iinfo(np.int64).min, "width": 3, "step": -1}
    for tensor in graph.initializer:
        weight, name = to_array(tensor), tensor.name
        shift = mirroring(weight)
        if shift is None:
            tensors.append(tensor)
            continue
        half, other = f"{name}_half", f"{name}_mirrored"
        tensors.append(from_array(weight[: len(weight) // 2], half))
        nodes.append(helper.make_node("Slice", [half, *backwards], [other]))
        if shift:
            parts = [f"{name}_alike", f"{name}_swapped"]
            nodes.append(helper.make_node("Split", [other], parts, axis=1, num_outputs=2))
            other = f"{name}_other"
            nodes.append(helper.make_node("Concat", parts[::-1], [other], axis=1))
        nodes.append(helper.make_node("Concat", [half, other], [name], axis=0))
    tensors += [from_array(np.array([n]), name) for name, n in backwards.items() if nodes]
    for field, content in ((graph.node, [*nodes, *graph.node]), (graph.initializer, tensors)):
        del field[:]
        field.extend(content)
    del graph.value_info[:]  # shapes, which a reader infers
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


def mirroring(weight: np.ndarray) -> int | None:
    """By how many inputs to roll the mirror image of the first half of a convolution's weight
    (C, D, k, k) to get the second half: 0 or D / 2, or None if the weight is not made so."""
    if weight.ndim == 4:
        half, other = np.array_split(weight, 2)
        for shift in (0, weight.shape[1] // 2):
            if np.array_equal(other, np.roll(half[..., ::-1], shift, axis=1)):
                return shift
    return None


def to_int8(model: bytes, images: np.ndarray) -> bytes:
    """`model` with int8 weights and activations, by onnxruntime's static quantisation, calibrated
    on `images` uint8 (N, 3, 32, 32). Weights have 7 bits: a CPU without VNNI adds two products in
    16 bits, which 8-bit weights would overflow (accuracy 89.53 %, not 92.03)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(np.array_split(images, max(1, len(images) // 100)))

    class Batches(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch} for batch in batches), None)

    with tempfile.TemporaryDirectory() as folder:
        names = "given.onnx", "prepared.onnx", "quantised.onnx"
        given, prepared, quantised = (Path(folder, name) for name in names)
        given.write_bytes(model)
        # Its own shape inference, which only transformers need, fails behind a global maximum.
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Batches(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add"],
        )
        return halved(without_zeros(onnx.load(quantised)))


def without_zeros(model: "ModelProto") -> "ModelProto":
    """`model` without the per-channel zero points of weights and biases that are 0, the default,
    save those of the classifier: onnxruntime 1.21 multiplies no matrices without."""
    from onnx.numpy_helper import to_array

    tensors, nodes = model.graph.initializer, model.graph.node
    channels = {tensor.name: tensor for tensor in tensors if len(tensor.dims) == 1}
    multiplied = {name for node in nodes if node.op_type == "Gemm" for name in node.input}
    for node in nodes:
        point = channels.get(node.input[-1]) if node.op_type == "DequantizeLinear" else None
        if point and node.output[0] not in multiplied and not to_array(point).any():
            node.input.pop()
            tensors.remove(point)
    return model


def session(model: bytes, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images uint8 (N, 3, 32, 32) to onnxruntime's probabilities, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: runtime.run(None, {"images": images})[0]


def in_batches(classify: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    return np.concatenate([classify(images[i : i + 500]) for i in range(0, len(images), 500)])


def drawn(images: np.ndarray) -> np.ndarray:
    """CHECKED of the images, or all if fewer: a fixed random draw, since they may be sorted."""
    return images[np.random.default_rng(0).permutation(len(images))[:CHECKED]]


def export(run: Path, int8: bool) -> None:
    """Write RUN/model.onnx and, if `int8`, RUN/model.int8.onnx, and print the figures of each."""
    require("onnx", "onnxscript", "onnxruntime")
    net, content = checkpoint.load_net(run / "model.pt")
    dataset = checkpoint.load_data(run)
    classifier = Classifier(net, content["mean"], content["std"]).eval()
    metadata = {key: content[key] for key in ("net", "classes")} | {"data": dataset.name}
    blob = to_onnx(classifier, {key: json.dumps(value) for key, value in metadata.items()})
    images, labels = dataset.test_images.numpy(), dataset.test_labels.numpy()
    some = drawn(images)
    with torch.no_grad():
        expected = classifier(torch.from_numpy(some)).numpy()
    difference = np.abs(in_batches(session(blob), some) - expected).max()
    if not difference <= TOLERANCE:
        raise UserError(f"onnxruntime differs from PyTorch by {difference:.1e}: nothing written")
    print(f"{len(some):,} images: probabilities within {difference:.1e} of PyTorch's")
    models = {"model.onnx": blob}
    if int8:
        models["model.int8.onnx"] = to_int8(blob, drawn(dataset.train_images.numpy()))
    for name, model in models.items():
        right = in_batches(session(model), images).argmax(1) == labels
        with written_whole(run / name) as file:
            file.write(model)
        classify, batch = session(model, threads=1), images[:100]
        alone, together = median_seconds(classify, batch[:1]), median_seconds(classify, batch)
        print(
            f"{run / name}: {len(model) / 1000:.0f} kB\n"
            f"  {right.mean():.2%} accuracy on the {dataset.tested_on} of {dataset.name}\n"
            f"  one CPU core: {1000 * alone:.1f} ms for one image, "
            f"{len(batch) / together:,.0f} images/s in batches of {len(batch)}"
        )


def median_seconds(classify: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """The median of nine rounds, after one to warm up."""
    return statistics.median(timeit.repeat(lambda: classify(images), repeat=10, number=1)[1:])


@with_exit_status
def main(argv: list[str]) -> None:
    parser = Parser(description="Export a trained net to ONNX.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--int8", action="store_true", help="write a quantised int8 model too")
    args = parser.parse_args(argv)
    export(args.run, args.int8)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
