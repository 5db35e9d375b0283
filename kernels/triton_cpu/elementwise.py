"""Operations that compute every element by itself: arithmetic, comparisons, choices, conversions, constants."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import BYTES, ROUNDED, STORED, Index, Operation, Type, Unsupported, Value, parts


def unsigned(type: Type, expression: str) -> str:
    return f"static_cast<u{type.c}>({expression})" if type.element != "i1" else expression


INFIX = {
    "arith.addf": "+",
    "arith.subf": "-",
    "arith.mulf": "*",
    "arith.divf": "/",
    "arith.remf": "%",
    "arith.addi": "+",
    "arith.subi": "-",
    "arith.muli": "*",
    "arith.divsi": "/",
    "arith.remsi": "%",
    "arith.andi": "&",
    "arith.ori": "|",
    "arith.xori": "^",
    "arith.shli": "<<",
    "arith.shrsi": ">>",
    "arith.shrui": ">>",
    "arith.divui": "/",
    "arith.remui": "%",
    "tt.precise_divf": "/",
}
"""Operations of two operands of one type."""
SHIFTS = {"<<": "shifted_left", ">>": "shifted_right"}
OF_UNSIGNED = {"arith.shrui", "arith.divui", "arith.remui"}
COSTLY = {"arith.divsi", "arith.remsi", "arith.divui", "arith.remui"}


@lowers(*INFIX)
def _infix(to: Program, op: Operation, number: int) -> None:
    left, right = op.operands(to.value)
    type, sign = op.type, INFIX[op.name]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if op.name in OF_UNSIGNED:
            a, b = unsigned(type, a), unsigned(type, b)
        if type.is_float:
            return type.rounded(f"std::fmod({a}, {b})" if sign == "%" else f"({a} {sign} {b})")
        if op.name in COSTLY:
            # A masked element may divide by zero, which a GPU survives.
            return f"static_cast<{type.c}>({'quotient' if sign == '/' else 'remainder'}({a}, {b}))"
        if type.element == "i1" and sign in "+-":
            return f"({a} != {b})"
        if sign in SHIFTS:
            return f"static_cast<{type.c}>({SHIFTS[sign]}({a}, {b}))"
        return f"static_cast<{type.c}>({a} {sign} {b})"

    near = (right.near if left.near is None else left.near) if op.name == "arith.addi" else None
    value = Value(type, at, left.cheap and right.cheap and not type.is_float, near=near)
    if op.name in COSTLY and type.shape:
        value = to.hold(value)
    to.define(op.results[0], value)


CHOSEN = {
    "arith.maxsi": ">",
    "arith.minsi": "<",
    "arith.maxui": ">",
    "arith.minui": "<",
    "arith.maxnumf": ">",
    "arith.minnumf": "<",
    "arith.maximumf": ">",
    "arith.minimumf": "<",
}


@lowers(*CHOSEN)
def _chosen(to: Program, op: Operation, number: int) -> None:
    left, right = (one if one.cheap else to.hold(one) for one in op.operands(to.value))
    type, sign = op.type, CHOSEN[op.name]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if op.name.endswith("ui"):
            return f"({unsigned(type, a)} {sign} {unsigned(type, b)} ? {a} : {b})"
        if op.name.endswith("imumf"):  # a NaN wins
            return f"({a} != {a} || {a} {sign} {b} ? {a} : {b})"
        # Of a NaN and a number, the number.
        return f"({a} {sign} {b} || {b} != {b} ? {a} : {b})" if type.is_float else f"({a} {sign} {b} ? {a} : {b})"

    to.define(op.results[0], Value(type, at, not type.is_float))


PREDICATES = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@lowers("arith.cmpi", "arith.cmpf")
def _compared(to: Program, op: Operation, number: int) -> None:
    kind, rest = op.text.split(", ", 1)
    left, right = Operation([], "", rest, 0).operands(to.value)
    type = op.type
    sign = PREDICATES[kind[-2:]]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if not type.is_float and kind[0] == "u":
            a, b = unsigned(type, a), unsigned(type, b)
        said = f"({a} {sign} {b})"
        if type.is_float and kind[0] == "u" and kind != "une":
            return f"({a} != {a} || {b} != {b} || {said})"
        if kind == "one":
            return f"({a} == {a} && {b} == {b} && {said})"
        return said

    to.define(op.results[0], Value(Type(type.shape, "i1"), at, left.cheap and right.cheap))


@lowers("arith.select")
def _select(to: Program, op: Operation, number: int) -> None:
    choice, yes, no = op.operands(to.value)
    type = Type.parse(parts(op.types)[-1])
    base = yes.base
    if yes.base != no.base:
        base = "-1" if choice.type.shape else f"({choice.at([])} ? {yes.base} : {no.base})"
    one = not choice.type.shape and bool(type.shape)
    to.define(
        op.results[0],
        Value(
            type,
            lambda index: f"({choice.at([] if one else index)} ? {yes.at(index)} : {no.at(index)})",
            choice.cheap and yes.cheap and no.cheap and not type.is_float,
            None,
            base,
        ),
    )


CALLS = {
    "math.exp": "exp_of",
    "math.exp2": "exp2_of",
    "math.log": "std::log",
    "math.log2": "std::log2",
    "math.sqrt": "std::sqrt",
    "tt.precise_sqrt": "std::sqrt",
    "math.rsqrt": "1.0f / std::sqrt",
    "math.absf": "std::fabs",
    "math.absi": "std::abs",
    "math.floor": "std::floor",
    "math.ceil": "std::ceil",
    "math.sin": "std::sin",
    "math.cos": "std::cos",
    "math.erf": "std::erf",
    "math.tanh": "std::tanh",
    "arith.negf": "-",
}


@lowers(*CALLS)
def _called(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type, call = op.type, CALLS[op.name]
    to.define(op.results[0], Value(type, lambda index: type.rounded(f"static_cast<{type.c}>({call}({x.at(index)}))"), False))


@lowers("tt.extern_elementwise")
def _external(to: Program, op: Operation, number: int) -> None:
    match = re.search(r'symbol = "([^"]*)"', op.text)
    assert match, op.text
    if not match[1].startswith("std::"):  # what is not of libdevice.py
        raise Unsupported(f"{to.name}: {match[1]} has no lowering on the CPU ({to.lines[op.line]})")
    operands = Operation([], "", op.text.split(" {")[0], 0).operands(to.value)
    to.define(op.results[0], Value(op.result, lambda i: f"{match[1]}({', '.join(one.at(i) for one in operands)})", False))


@lowers("math.fma")
def _fma(to: Program, op: Operation, number: int) -> None:
    a, b, c = op.operands(to.value)
    type = op.type
    # Of narrow floats the sum is rounded once: double holds their products and, for all that matters, the sum.
    narrow = type.element in ROUNDED
    call = "__builtin_fmaf" if type.element == "f32" else "__builtin_fma"
    form = "odd_float({})" if narrow else "{}"
    to.define(op.results[0], Value(type, lambda i: type.rounded(form.format(f"{call}({a.at(i)}, {b.at(i)}, {c.at(i)})")), False))


@lowers("tt.clampf")
def _clamp(to: Program, op: Operation, number: int) -> None:
    head = Operation([], "", op.text.split(", propagateNan")[0], 0)
    x, low, high = head.operands(to.value)
    call = "clamped_or_nan" if "propagateNan = all" in op.text else "clamped"
    to.define(op.results[0], Value(op.type, lambda i: f"{call}<{op.type.c}>({x.at(i)}, {low.at(i)}, {high.at(i)})", False))


@lowers("tt.mulhiui")
def _mulhiui(to: Program, op: Operation, number: int) -> None:
    a, b = op.operands(to.value)
    to.define(op.results[0], Value(op.type, lambda i: f"high_product<{op.type.c}>({a.at(i)}, {b.at(i)})", a.cheap and b.cheap))


@lowers(
    "arith.extf",
    "arith.truncf",
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "arith.sitofp",
    "arith.uitofp",
    "arith.fptosi",
    "arith.fptoui",
    "arith.index_cast",
    "tt.fp_to_fp",
)
def _converted(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type = op.result
    if "rounding = rtz" in op.text:
        raise Unsupported(f"{to.name}: rounding toward zero has no lowering on the CPU ({to.lines[op.line]})")

    def at(index: Index) -> str:
        expression = x.at(index)
        if op.name in ("arith.fptosi", "arith.fptoui"):
            number = type.c if op.name == "arith.fptosi" or type.element == "i1" else f"u{type.c}"
            return f"static_cast<{type.c}>(truncated<{number}>({expression}))"
        if op.name == "arith.trunci" and type.element == "i1":
            return f"(({expression} & 1) != 0)"
        if x.type.element == "f64" and type.element in ROUNDED:
            expression = f"odd_float({expression})"
        if op.name in ("arith.extui", "arith.uitofp"):
            expression = unsigned(x.type, expression)
        elif op.name in ("arith.extsi", "arith.sitofp") and x.type.element == "i1":
            expression = f"-static_cast<int>({expression})"
        return type.rounded(f"static_cast<{type.c}>({expression})")

    to.define(op.results[0], Value(type, at, x.cheap and not type.is_float, near=x.near))


@lowers("arith.bitcast", "tt.bitcast")
def _bitcast(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type = op.result
    if type.pointer:
        to.define(op.results[0], Value(type, lambda index: f"reinterpret_cast<{type.c}>({x.at(index)})", x.cheap, None, x.base))
        return

    def at(index: Index) -> str:
        expression = x.at(index)
        if x.type.element == type.element:
            return expression
        if x.type.element in ROUNDED:
            expression = f"pattern_{STORED[x.type.element]}({expression})"
        if type.element in ROUNDED:
            word = "uint8_t" if BYTES[type.element] == 1 else "uint16_t"
            return f"from_{STORED[type.element]}(static_cast<{word}>({expression}))"
        return f"static_cast<{type.c}>({expression})" if x.type.element in ROUNDED else f"__builtin_bit_cast({type.c}, {expression})"

    to.define(op.results[0], Value(type, at, x.cheap and not {x.type.element, type.element} & set(ROUNDED)))


@lowers("ub.poison")
def _poison(to: Program, op: Operation, number: int) -> None:
    to.scopes[-1][op.results[0]] = Value(op.type, lambda index: f"{op.type.c}{{}}")


@lowers("arith.constant")
def _constant(to: Program, op: Operation, number: int) -> None:
    match = re.fullmatch(r"(?:\{.*?\} )?(?:dense<(.*?)>|(\S+))(?: : (.*))?", op.text)
    assert match, op.text
    text, type = match[1] or match[2], Type.parse(match[3] or "i1")
    if text.startswith(("[", '"')):
        raise Unsupported(f"{to.name}: a constant tile of several values has no lowering on the CPU ({to.lines[op.line]})")
    if text in ("true", "false"):
        literal = text
    elif type.is_float:
        literal = _float(text, type)
    else:
        literal = f"static_cast<{type.c}>({text}LL)"
    to.scopes[-1][op.results[0]] = Value(type, lambda index: literal, True)


def _float(text: str, type: Type) -> str:
    """Infinities and NaNs are written as their bits; what is written in decimals is the nearest number of the type."""
    if not text.startswith("0x"):
        return type.rounded(f"{text}f") if type.c == "float" else text
    if type.element in ROUNDED:
        return f"from_{STORED[type.element]}({text})"
    return f"float_of({text}u)" if type.element == "f32" else f"__builtin_bit_cast(double, {text}ull)"
