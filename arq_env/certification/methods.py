"""The certification methods by name.

Each is a class whose fields are its options. A new one is one more class, and one more entry here where a name is to do for it.
"""

from dataclasses import MISSING, fields

from arq_env.certification.counting import Cohen, Randomized
from arq_env.certification.method import Method
from arq_env.certification.replaying import Incremental, Paired
from arq_env.certification.sequential import Sequential
from arq_env.support.errors import ArqError, shown

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Cohen, Randomized, Sequential, Incremental, Paired)}


def checked_method(method: Method | str) -> Method:
    """The argument ``method`` as an object, with default options where it is a name.

    :raises ArqError: when there is no such method, and for the name of one that has options without a default
    """
    if isinstance(method, Method):
        return method
    if not (isinstance(method, str) and method in METHODS):
        raise ArqError(
            f"there is no certification method {shown(method)}: choose one of {', '.join(METHODS)}, or give an object such as "
            "Sequential(price=0.3)"
        )
    kind = METHODS[method]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    if needed:
        raise ArqError(f"method {method!r} needs a {' and a '.join(needed)}: give method={kind.__name__}({', '.join(needed)})")
    return kind()


def refuse_options(options: dict) -> None:
    """Raise for what is no argument of ``certify``: an ArqError that says whose option it is, where it is a method's."""
    for name in options:
        owners = [kind.__name__ for kind in METHODS.values() if name in (field.name for field in fields(kind))]
        if not owners:
            raise TypeError(f"certify() got an unexpected keyword argument {name!r}")
        wanted = " or ".join(f"method={owner}({name}=...)" for owner in owners)
        raise ArqError(f"{name} is an option of a method: give {wanted} in place of certify({name}=...)")
