"""A network as text: its pass with the numbers put in, by loops and by matrices; and what it is made of."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nnfwd.bounds import error_bound
from nnfwd.errors import ShapeError
from nnfwd.forward import trace
from nnfwd.layers import Dense, Layer, Scale, leaves, to_numpy
from nnfwd.network import Network, shown_classes
from nnfwd.placement import accept, dtype_name
from nnfwd.reference import each, looped_steps, nested

SHOWN = 3  # nodes of a layer, and terms of a sum, that are written out


def explain(net: Network, x: Any, /, *, width: int = 100) -> str:
    """The pass for one input x `(in,)`, layer by layer: z and h by loops and by matrices, and how far both agree.

    Args:
        net: any network but an ensemble; wide layers are shortened to three nodes, and three terms of each sum.
        x: the input, computed with in float64.
        width: characters a line; the two forms stand side by side where they fit, else one below the other.

    Raises:
        ShapeError: where x is not one input, or the network an ensemble.
    """
    if net.chain.members is not None:
        raise ShapeError("an ensemble is several networks: explain one member")
    net = net.to("numpy")
    t = trace(net, to_numpy(accept(x, net.chain)[0]).astype("float64"))
    if len(t.x.shape) != 1:
        raise ShapeError(f"x {tuple(t.x.shape)} is not one input: it must be ({net.in_features},)")
    lines = [f"x = {_row(t.x)}"]
    h: Sequence[float] = t.x.tolist()
    worst = 0.0
    for i, (layer, (z, after)) in enumerate(zip(net, looped_steps(tuple(net), t.x.tolist()), strict=True)):
        lines += ["", f"Layer {i + 1}: {layer!r}", ""]
        left, right = list(_loops(layer, h, z, after)), list(_matrices(layer, h, t.z[i], t.h[i]))
        lines += _beside(left, right, width)
        worst = max(worst, *(abs(a - b) for a, b in zip(after, t.h[i].tolist(), strict=True)))
        h = after
    lines += ["", f"by loops     {_row(np.array(h))}", f"by matrices  {_row(t.y)}"]
    if all(layer.activation.is_named for layer in net):
        bounded = error_bound(net, t.x)
        agree = all(bounded.ratio(np.array(y)).max() <= 1 for y in (h, t.y))
        verdict = "Both agree: inside the rounding-error bound" if agree else "THEY DIFFER by more than rounding can"
    else:
        verdict = "No bound is known for an activation of one's own"
    lines += [f"{verdict}; the largest difference in any layer is {worst:.1e}."]
    return "\n".join(lines)


def _beside(left: list[str], right: list[str], width: int) -> list[str]:
    """Two columns of text, or one below the other where they are too wide."""
    middle = max(map(len, left)) + 4
    if 2 + middle + max(map(len, right)) > width:
        return [f"  {line}" for line in (*left, "", *right)]
    rows = max(len(left), len(right))
    pairs = zip(*(side + [""] * (rows - len(side)) for side in (left, right)), strict=True)
    return [f"  {a:<{middle}}{b}".rstrip() for a, b in pairs]


def _loops(layer: Layer, h: Sequence[float], z: Sequence[float], after: Sequence[float]) -> Iterator[str]:
    """Each node's sum written out."""
    name = layer.activation.name
    if isinstance(layer, Dense):
        weight, bias = nested(layer.weight), nested(layer.bias)
        sums = [_sum(w, h, None if bias is None else bias[i]) for i, w in enumerate(weight)]
    elif isinstance(layer, Scale):
        c, s, t = (each(value, len(h)) for value in (layer.center, layer.scale, layer.shift))
        sums = [f"({_n(v)} - {_n(c[i])})*{_n(s[i])} + {_n(t[i])}" for i, v in enumerate(h)]
    else:
        sums = ["" for _ in h]
    for i in range(min(len(z), SHOWN)):
        if sums[i]:
            yield f"z{i + 1} = {sums[i]}"
            yield f"   = {z[i]:.8f}"
        if name == "identity":
            yield f"h{i + 1} = z{i + 1}"
        else:
            yield f"h{i + 1} = {name}({z[i]:.6g}) = {after[i]:.8f}"
    if len(z) > SHOWN:
        more = len(z) - SHOWN
        yield f"and {more} more node{'s' if more > 1 else ''}"


def _sum(w: Sequence[float], h: Sequence[float], b: float | None) -> str:
    terms = [f"{_n(w[j])}*{_n(h[j])}" for j in range(min(len(h), SHOWN))]
    if len(h) > SHOWN:
        terms.append(f"[{len(h) - SHOWN} more]")
    if b is not None:
        terms.append(_n(b))
    return " + ".join(terms).replace("+ -", "- ")


def _matrices(layer: Layer, h: Sequence[float], z: np.ndarray, after: np.ndarray) -> Iterator[str]:
    """The same as one product: W, x, b and z as columns of numbers."""
    if isinstance(layer, Dense):
        w = to_numpy(layer.weight).astype("float64")
        b = None if layer.bias is None else to_numpy(layer.bias).astype("float64")
        yield "z = W x" if b is None else "z = W x + b"
        columns = [np.array(h), *([] if b is None else [b]), z]
        blocks = [_block(w), *(_block(column[:, None]) for column in columns)]
        height = max(map(len, blocks))
        middle = (min(height, SHOWN) - 1) // 2
        for row in range(height):
            cells = [block[row] if row < len(block) else " " * len(block[0]) for block in blocks]
            signs = (" ", " = ") if b is None else (" ", " + ", " = ")
            pairs = zip((sign if row == middle else " " * len(sign) for sign in signs), cells[1:], strict=True)
            yield cells[0] + "".join(sign + cell for sign, cell in pairs)
    elif isinstance(layer, Scale):
        yield f"z = (x - center) * scale + shift = {_row(z)}"
    else:
        yield f"z = x = {_row(z)}"
    yield f"h = {layer.activation.name}(z) = {_row(after)}"


def _block(a: np.ndarray) -> list[str]:
    """A matrix as lines of text, its middle left out where it is large."""
    cells = [[_n(v) for v in row[:SHOWN]] + (["..."] if len(row) > SHOWN else []) for row in a[:SHOWN].tolist()]
    widths = [max(len(row[j]) for row in cells) for j in range(len(cells[0]))]
    lines = ["[" + " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + "]" for row in cells]
    return [*lines, f"{':':^{len(lines[0])}}"] if len(a) > SHOWN else lines


def _row(a: np.ndarray) -> str:
    """A vector on one line, eight digits, its end left out where it is long."""
    shown = [f"{v:.8g}" for v in a[:SHOWN].tolist()]
    return f"({', '.join(shown)}{f', ... {len(a) - SHOWN} more' if len(a) > SHOWN else ''})"


def _n(value: float) -> str:
    return f"{value:.4g}"


def describe(net: Network, /) -> dict[str, Any]:
    """What a network is made of, as plain data.

    `layers` (index, kind, in, out, activation, repr, parameters), `in`, `out`, `members`, `dtype`, `parameters` (how
    many numbers), `flops` (floating-point operations a row: two a weight, one a bias, one an activation), `non_finite`
    (how many of the numbers are infinite or NaN), `classes`, `input_shape`.
    """
    layers = []
    width = net.in_features
    for i, layer in enumerate(net):
        arrays = leaves(layer.parameters)
        out = layer.out_features or width
        count = sum(int(np.prod(a.shape)) for a in arrays)
        weights = int(np.prod(layer.weight.shape)) if isinstance(layer, Dense) else 0
        each_node = (layer.members or 1) * (out or 0)
        flops = 2 * weights + (each_node if isinstance(layer, Dense) and layer.bias is not None else 0)
        flops += 3 * each_node if isinstance(layer, Scale) else 0
        flops += each_node if layer.activation.name != "identity" else 0
        layers.append(
            {
                "layer": i + 1,
                "kind": type(layer).__name__,
                "in": layer.in_features or width,
                "out": out,
                "activation": repr(layer.activation),
                "repr": repr(layer),
                "dtype": sorted({dtype_name(a.dtype) for a in arrays}),
                "parameters": count,
                "flops": flops,
                "non_finite": sum(int((~np.isfinite(a)).sum()) for a in [*map(_float64, arrays), *_numbers(layer)]),
            }
        )
        width = out
    return {
        "layers": layers,
        "in": net.in_features,
        "out": width,
        "members": net.chain.members,
        "dtype": net.dtype,
        "parameters": sum(row["parameters"] for row in layers),
        "flops": sum(row["flops"] for row in layers),
        "non_finite": sum(row["non_finite"] for row in layers),
        "classes": None if net.classes is None else list(net.classes),
        "input_shape": None if net.input_shape is None else list(net.input_shape),
    }


def _float64(a: Any) -> np.ndarray:
    return to_numpy(a).astype("float64")


def _numbers(layer: Layer) -> list[np.ndarray]:
    """A layer's own numbers that are no arrays. Those of an activation may well be infinite: clip(0, inf)."""
    return [np.asarray(value) for name, value in layer.scalars.items() if name != "activation"]


def table(described: dict[str, Any], /) -> str:
    """`describe` as text; with `file`, `format`, `bytes` and `sha256` among it, they come first."""
    lines = []
    if "file" in described:
        lines.append(f"{described['file']}: {described['format']}, {described['bytes']:,} bytes")
        lines.append(f"SHA-256 {described['sha256']}")
    head = f"{'layer':>5}  {'kind':10}  {'in':>6}  {'out':>6}  {'parameters':>10}  {'FLOPs a row':>11}  activation"
    lines.append(head)
    for row in described["layers"]:
        taken, given = (row[k] if row[k] is not None else "any" for k in ("in", "out"))
        lines.append(
            f"{row['layer']:>5}  {row['kind']:10}  {taken:>6}  {given:>6}  {row['parameters']:>10,}"
            f"  {row['flops']:>11,}  {row['repr' if row['kind'] == 'Scale' else 'activation']}"
        )
    members = f", {described['members']} members" if described["members"] else ""
    lines.append(
        f"{described['parameters']:,} parameters in {described['dtype']}, {described['flops']:,} FLOPs a row{members}"
    )
    if described["input_shape"]:
        lines.append(f"an input was {tuple(described['input_shape'])} before it was flattened to {described['in']}")
    if described["classes"]:
        lines.append(f"classes {shown_classes(described['classes'])}")
    for row in described["layers"]:
        if row["non_finite"]:
            lines.append(f"layer {row['layer']} has {row['non_finite']:,} infinite or NaN parameters")
    return "\n".join(lines)
