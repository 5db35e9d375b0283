"""Loops, branches and what they carry."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Operation, Type, Value, parts


@lowers("scf.for")
def _for(to: Program, op: Operation, number: int) -> int:
    match = re.match(r"(%\S+) = (%\S+) to (%\S+) step (%\S+?)(?: iter_args\((.*?)\) -> \((.*)\))?\s*(?:: (\w+))? \{", op.text)
    assert match, op.text
    variable, (begin, end, step) = match[1], [to.value(name) for name in match.group(2, 3, 4)]
    carried = [pair.split(" = ") for pair in parts(match[5])] if match[5] else []
    types = [Type.parse(type) for type in parts(match[6])] if match[6] else []
    inside: dict[str, Value] = {}
    cells = []
    for (name, first), type in zip(carried, types, strict=True):
        cells.append(_cell(to, type, to.value(first)))
        inside[name] = cells[-1]
    counter = to.fresh("n")
    kind = Type((), match[7] or "i32")
    inside[variable] = Value(kind, lambda index: counter)
    to.emit(f"for ({kind.c} {counter} = {begin.at([])}; {counter} < {end.at([])}; {counter} += {step.at([])}) {{")
    end_line = to.nested(number + 1, inside, lambda names: _carry(to, cells, names), [name for name, _ in carried])
    to.emit("}")
    for name, cell in zip(op.results, cells, strict=True):
        to.scopes[-1][name] = cell
    return end_line + 1


@lowers("scf.while")
def _while(to: Program, op: Operation, number: int) -> int:
    match = re.match(r"(?:\((.*?)\) )?: \((.*?)\) -> (.*) \{", op.text)
    assert match, op.text
    carried = [pair.split(" = ") for pair in parts(match[1])] if match[1] else []
    types = [Type.parse(type) for type in parts(match[2])] if match[2] else []
    cells = [_cell(to, type, to.value(first)) for (_, first), type in zip(carried, types, strict=True)]
    passed: list[Value] = []

    def condition(names: list[str]) -> None:
        to.emit(f"if (!({to.value(names[0]).at([])})) break;")
        passed.extend(to.value(name) for name in names[1:])

    to.emit("for (;;) {")
    end = to.nested(number + 1, {name: cell for (name, _), cell in zip(carried, cells, strict=True)}, condition)
    named = to.body[end + 1].startswith("^")
    names = re.findall(r"(%[\w$.-]+): ", to.body[end + 1]) if named else []
    end = to.nested(end + 1 + named, dict(zip(names, passed, strict=True)), lambda names: _carry(to, cells, names))
    to.emit("}")
    for name, value in zip(op.results, passed, strict=True):
        to.scopes[-1][name] = value
    return end + 1


def _origin(to: Program, type: Type) -> str:
    """Where what is carried points to: for checks, which tensor a pointer was made from is carried with it."""
    if not type.pointer:
        return "-1"
    name = to.fresh("b")
    to.declared.append(f"int {name}{{-1}};")
    return name


def _cell(to: Program, type: Type, first: Value) -> Value:
    """What a loop carries, with its first value in it."""
    origin = _origin(to, type)
    if type.pointer:
        to.emit(f"{origin} = {first.base};")
    if not type.shape:
        return to.scalar(type, first.at([]), origin)
    cell = to.held(type, to.array(type), origin)
    to.each(type, lambda index: f"{cell.at(index)} = {first.at(index)};")
    return cell


def _carry(to: Program, cells: list[Value], names: list[str]) -> None:
    """The cells' next values. All are read before any is written."""
    assignments = []
    for name, cell in zip(names, cells, strict=True):
        value = to.value(name)
        if cell.type.pointer and value.base != cell.base:
            origin = to.fresh("y")
            to.emit(f"const int {origin} = {value.base};")
            assignments.append(f"{cell.base} = {origin};")
        if not cell.type.shape:
            next_ = to.fresh("y")
            to.emit(f"const {cell.type.c} {next_} = {value.at([])};")
            assignments.append(f"{cell.at([])} = {next_};")
            continue
        if value.array == cell.array:
            continue
        if value.array is None or value.array in {one.array for one in cells}:
            value = to.hold(Value(value.type, value.at, value.cheap, None, value.base))
        if value.array in to.owned[-1] and names.count(name) == 1:
            assignments.append(f"std::swap({cell.array}, {value.array});")
        else:
            assignments.append(f"std::memcpy({cell.array}, {value.array}, {cell.type.size} * sizeof *{cell.array});")
    for line in assignments:
        to.emit(line)


def _empty(to: Program, type: Type) -> Value:
    origin = _origin(to, type)
    return to.held(type, to.array(type), origin) if type.shape else to.scalar(type, f"{type.c}{{}}", origin)


def _give(to: Program, cells: list[Value], names: list[str]) -> None:
    for name, cell in zip(names, cells, strict=True):
        value = to.value(name)
        if cell.type.pointer:
            to.emit(f"{cell.base} = {value.base};")
        if cell.type.shape:
            to.each(cell.type, lambda index, cell=cell, value=value: f"{cell.at(index)} = {value.at(index)};")
        else:
            to.emit(f"{cell.at([])} = {value.at([])};")


@lowers("scf.if")
def _if(to: Program, op: Operation, number: int) -> int:
    match = re.match(r"(%\S+)(?: -> \((.*)\))? \{", op.text)
    assert match, op.text
    condition = to.value(match[1])
    cells = [_empty(to, Type.parse(type)) for type in parts(match[2])] if match[2] else []
    to.emit(f"if ({condition.at([])}) {{")
    end = to.nested(number + 1, {}, lambda names: _give(to, cells, names))
    to.emit("}")
    if to.body[end].startswith("} else {"):
        to.emit("else {")
        end = to.nested(end + 1, {}, lambda names: _give(to, cells, names))
        to.emit("}")
    for name, cell in zip(op.results, cells, strict=True):
        to.scopes[-1][name] = cell
    return end + 1


@lowers("cf.cond_br")
def _branch(to: Program, op: Operation, number: int) -> None:
    condition, yes, no = parts(op.text)
    to.emit(f"if ({to.value(condition).at([])}) {{")
    _go(to, yes)
    to.emit("} else {")
    _go(to, no)
    to.emit("}")


@lowers("cf.br")
def _jump(to: Program, op: Operation, number: int) -> None:
    _go(to, op.text)


def _go(to: Program, target: str) -> None:
    """To a block, which lies below, with what it is passed: a function that returns early is inlined as this."""
    match = re.match(r"\^(bb\d+)(?:\((.*) : (.*)\))?$", target)
    assert match, target
    if match[2]:
        if match[1] not in to.blocks:
            to.blocks[match[1]] = [_empty(to, Type.parse(type)) for type in parts(match[3])]
        _give(to, to.blocks[match[1]], parts(match[2]))
    to.emit(f"goto {match[1]};")


@lowers("tt.return")
def _return(to: Program, op: Operation, number: int) -> None:
    to.emit("goto done;")
