"""Objects by import string, so that a network or a data set of one's own can be named in JSON."""

import importlib
import inspect
import os
import sys

from arq_env.support.errors import ArqError, reason
from arq_env.support.torchvision_import import import_torchvision


def call_imported(name: str, arguments: dict | None = None):
    """What the function returns that an import string names, such as ``"mymodels:make_net"``.

    The module is looked for as Python does, and last in the working directory. What the function itself raises is not caught.

    :param arguments: keyword arguments for it
    :raises ArqError: when there is no such module or function, or it does not take these arguments
    """
    function, arguments = _imported(name), arguments or {}
    try:
        inspect.signature(function).bind(**arguments)
    except ValueError:  # it does not say what it takes, as some built-in functions
        pass
    except TypeError as error:
        raise ArqError(f"{name} cannot be called with {arguments or 'no arguments'} ({error}): give those that it takes") from error
    return function(**arguments)


def _imported(name: str):
    module_name, _, attribute = name.partition(":")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ArqError(f"{name!r} is no import string: give module:function, such as mymodels:make_net")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if module_name.partition(".")[0] == "torchvision":
            import_torchvision()
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise ArqError(
            f"the module {module_name} cannot be imported ({type(error).__name__}: {reason(error)}): start from the folder that it "
            "lies in, or install it"
        ) from error
    if not callable(function := getattr(module, attribute, None)):
        raise ArqError(f"{module_name} has no function {attribute!r}: give the name of one that it defines")
    return function
