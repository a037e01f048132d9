"""What tells one classifier from another: a digest of everything that a torch module computes with."""

import dis
import functools
import hashlib
import io
import re
import sys
import types
import zipfile
from collections.abc import Callable, Mapping, Set

import numpy as np
import torch

from arq_env.support.errors import ArqError, shown

#: Packages whose classes and functions are known by their names; of all others the code counts. This one's versions stand beside a
#: digest wherever results are kept.
_KNOWN_BY_NAME = {"torch", "numpy", "scipy", "arq_env", *sys.stdlib_module_names} - {"__main__"}
#: Where such objects come from, what they hold has no influence on what a module computes.
_WITHOUT_EFFECT = {"_abc", "_contextvars", "_io", "_thread", "_weakref", "logging", "threading", "weakref"}
#: What every module has, and what torch.compile leaves on one; what counts of it is read by itself.
_MODULE_INTERNALS = {*vars(torch.nn.Module()), "_compiled_call_impl"}
_CACHED = type(functools.cache(len))
_PLAIN = (bool, int, float, complex, str, bytes, range, np.generic, np.dtype, torch.dtype, torch.device, torch.memory_format)


def classifier_digest(classifier: Callable, name: str = "") -> str:
    """What a file of results belongs to: :func:`network_digest` of a torch module, or a plain function's name or ``digest``.

    :raises ArqError: for a function without a name, which cannot be told from another
    """
    if isinstance(classifier, torch.nn.Module):
        return network_digest(classifier, name)
    name = name or getattr(classifier, "digest", "")
    if not (isinstance(name, str) and name):
        raise ArqError(
            "a plain function cannot be told from another: give name=, such as its model file's digest, to keep its results"
        )
    return name


def network_digest(network: torch.nn.Module, name: str = "") -> str:
    """SHA-256 of what a module computes with, as hex: the same in every process of one Python version.

    Neither device nor memory layout matter. It covers parameters, all buffers and every other attribute of every submodule
    (tensors, numbers, functions), forward hooks, whether it is in training mode, and the code of classes and functions that are
    not torch's own, with the numbers, functions and classes that they use of their own file. It does not cover versions of
    packages, nor what is called of other files. No forward pass is run, for its rounding differs with the number of threads; so
    what a forward pass leaves on a module counts.

    :param name: further text that tells networks apart
    :raises ArqError: where an attribute cannot be read, such as a handle of another runtime, and there is no ``name``; for what is
        no module
    """
    if not (isinstance(network, torch.nn.Module) and isinstance(name, str)):
        raise ArqError(f"network and name are {shown(network)} and {shown(name)}: give a torch module and text")
    return hashlib.sha256(name.encode(errors="surrogatepass") + _Reader(name).digest(network)).hexdigest()


class _Reader:
    """Digests of values by their kind; one object is read once, and may hold itself."""

    def __init__(self, name: str):
        self._name = name
        self._known: dict[int, tuple[object, bytes]] = {}  # the object too, so that its id stays its own

    def digest(self, value) -> bytes:
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return _of(type(value).__name__, repr(value).encode())
        if isinstance(value, torch.Tensor):
            return _of_tensor(value)
        if id(value) not in self._known:
            self._known[id(value)] = value, b"within itself"
            self._known[id(value)] = value, _of(*self._parts(value))
        return self._known[id(value)][1]

    def _parts(self, value):
        """What an object consists of."""
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return "array", value.dtype.str.encode(), repr(value.shape).encode(), np.ascontiguousarray(value).tobytes()
        if isinstance(value, Mapping):
            return "mapping", *(part for item in value.items() for part in map(self.digest, item))
        if isinstance(value, Set):
            return "set", *sorted(map(self.digest, value))
        if isinstance(value, (list, tuple)):
            return "sequence", *map(self.digest, value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, _CACHED):
            return "cached", self.digest(value.__wrapped__)
        if isinstance(value, types.CodeType):
            return "code", value.co_code, *(self.digest(part) for part in (value.co_consts, value.co_names, value.co_freevars))
        if isinstance(value, types.MethodType):
            return "method", self.digest(value.__func__), self.digest(value.__self__)
        if isinstance(value, (staticmethod, classmethod, functools.cached_property, property)):
            inner = [getattr(value, name, None) for name in ("__func__", "func", "fget")]
            return "descriptor", *map(self.digest, inner)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, torch.autocast):  # keeps what was before it when it was last entered
            return "autocast", self.digest({key: held for key, held in vars(value).items() if not key.startswith("prev")})
        if isinstance(value, types.ModuleType):
            return "python module", value.__name__.encode()
        return self._object(value)

    def _module(self, module):
        if "_orig_mod" in module._modules:  # torch.compile's wrapper
            return "compiled", self.digest(module._orig_mod)
        if isinstance(module, torch.jit.ScriptModule):
            return "script", *_script(module)
        kind, own = self.digest(type(module)), vars(module)
        if isinstance(module, torch.fx.GraphModule):  # its class is made for it, and the graph is what the code was made from
            kind, own = module.code.encode(), {key: value for key, value in own.items() if isinstance(value, torch.Tensor)}
        plain = [part for key in sorted(own.keys() - _MODULE_INTERNALS) for part in (key.encode(), self.digest(own[key]))]
        hooks = [self.digest(list(getattr(module, kept).values())) for kept in ("_forward_pre_hooks", "_forward_hooks")]
        return "module", kind, bytes([module.training]), *self._state(module), *hooks, *plain

    def _state(self, module):
        for held in (module._parameters, module._buffers, module._modules):
            for key, value in held.items():
                yield key.encode()
                yield self.digest(value)

    def _function(self, function):
        held = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        if _known_by_name(function):
            return "known function", _name(function), self.digest(held)
        parts = function.__code__, function.__defaults__, function.__kwdefaults__, held, self._used(function)
        return "function", *map(self.digest, parts)

    def _used(self, function):
        """What a function reads of its own file: numbers, tensors, functions and classes, by name."""
        names, code = set(), [function.__code__]
        while code:
            names.update(step.argval for step in dis.get_instructions(code[-1]) if step.opname == "LOAD_GLOBAL")
            code += [part for part in code.pop().co_consts if isinstance(part, types.CodeType)]
        there = function.__globals__
        return {name: there[name] for name in sorted(names & there.keys()) if _is_read(there[name], there)}

    def _class(self, kind):
        parts = ["class"]
        for base in kind.__mro__:
            parts.append(_name(base))
            if _known_by_name(base):
                continue
            for name, value in sorted(vars(base).items()):
                if isinstance(value, (types.FunctionType, _CACHED, staticmethod, classmethod, property, functools.cached_property)):
                    parts += [name.encode(), self.digest(value)] if name == "__call__" or not name.startswith("__") else []
                elif not name.startswith("__") and _is_constant(value):
                    parts += [name.encode(), self.digest(value)]
        return parts

    def _object(self, value):
        kind = type(value)
        parts = "object", self.digest(kind)
        if kind.__module__.partition(".")[0] in _WITHOUT_EFFECT:
            return parts
        if not _known_by_name(kind) and kind.__reduce_ex__ is object.__reduce_ex__ and hasattr(value, "__dict__"):
            return *parts, self.digest(vars(value))
        try:
            reduced = value.__reduce_ex__(4)
            made_from = [list(part) if isinstance(part, types.GeneratorType) else part for part in reduced]
        except Exception as error:  # whatever someone else's object raises when it is asked what it consists of
            if self._name:
                return parts
            raise ArqError(
                f"the network holds a {kind.__module__}.{kind.__qualname__}, whose content cannot be told from another's: give "
                "name=, such as its model file's digest, or keep no results"
            ) from error
        return *parts, self.digest(made_from)


def _of(kind: str, *parts: bytes) -> bytes:
    """One digest of a kind and its parts, each with its length."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def _of_tensor(value: torch.Tensor) -> bytes:
    kind, shape = str(value.dtype).encode(), repr(tuple(value.shape)).encode()
    if value.is_meta:
        return _of("meta tensor", kind, shape)
    value = value.detach()
    value = value.dequantize() if value.is_quantized else value.to_dense() if value.layout != torch.strided else value
    values = value.cpu().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    return _of("tensor", kind, shape, values.numpy().tobytes())


def _script(module) -> list[bytes]:
    """What a TorchScript module is saved as: code, weights, attributes and constants, without the counters in class names."""
    with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
        names = [name for name in archive.namelist() if not re.search(r"debug_pkl$|serialization_id$|/traced_inputs", name)]
        return [re.sub(rb"___torch_mangle_\d+", b"", part) for name in names for part in (name.encode(), archive.read(name))]


def _known_by_name(value) -> bool:
    return str(value.__module__).partition(".")[0] in _KNOWN_BY_NAME


def _name(value) -> bytes:
    """What a class or function is called; of this package without the file, which may move."""
    module = str(value.__module__)
    return f"{'arq_env' if module.startswith('arq_env.') else module}.{value.__qualname__}".encode()


def _is_read(value, there: dict) -> bool:
    """Whether something that a function uses of its own file is read: a constant, or a function or class of this file."""
    code = isinstance(value, (types.FunctionType, _CACHED, type)) and value.__module__ == there.get("__name__")
    return code or _is_constant(value)


def _is_constant(value) -> bool:
    if isinstance(value, (list, tuple, Set)):
        return all(map(_is_constant, value))
    if isinstance(value, Mapping):
        return all(map(_is_constant, (*value.keys(), *value.values())))
    return value is None or isinstance(value, (*_PLAIN, torch.Tensor, np.ndarray))
