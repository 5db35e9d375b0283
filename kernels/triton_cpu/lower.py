"""From Triton's tile IR to C++: a program of the grid becomes a function of loops over tiles.

    %s = arith.mulf %a, %b : tensor<64x64xf32>     for i0, for i1: s[i0 * 64 + i1] = a[…] * b[…]

`tile_ir.py` reads the IR, `program.py` holds a program while it is made, and the operations stand in `elementwise.py`, `shapes.py`,
`memory.py`, `folds.py`, `products.py`, `reports.py` and `control.py`. What has no lowering is refused by name.
"""

from headrace.kernels.triton_cpu import control, elementwise, folds, memory, products, reports, shapes
from headrace.kernels.triton_cpu.program import Kernel, Program

assert all((control, elementwise, folds, memory, products, reports, shapes)), "they put their operations into the table"


def lower(text: str) -> Kernel:
    """The C++ of a module with one kernel. Raises `Unsupported`."""
    return Program(text).kernel()
