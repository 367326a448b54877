"""Tensor layouts of well-known models: the shapes that a gradient exchange of a real training run has, no weights.

Each is a list of (name, shape), float32, in the order of the forward pass.
"""

import math
from collections.abc import Callable, Iterator

Layout = list[tuple[str, tuple[int, ...]]]

_FLAT_TENSOR = 4_000_000


def mlp() -> Layout:
    """The 784-128-10 perceptron: 101,770 parameters in 4 tensors."""
    return [("fc1.w", (784, 128)), ("fc1.b", (128,)), ("fc2.w", (128, 10)), ("fc2.b", (10,))]


def resnet50() -> Layout:
    """ResNet-50 v1.5 (arXiv:1512.03385, table 1; stride in the 3x3): 25,557,032 parameters in 161 tensors."""
    return list(_resnet50())


def _resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _convolution("stem", 3, 64, kernel=7)
    channels = 64
    for stage, (depth, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for index in range(depth):
            name = f"stage{stage}.{index}"
            yield from _convolution(f"{name}.reduce", channels, width, kernel=1)
            yield from _convolution(f"{name}.spatial", width, width, kernel=3)
            yield from _convolution(f"{name}.expand", width, 4 * width, kernel=1)
            if index == 0:
                yield from _convolution(f"{name}.shortcut", channels, 4 * width, kernel=1)
            channels = 4 * width
    yield "head.w", (1000, channels)
    yield "head.b", (1000,)


def _convolution(name: str, inputs: int, outputs: int, *, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution without bias and its batch normalization."""
    yield f"{name}.w", (outputs, inputs, kernel, kernel)
    yield f"{name}.scale", (outputs,)
    yield f"{name}.bias", (outputs,)


def gpt2() -> Layout:
    """GPT-2 small with a tied head: 124,439,808 parameters in 148 tensors."""
    return list(_gpt2(width=768, layer_count=12, vocabulary=50257, context=1024))


def _gpt2(*, width: int, layer_count: int, vocabulary: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embedding", (vocabulary, width)
    yield "position_embedding", (context, width)
    for layer in range(layer_count):
        yield from _norm(f"layer{layer}.norm1", width)
        yield from _dense(f"layer{layer}.qkv", width, 3 * width)
        yield from _dense(f"layer{layer}.attention_out", width, width)
        yield from _norm(f"layer{layer}.norm2", width)
        yield from _dense(f"layer{layer}.mlp_in", width, 4 * width)
        yield from _dense(f"layer{layer}.mlp_out", 4 * width, width)
    yield from _norm("final_norm", width)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.scale", (width,)
    yield f"{name}.bias", (width,)


def _dense(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.w", (inputs, outputs)
    yield f"{name}.b", (outputs,)


LAYOUTS: dict[str, Callable[[], Layout]] = {"mlp": mlp, "resnet50": resnet50, "gpt2": gpt2}


def parameter_count(layout: Layout) -> int:
    """The number of parameters in a layout."""
    return sum(math.prod(shape) for _, shape in layout)


def layout_of(name: str) -> Layout:
    """The layout of a name of `LAYOUTS`, or of "flat:N": N parameters in tensors of up to 4 million."""
    if not name.startswith("flat:"):
        return LAYOUTS[name]()
    count = int(name.removeprefix("flat:"))
    sizes = [_FLAT_TENSOR] * (count // _FLAT_TENSOR) + ([rest] if (rest := count % _FLAT_TENSOR) else [])
    return [(f"w{number}", (size,)) for number, size in enumerate(sizes)]
