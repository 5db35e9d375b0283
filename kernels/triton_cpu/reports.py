"""What a kernel says: assertions, which end the launch, and prints, which go to the process's standard output."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import BYTES, Index, Operation, Type, Value, parts

STRING = r'"((?:[^"\\]|\\.)*)"'
"""As the IR writes it: what is no plain sign is a backslash and two hexadecimal digits."""


def _text(written: str) -> str:
    return re.sub(r"\\([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), written).replace("\\\\", "\\")


@lowers("tt.assert")
def _assert(to: Program, op: Operation, number: int) -> None:
    match = re.match(rf"(%\S+), {STRING} : (.*)", op.text)
    assert match, op.text
    condition = to.value(match[1])
    to.messages.append(_text(match[2]))
    fail = f"checks.fail({op.line}, {len(to.messages) - 1}); goto done;"
    statement = lambda index: f"if (!({condition.at(index)})) {{ {fail} }}"  # noqa: E731
    if condition.type.shape:
        to.each(condition.type, statement)
    else:
        to.emit(statement([]))


@lowers("tt.print")
def _print(to: Program, op: Operation, number: int) -> None:
    """A line an element, as Triton prints on a GPU: the program, the element's index, the prefix, the operand where there are several."""
    match = re.match(rf"{STRING} \{{hex = (\w+), isSigned = array<i32(?:: (.*?))?>\}}(?: : (.*?) : (.*))?$", op.text)
    assert match, op.text
    prefix = _text(match[1]).replace("%", "%%")
    program, flush = "pid (%d, %d, %d)", "std::fflush(stdout);"
    if not match[4]:
        to.emit(f"std::printf({_quoted(program + prefix)}, p0, p1, p2); {flush}")
        return
    values = [to.value(name) for name in parts(match[4])]
    signed = [sign.strip() == "1" for sign in (match[3] or "").split(",")]
    for place, value in enumerate(values):
        which = f"(operand {place}) " if len(values) > 1 else ""
        form, said = _shown(value, match[2] == "true", signed[place])

        def line(index: Index, form: str = form, said: str = said, which: str = which, value: Value = value) -> str:
            head = f"{program} idx ({', '.join(['%d'] * len(index))}){prefix}{which}{form}"
            return f"std::printf({', '.join([_quoted(head), 'p0, p1, p2', *index, said.format(value.at(index))])});"

        if value.type.shape:
            to.each(value.type, line)
        else:
            to.emit(line([]))
    to.emit(flush)


def _shown(value: Value, hexadecimal: bool, signed: bool) -> tuple[str, str]:
    """The format of an element, and how it is passed."""
    type: Type = value.type
    if type.pointer:
        return "%p", "static_cast<const void*>({})"
    if type.is_float:
        return "%f", "static_cast<double>({})"
    if type.element == "i1":
        return "%d", "static_cast<int>({})"
    if hexadecimal:
        return f"0x%0{2 * BYTES[type.element]}llx", "static_cast<unsigned long long>(unsigned_of({}))"
    return ("%lld", "static_cast<long long>({})") if signed else ("%llu", "static_cast<unsigned long long>(unsigned_of({}))")


def _quoted(text: str) -> str:
    """A line as a C++ string."""
    return (
        '"'
        + "".join(sign if sign.isascii() and sign.isprintable() and sign not in '"\\' else f"\\{ord(sign):03o}" for sign in text)
        + '\\n"'
    )
