"""What kinds of layers can be quantized, one class each with all that is particular to it."""

from torch import nn


class Kind:
    """A class of modules that can be quantized, with all that is particular to it; a subclass each, never an instance.

    :cvar name: what a :class:`Layer` calls it
    :cvar module: the class of modules
    :cvar geometry: its attributes that ``run`` reads
    :cvar transposed: whether weights are [in, out / groups, ...] in place of [out, in / groups, ...]
    """

    name = "conv"
    module: type[nn.Module]
    geometry: tuple[str, ...] = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
    transposed = False

    @classmethod
    def run(cls, layer, input, weight, bias, *more):
        """The module's own operation with another weight and bias, in the geometry of ``layer``."""
        return cls.module._conv_forward(layer, input, weight, bias)

    @classmethod
    def along_channels(cls, values, output):
        """One value for each output channel, in a shape that broadcasts over the layer's ``output``."""
        return values.view(-1, *[1] * (output.dim() - 2))

    @classmethod
    def macs(cls, input, output, weight) -> int:
        """Multiply-accumulates of one call, whatever its leading dimensions are."""
        return (input if cls.transposed else output).numel() * weight[0].numel()

    @classmethod
    def by_channel(cls, weight, groups: int):
        """The weight as [out, everything else]: one row for each output channel, which has its own step."""
        if cls.transposed:
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1)

    @classmethod
    def from_channels(cls, rows, shape, groups: int):
        """The inverse of :meth:`by_channel`."""
        if not cls.transposed:
            return rows.view(shape)
        inputs, outputs, *window = shape
        return rows.view(groups, outputs, inputs // groups, *window).transpose(1, 2).reshape(shape)


class Conv1d(Kind):
    """:class:`torch.nn.Conv1d`, also grouped, depthwise and dilated."""

    module = nn.Conv1d


class Conv2d(Kind):
    """:class:`torch.nn.Conv2d`, also grouped, depthwise and dilated."""

    module = nn.Conv2d


class Conv3d(Kind):
    """:class:`torch.nn.Conv3d`, also grouped, depthwise and dilated."""

    module = nn.Conv3d


class ConvTranspose2d(Kind):
    """:class:`torch.nn.ConvTranspose2d`."""

    name, module, transposed = "transposed", nn.ConvTranspose2d, True
    geometry = ("stride", "padding", "dilation", "groups", "output_padding", "kernel_size", "padding_mode")

    @classmethod
    def run(cls, layer, input, weight, bias, output_size=None):
        added = layer.output_padding
        if output_size is not None:
            added = cls.module._output_padding(
                layer, input, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation
            )
        return nn.functional.conv_transpose2d(input, weight, bias, layer.stride, layer.padding, added, layer.groups, layer.dilation)


class Linear(Kind):
    """:class:`torch.nn.Linear`."""

    name, module, geometry = "linear", nn.Linear, ()

    @classmethod
    def run(cls, layer, input, weight, bias):
        return nn.functional.linear(input, weight, bias)

    @classmethod
    def along_channels(cls, values, output):
        return values


KINDS: tuple[type[Kind], ...] = (Conv1d, Conv2d, Conv3d, ConvTranspose2d, Linear)


def kind_of(module: nn.Module) -> type[Kind] | None:
    """The kind of a module; None for one that is not understood.

    Only what computes exactly as torch's own class does has a kind: subclasses may not bring a forward of their own, and there may
    be no hooks. Parametrized weights are read as what they come to.
    """
    for kind in KINDS:
        if isinstance(module, kind.module):
            own = [name for name in ("forward", "_conv_forward", "__call__") if hasattr(kind.module, name)]
            same = all(getattr(type(module), name) is getattr(kind.module, name) and name not in vars(module) for name in own)
            return kind if same and not has_hooks(module) else None
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
