"""What a forward pass computes, operator by operator: for costs that count everything, wherever it is written."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Operations:
    """Of one forward pass.

    :param macs: module name to the multiply-accumulates made in its own forward, outside the modules that it calls
    :param parameters: the parameters that any operator read
    :param operators: names of the operators, as torch's dispatcher calls them
    """

    macs: Counter[str] = field(default_factory=Counter)
    parameters: set[nn.Parameter] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)


class _Recorder(TorchDispatchMode):
    """Asks torch's table of floating-point operations, as ``FlopCounterMode`` does, and notes who calls and what is read."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.seen, self.stack = Operations(), [""]
        self._owners = {parameter.untyped_storage().data_ptr(): parameter for parameter in network.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.seen.operators.add(function._overloadpacket._qualified_op_name.removeprefix("aten::"))
        if function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
            self.seen.macs[self.stack[-1]] += flops // 2
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and (owner := self._owners.get(tensor.untyped_storage().data_ptr())) is not None:
                self.seen.parameters.add(owner)
        return result


def record_operations(network: nn.Module, images: torch.Tensor) -> Operations:
    """Run the network once, in operators that torch's table knows: without its fused paths for attention and recurrence."""
    recorder = _Recorder(network)

    def enter(name):
        return lambda module, inputs: recorder.stack.append(name)

    def leave(module, inputs, output):
        recorder.stack.pop()

    hooks = []
    for name, module in network.named_modules():
        if name:
            # the outermost of all hooks: what other hooks compute belongs to the module
            hooks.append(module.register_forward_pre_hook(enter(name), prepend=True))
            hooks.append(module.register_forward_hook(leave))
    fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        # attention as products of matrices: of its fused kernels the table knows those of GPUs only
        with recorder, sdpa_kernel(SDPBackend.MATH):
            network(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused[0])
        torch._C._set_mkldnn_enabled(fused[1])
        for hook in hooks:
            hook.remove()
    return recorder.seen
