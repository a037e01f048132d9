"""Pictures of a bit-width map: text for a terminal, a bar chart for a video or TensorBoard."""

import numpy as np

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap
from arq_env.layers import Layer


def render_ansi(layers: tuple[Layer, ...], chosen: BitWidthMap) -> str:
    """One line a layer: name, shape, weight bits / activation bits, and a bar of each; dots where not chosen yet."""
    width = max(len(layer.name) for layer in layers)
    lines = []
    for layer, bits in zip(layers, _all_bits(layers, chosen), strict=True):
        shape = f"{layer.in_channels}x{layer.out_channels}x{layer.kernel}"
        bars = "  ".join(("#" * bit).ljust(MAX_BITS, ".") for bit in bits)
        text = "/".join(str(bit or "-") for bit in bits)
        lines.append(f"{layer.name:<{width}}  {shape:>10}  {text}  {bars}")
    return "\n".join(lines)


def render_rgb(layers: tuple[Layer, ...], chosen: BitWidthMap, title: str) -> np.ndarray:
    """Two bars a layer, weight and activation bits, under a title: uint8 [h, w, 3]."""
    axes, picture = _axes(max(6.0, 0.32 * len(layers)))
    x, bits = np.arange(len(layers)), np.array(_all_bits(layers, chosen))
    axes.bar(x - 0.2, bits[:, 0], 0.4, label="weight bits")
    axes.bar(x + 0.2, bits[:, 1], 0.4, label="activation bits")
    axes.set_xticks(x, [layer.name for layer in layers], rotation=90, fontsize=7)
    axes.set(ylim=(0, MAX_BITS + 1.5), yticks=range(0, MAX_BITS + 1, 2), ylabel="bits")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    return picture()


def render_pareto(costs: list[float], ratios: list[float], chosen: int) -> np.ndarray:
    """Maps by BOPs and ACR, fractions of FP32's, with a line along those that no cheaper one reaches: uint8 [h, w, 3].

    :param chosen: index of the map to ring
    """
    axes, picture = _axes(6.0)
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -ratios[i]))
    best = [i for place, i in enumerate(order) if all(ratios[i] > ratios[before] for before in order[:place])]
    axes.plot([100 * cost for cost in costs], ratios, "o", markersize=4, alpha=0.6, label="maps tried")
    axes.step([100 * costs[i] for i in best], [ratios[i] for i in best], where="post", label="reached by no cheaper map")
    axes.plot(100 * costs[chosen], ratios[chosen], "o", markersize=12, fillstyle="none", color="black", label="exported")
    axes.set(xlabel="bit operations, % of FP32's", ylabel="ACR over FP32's")
    axes.ticklabel_format(useOffset=False)
    axes.legend(fontsize=8)
    return picture()


def _axes(width: float):
    """Axes of so many inches, and what draws them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.0), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)

    def picture() -> np.ndarray:
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    return figure.subplots(), picture


def _all_bits(layers, chosen):
    return [chosen.get(layer.name, Bits(0, 0)) for layer in layers]
