"""What `quantization_config` in config.json says of how the weights of linear layers are stored: `read_quantization(path, settings)`.

    quant_method          layout    tensors beside each other, under the layer's name
    fp8                   scaled    weight F8_E4M3, weight_scale_inv (a block of 128 × 128, or one in all; as others write it weight_scale),
                                    activation_scale (or input_scale)
    compressed-tensors    scaled    weight F8_E4M3 or I8, weight_scale, weight_zero_point, input_scale
                          packed    weight_packed I32, weight_scale, weight_zero_point, weight_shape, weight_g_idx
    bitsandbytes, 8 bits  scaled    weight I8, SCB: 127 times the scale of each output, weight_format
    gptq                  gptq      qweight I32 packed along inputs, qzeros, scales, g_idx
    awq                   awq       qweight I32 packed along outputs, qzeros, scales

Which layers are left as they are is seen from the tensors, so that lists of those (`ignore`, `modules_to_not_convert`, …) are not needed.
`kv_cache_scheme` is not either: --kv-dtype says how keys and values are kept. Whatever would change a weight's meaning and is not known
here is refused by name. Reads no tensor; the resolver calls it before a download, the loader when it opens the files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.engine.checkpoint.wording import in_line, shown
from headrace.engine.errors import UserError

SUPPORTED = (
    "fp8, compressed-tensors (float-quantized, int-quantized, naive-quantized, pack-quantized), gptq of 4 and 8 bits, awq of 4, "
    "bitsandbytes of 8"
)
WAY_OUT = "take an unquantized model or a GGUF file"
BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Inputs:
    """How inputs are to be rounded, to numbers of the weight's own kind."""

    group: int | None
    """Inputs of a token that share a scale; None for all."""
    static: bool
    """Whether `input_scale` holds for all inputs instead."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight [N, K] of a linear layer is stored."""

    layout: Literal["scaled", "packed", "gptq", "awq"]
    kind: Literal["float", "int"]
    bits: int
    block: tuple[int | None, int | None]
    """Outputs and inputs that share a scale; None for all of them."""
    symmetric: bool = True
    """Whether codes have no zeros."""
    inputs: Inputs | None = None
    scales: tuple[str, ...] = ("weight_scale",)
    """What the tensor of scales may be called."""
    multiplied: int = 1
    """What scales were multiplied with before they were stored."""
    zeros_less_one: bool = False
    """Whether zeros are stored less 1."""


@dataclass(frozen=True, slots=True)
class Quantization:
    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """Schemes with the layers that each is for: names, "re:" with a pattern that a name begins with, or the class of layers."""

    @property
    def codes(self) -> frozenset[str]:
        """The safetensors types of what is called `weight` and is quantized."""
        return frozenset("F8_E4M3" if one.kind == "float" else "I8" for _, one in self.schemes if one.layout == "scaled")

    def scheme(self, layer: str) -> Scheme | None:
        """How this layer is stored, if it is quantized. Of several that claim it, one that names it goes before one for its class."""
        if len(self.schemes) == 1:
            return self.schemes[0][1]
        kind = "Embedding" if layer.endswith("embed_tokens") else "Linear"
        named = (one for targets, one in self.schemes if any(_is_named(target, layer) for target in targets))
        return next(named, None) or next((one for targets, one in self.schemes if kind in targets), None)


def _is_named(target: str, layer: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def read_quantization(path: Path, settings: Mapping[str, Any]) -> Quantization | None:
    """What config.json at `path` says, None if nothing. UserError, one line that names what is not supported and what is."""
    config = settings.get("quantization_config", settings.get("compression_config"))
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    read = _METHODS.get(method) if isinstance(config, dict) and isinstance(method, str) else None
    if read is None:
        raise UserError(
            f"{path} has quantization_config of the method {shown(method)}: supported are {SUPPORTED}, besides unquantized models and GGUF"
        )
    fault = _Fault(path, str(method))
    try:
        return Quantization(str(method), read(config, fault))
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{path}: quantization_config is damaged: {in_line(error)}") from None


@dataclass(frozen=True, slots=True)
class _Fault:
    path: Path
    method: str

    def refused(self, name: str, value: object, supported: str) -> UserError:
        return UserError(
            f"{self.path}: quantization_config ({self.method}) has {name}={shown(value)}, which is not supported: {supported}: {WAY_OUT}"
        )

    def refuse_if_set(self, config: Mapping[str, Any], *names: str) -> None:
        """Settings that would change what weights mean."""
        for name in names:
            if config.get(name):
                raise self.refused(name, config[name], "only weights without it can be read")


_Schemes = tuple[tuple[tuple[str, ...], Scheme], ...]


_FP8_SCALES = ("weight_scale_inv", "weight_scale")


class _FP8(msgspec.Struct):
    activation_scheme: str = "dynamic"
    fmt: str = "e4m3"
    scale_fmt: str | None = None
    weight_block_size: tuple[int, int] | None = None


def _fp8(config: dict[str, Any], fault: _Fault) -> _Schemes:
    found = msgspec.convert(config, _FP8)
    if found.activation_scheme not in ("dynamic", "static"):
        raise fault.refused("activation_scheme", found.activation_scheme, "dynamic and static are")
    if found.fmt not in ("e4m3", "float8_e4m3fn"):
        raise fault.refused("fmt", found.fmt, "e4m3 is")
    if found.scale_fmt not in (None, "float"):
        raise fault.refused("scale_fmt", found.scale_fmt, "scales of inputs are float32")
    static, block = found.activation_scheme == "static", found.weight_block_size
    if block is None:
        # One scale a token is finer than one for a whole batch, which would make a token depend on its neighbours.
        return (((), Scheme("scaled", "float", 8, (None, None), inputs=Inputs(None, static), scales=_FP8_SCALES)),)
    if min(block) < 1:
        raise fault.refused("weight_block_size", list(block), "both sizes must be at least 1")
    inputs = Inputs(None if static else block[1], static)
    return (((), Scheme("scaled", "float", 8, block, inputs=inputs, scales=_FP8_SCALES)),)


class _Numbers(msgspec.Struct):
    """How weights or inputs are rounded, in the words of compressed-tensors."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: tuple[int, int] | str | None = None
    dynamic: bool | str = False


class _Group(msgspec.Struct):
    targets: list[str]
    weights: _Numbers | None = None
    input_activations: _Numbers | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _Group]
    format: str | None = None


_FORMATS: dict[str, tuple[Literal["scaled", "packed"], tuple[tuple[str, int], ...]]] = {
    "float-quantized": ("scaled", (("float", 8),)),
    "naive-quantized": ("scaled", (("float", 8), ("int", 8))),
    "int-quantized": ("scaled", (("int", 8), ("int", 4))),
    "pack-quantized": ("packed", (("int", 8), ("int", 4))),
}
"""Layout of each format of compressed-tensors, with the kinds and bits of its weights."""


def _compressed_tensors(config: dict[str, Any], fault: _Fault) -> _Schemes:
    fault.refuse_if_set(config, "transform_config")
    sparsity = config.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        raise fault.refused("sparsity_config", sparsity, "dense weights are")
    found = msgspec.convert(config, _CompressedTensors)
    if not found.config_groups:
        raise fault.refused("config_groups", {}, "it must say how layers are stored")
    schemes = []
    for name, group in found.config_groups.items():
        for target in group.targets:
            _check_pattern(target, fault)
        schemes.append((tuple(group.targets), _scheme_of(f"config_groups.{name}", group, group.format or found.format, fault)))
    return tuple(schemes)


def _check_pattern(target: str, fault: _Fault) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except (re.error, RecursionError, OverflowError):
            raise fault.refused("targets", target, "it must be a regular expression") from None


def _scheme_of(name: str, group: _Group, format_: str | None, fault: _Fault) -> Scheme:
    if group.weights is None:
        raise fault.refused(f"{name}.weights", None, "it must say how weights are stored")
    if group.output_activations is not None:
        raise fault.refused(f"{name}.output_activations", group.output_activations, "only inputs may be rounded")
    if format_ not in _FORMATS:
        raise fault.refused("format", format_, f"{', '.join(_FORMATS)} are")
    layout, kinds = _FORMATS[format_]
    weights = group.weights
    if (weights.type, weights.num_bits) not in kinds:
        wanted = " and ".join(f"{kind} of {bits} bits" for kind, bits in kinds)
        raise fault.refused(f"{name}.weights", f"{weights.type} of {weights.num_bits} bits", f"{wanted} in {format_} are")
    if weights.dynamic:
        raise fault.refused(f"{name}.weights.dynamic", weights.dynamic, "weights have scales of their own")
    if weights.type == "float" and not weights.symmetric:
        raise fault.refused(f"{name}.weights.symmetric", False, "floats have no zeros")
    block = _block_of(f"{name}.weights", weights, fault)
    kind: Literal["float", "int"] = "float" if weights.type == "float" else "int"
    if kind == "int" and block[0] not in (None, 1):
        raise fault.refused(f"{name}.weights.strategy", weights.strategy, "tensor, channel and group are for integers")
    scheme = Scheme(layout, kind, weights.num_bits, block, weights.symmetric)
    return replace(scheme, inputs=_inputs_of(f"{name}.input_activations", group.input_activations, kind, fault))


def _strategy(numbers: _Numbers) -> str:
    """The strategy, which may be left out where the size of groups tells it."""
    if numbers.strategy is not None:
        return numbers.strategy
    return "tensor" if numbers.group_size is None else "channel" if numbers.group_size == -1 else "group"


def _block_of(name: str, numbers: _Numbers, fault: _Fault) -> tuple[int | None, int | None]:
    strategy = _strategy(numbers)
    if strategy == "tensor":
        return None, None
    if strategy == "channel" or (strategy == "group" and numbers.group_size == -1):
        return 1, None
    if strategy == "group":
        return 1, _size(f"{name}.group_size", numbers.group_size, fault)
    if strategy == "block":
        sizes = numbers.block_structure
        if isinstance(sizes, str):  # Old files write "128x128".
            sizes = tuple(int(part) for part in sizes.split("x") if part.isascii() and part.isdigit() and len(part) < 10)
        if sizes is None or len(sizes) != 2:
            raise fault.refused(f"{name}.block_structure", numbers.block_structure, "two sizes are needed")
        return _size(f"{name}.block_structure", sizes[0], fault), _size(f"{name}.block_structure", sizes[1], fault)
    raise fault.refused(f"{name}.strategy", strategy, "tensor, channel, group and block are")


def _inputs_of(name: str, numbers: _Numbers | None, kind: str, fault: _Fault) -> Inputs | None:
    if numbers is None:
        return None
    if (numbers.type, numbers.num_bits) != (kind, 8):
        raise fault.refused(name, f"{numbers.type} of {numbers.num_bits} bits", f"{kind} of 8 bits is, beside weights of that kind")
    if not numbers.symmetric:
        raise fault.refused(f"{name}.symmetric", False, "inputs are rounded about 0")
    strategy = _strategy(numbers)
    if numbers.dynamic is False:
        if strategy != "tensor":
            raise fault.refused(f"{name}.strategy", strategy, "tensor is for static scales")
        return Inputs(None, static=True)
    if numbers.dynamic is True and strategy in ("token", "tensor"):  # See `_fp8`.
        return Inputs(None, static=False)
    if numbers.dynamic is True and strategy == "group":
        return Inputs(_size(f"{name}.group_size", numbers.group_size, fault), static=False)
    raise fault.refused(name, f"dynamic={numbers.dynamic}, strategy={strategy}", "a scale a token, or a group of its inputs, is")


def _size(name: str, value: int | None, fault: _Fault) -> int:
    if value is None or value < 1:
        raise fault.refused(name, value, "a whole number of at least 1 is needed")
    return value


class _Integers(msgspec.Struct):
    """What GPTQ and AWQ have in common."""

    bits: int
    group_size: int


class _GPTQ(_Integers):
    checkpoint_format: str | None = None


def _gptq(config: dict[str, Any], fault: _Fault) -> _Schemes:
    found = msgspec.convert(config, _GPTQ)
    fault.refuse_if_set(config, "is_marlin_format", "dynamic", "adapter")
    if found.checkpoint_format not in (None, "gptq", "gptq_v2"):
        raise fault.refused("checkpoint_format", found.checkpoint_format, "gptq and gptq_v2 are")
    less_one = found.checkpoint_format != "gptq_v2"
    return (((), _integers("gptq", found, fault, zeros_less_one=less_one)),)


class _AWQ(_Integers):
    version: str = "gemm"
    zero_point: bool = True


def _awq(config: dict[str, Any], fault: _Fault) -> _Schemes:
    found = msgspec.convert(config, _AWQ)
    if found.version.lower() != "gemm":
        raise fault.refused("version", found.version, "gemm is")
    if not found.zero_point:
        raise fault.refused("zero_point", False, "zero_point=true is")
    if found.bits != 4:
        raise fault.refused("bits", found.bits, "4 is")
    return (((), _integers("awq", found, fault)),)


def _integers(layout: Literal["gptq", "awq"], found: _Integers, fault: _Fault, zeros_less_one: bool = False) -> Scheme:
    if found.bits not in BITS:
        raise fault.refused("bits", found.bits, "4 and 8 are")
    group = None if found.group_size == -1 else _size("group_size", found.group_size, fault)
    return Scheme(layout, "int", found.bits, (1, group), symmetric=False, scales=("scales",), zeros_less_one=zeros_less_one)


class _BitsAndBytes(msgspec.Struct):
    load_in_8bit: bool = False


def _bitsandbytes(config: dict[str, Any], fault: _Fault) -> _Schemes:
    fault.refuse_if_set(config, "load_in_4bit")
    if not msgspec.convert(config, _BitsAndBytes).load_in_8bit:
        raise fault.refused("load_in_8bit", False, "load_in_8bit=true is")
    return (((), Scheme("scaled", "int", 8, (1, None), scales=("SCB",), multiplied=127)),)


_METHODS = {"bitsandbytes": _bitsandbytes, "fp8": _fp8, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
