"""Functions of `triton.language.extra.libdevice` that C++ has too, for float32 and float64.

Triton's front end takes them from here for this backend. They are C++'s, so their last bits are not those of a GPU's.
"""

from collections.abc import Callable
from typing import Any

from triton.language import core

UNARY = """acos acosh asin asinh atan atanh cbrt cosh erfc expm1 lgamma log10 log1p nearbyint rint round sinh tan tanh tgamma trunc"""
BINARY = """atan2 copysign fdim fmod hypot nextafter pow remainder"""


def _function(name: str, count: int) -> Callable:
    symbols = {(core.dtype(kind),) * count: (f"std::{name}", core.dtype(kind)) for kind in ("fp32", "fp64")}

    def call(*operands: Any, _semantic: Any = None) -> Any:
        if len(operands) != count:
            raise ValueError(f"libdevice.{name} takes {count} operands, not {len(operands)}")
        return core.extern_elementwise("", "", list(operands), symbols, is_pure=True, _semantic=_semantic)

    call.__name__ = name
    return core.extern(call)


for _count, _names in ((1, UNARY), (2, BINARY)):
    for _name in _names.split():
        globals()[_name] = _function(_name, _count)
