"""Which pixels of an image an output depends on, along each axis: the arithmetic of intervals."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """Along one axis, the inputs that output i depends on: for each `jump: (low, high)` in `spans`
    those from i·jump + low to i·jump + high. Jump 0 is what a global pooling saw; without spans the
    output depends on no input."""

    spans: dict[int, tuple[int, int]]

    def through(self, kernel: int, stride: int, dilation: int, padding: int) -> "Field":
        """The field after a window of `kernel` taps, the first of them `padding` before the map
        (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks")."""
        first, last = -padding, dilation * (kernel - 1) - padding
        spans = self.spans.items()
        return Field({j * stride: (low + j * first, high + j * last) for j, (low, high) in spans})

    def pooled(self, size: int, pixels: int) -> "Field":
        """The field after a global pooling of a map of `size` outputs, on an image of `pixels`."""
        (first, _), (_, last) = self.extent(0), self.extent(size - 1)
        return Field({0: (max(first, 0), min(last, pixels - 1))})

    def extent(self, index: int) -> tuple[int, int]:
        """First and last input that output `index` depends on."""
        ends = [(index * j + low, index * j + high) for j, (low, high) in self.spans.items()]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @property
    def jump(self) -> int:
        """0 if the field does not slide, as after a global pooling."""
        return max(self.spans, default=0)


Fields = tuple[Field, Field]  # y, x
NOTHING = Field({}), Field({})


def union(fields: list[Fields]) -> Fields:
    axes = []
    for parts in zip(*fields, strict=True):
        spans: dict[int, tuple[int, int]] = {}
        for jump, (low, high) in (span for part in parts for span in part.spans.items()):
            known = spans.get(jump, (low, high))
            spans[jump] = min(low, known[0]), max(high, known[1])
        axes.append(Field(spans))
    return axes[0], axes[1]
