"""Quantized Hugging Face checkpoints: every format gives the values of its definition, whole and in parts, or says what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.kernels.weights import Dense, GroupedInt, InputRounding, ScaledFloat
from headrace.workers.loader import Checkpoint, open_checkpoint
from tests.workers.loader.quantized import FLOAT, FORMATS, INT4, compressed, write_layers

EMBEDDING = {"model.embed_tokens": {"weight": torch.ones(8, 64)}}
Q = "model.layers.0.self_attn.q_proj"


def opened(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], **others: Any) -> Checkpoint:
    return open_checkpoint(resolve(Config(model=str(write_layers(path, config, {Q: tensors, **EMBEDDING, **others})))))


def fault(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(96, 128), (8, 32), (200, 320)])
def test_a_layer_has_the_values_of_its_format(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    form = FORMATS[name]
    tensors, values = form.store(np.random.default_rng(3), *shape)
    checkpoint = opened(tmp_path / "m", form.config, {**tensors, "bias": torch.ones(shape[0])})
    assert checkpoint.shape(f"{Q}.weight") == shape
    assert f"{Q}.weight" in checkpoint
    assert set(checkpoint.names()) == {"model.embed_tokens.weight", f"{Q}.weight", f"{Q}.bias"}
    weight = checkpoint.weight(f"{Q}.weight")
    assert weight.shape == shape
    assert np.array_equal(weight.dequantize(), values)
    assert values.std() > 0.001
    assert isinstance(checkpoint.weight("model.embed_tokens.weight"), Dense)
    assert np.array_equal(checkpoint.vector(f"{Q}.bias"), np.ones(shape[0], np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_ranks_part_equals_the_part_of_the_whole(tmp_path: Path, name: str) -> None:
    form = FORMATS[name]
    checkpoint = opened(tmp_path / "m", form.config, form.store(np.random.default_rng(4), 200, 320)[0])
    whole = checkpoint.weight(f"{Q}.weight").dequantize()
    for rows in (None, slice(0, 100), slice(100, None), slice(3, 150), slice(128, 200)):
        for columns in (None, slice(0, 128), slice(256, 320), slice(128, None)):
            part = checkpoint.weight(f"{Q}.weight", rows, columns)
            assert np.array_equal(part.dequantize(), whole[rows or slice(None), columns or slice(None)])
            assert np.array_equal(part.take(np.array([5, 2])).dequantize(), part.dequantize()[[5, 2]])


def test_a_cut_through_groups_is_refused_and_one_through_a_channel_is_not(tmp_path: Path) -> None:
    for name, size in (("gptq-asym", 32), ("awq", 32), ("packed-w4", 32), ("int-w4a8", 32), ("fp8-blocks", 128)):
        form = FORMATS[name]
        checkpoint = opened(tmp_path / name, form.config, form.store(np.random.default_rng(4), 64, 256)[0])
        for columns in (slice(0, size - 8), slice(8, None)):
            assert f"must fall on multiples of {size}" in fault(lambda c=checkpoint, k=columns: c.weight(f"{Q}.weight", columns=k))
        assert "rows 64:64 of 64 are none" in fault(lambda c=checkpoint: c.weight(f"{Q}.weight", rows=slice(64, None)))
    for name in ("packed-w8-zeros", "float-channel", "awq-whole", "gptq-8", "int-w8a8"):
        form = FORMATS[name]
        checkpoint = opened(tmp_path / name, form.config, form.store(np.random.default_rng(4), 64, 256)[0])
        whole = checkpoint.weight(f"{Q}.weight").dequantize()
        assert np.array_equal(checkpoint.weight(f"{Q}.weight", columns=slice(7, 93)).dequantize(), whole[:, 7:93])


WORDS = {
    "packed-w4-zeros": (
        {
            "weight_packed": [
                [-126549337], [-974106075], [-1370059368], [-188926957], [671927667], [1122473813], [-149027400], [-1373643901],
            ],
            "weight_zero_point": [[-2084847083]],
            "weight_shape": [8, 8],
        },
        [
            [2, 5, -3, -5, 0, 2, 3, 10], [4, 1, 1, 4, -1, 14, 4, 11], [6, 7, 11, 6, 4, 3, 12, 8], [-9, -11, -8, -9, 1, -1, -8, 3],
            [-8, -4, 2, 1, 1, -11, -3, -9], [-6, -6, -4, -2, -4, 3, -9, -7], [5, 8, 2, -3, 11, -2, 4, 12], [-5, 0, 3, 5, 7, -7, 6, 2],
        ],
    ),
    "gptq-asym": (
        {
            "qweight": [[897136483, 939894536, 935307700, -1386529162, 665290730, -1468249254, 1884990375, -2036775430]],
            "qzeros": [[2036823896]],
        },
        [
            [-6, -3, -2, -6, 0, -2, -4, -6], [2, -6, 1, 4, -1, -6, 2, -3], [-4, 3, 1, 2, 7, 3, -1, -5], [-2, -1, 6, -5, 3, -3, 5, 2],
            [2, 6, -1, 0, -1, 2, -1, -6], [3, -2, 4, -3, 5, 0, 1, 3], [-3, 0, 1, 0, 0, -5, -10, -3], [2, 7, -3, -4, 1, 1, -2, 0],
        ],
    ),
    "awq": (
        {"qweight": [[-967021140], [359254283]], "qzeros": [[1864364971]]},
        [[1, 0], [-3, -6], [0, -10], [4, 5], [10, 6], [-9, -10], [-9, -3], [6, -5]],
    ),
}  # fmt: skip
"""Words as compressed-tensors 0.20, AutoGPTQ 0.7 and AutoAWQ 0.2 pack them, and the values that these packages take them for, with scales
of 1 and one group."""


@pytest.mark.parametrize("name", WORDS)
def test_words_mean_what_those_who_made_the_format_take_them_for(tmp_path: Path, name: str) -> None:
    words, values = WORDS[name]
    config = FORMATS[name].config
    if name == "packed-w4-zeros":
        config = compressed("pack-quantized", {**INT4, "symmetric": False, "group_size": 8})
    tensors = {part: torch.tensor(value, dtype=torch.int32) for part, value in words.items()}
    scale = ("weight_scale", (8, 1)) if "weight_packed" in words else ("scales", (1, 8))
    config = {**config, "group_size": -1}
    weight = opened(tmp_path / "m", config, {**tensors, scale[0]: torch.ones(scale[1])}).weight(f"{Q}.weight")
    assert weight.dequantize().tolist() == values


def test_each_format_has_the_canonical_form_that_kernels_know(tmp_path: Path) -> None:
    def weight(name: str):
        form = FORMATS[name]
        return opened(tmp_path / name, form.config, form.store(np.random.default_rng(1), 256, 256)[0]).weight(f"{Q}.weight")

    blocks, static, channel = weight("fp8-blocks"), weight("fp8-static"), weight("float-channel")
    assert isinstance(blocks, ScaledFloat) and isinstance(static, ScaledFloat) and isinstance(channel, ScaledFloat)
    assert (blocks.block, static.block, channel.block) == ((128, 128), (256, 256), (1, 256))
    assert (blocks.inputs, static.inputs) == (InputRounding("e4m3", 128), InputRounding("e4m3", scale=0.0625))
    assert (channel.inputs, weight("naive-weights").inputs) == (InputRounding("e4m3"), None)
    w8a8, sym, asym = weight("int-w8a8"), weight("gptq-sym"), weight("gptq-asym")
    assert isinstance(w8a8, GroupedInt) and isinstance(sym, GroupedInt) and isinstance(asym, GroupedInt)
    assert (w8a8.group, w8a8.bits, w8a8.zeros, w8a8.inputs) == (256, 8, None, InputRounding("int8"))
    assert (sym.group, sym.bits, sym.zeros, sym.inputs) == (32, 4, None, None)
    assert (sym.codes.min(), sym.codes.max()) == (-8, 7)
    for each in (asym, weight("awq"), weight("packed-w4-zeros")):
        assert isinstance(each, GroupedInt)
        assert each.zeros is not None
        assert (each.bits, each.codes.min(), each.codes.max(), each.zeros.min(), each.zeros.max()) == (4, 0, 15, 0, 15)
    assert weight("int-static").inputs == InputRounding("int8", scale=0.0625)


def test_codes_that_need_no_unpacking_stay_in_the_mapped_file(tmp_path: Path) -> None:
    for name in ("fp8-blocks", "int-w8a8"):
        form = FORMATS[name]
        checkpoint = opened(tmp_path / name, form.config, form.store(np.random.default_rng(1), 128, 128)[0])
        first, second = checkpoint.weight(f"{Q}.weight"), checkpoint.weight(f"{Q}.weight", slice(1, None))
        assert not isinstance(first, Dense) and not isinstance(second, Dense)
        assert second.codes.ctypes.data == first.codes[1:].ctypes.data


def test_layers_may_be_stored_in_different_ways(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    integers, floats, head = (FORMATS[name].store(rng, 64, 64) for name in ("packed-w4", "float-channel", "packed-w4"))
    config = compressed("mixed-precision", INT4)
    groups = config["config_groups"]
    groups["group_0"] |= {"format": "pack-quantized"}
    groups["group_1"] = {"targets": ["re:.*k_proj$"], "weights": {**FLOAT, "strategy": "channel"}, "format": "float-quantized"}
    k = Q.replace("q_proj", "k_proj")
    checkpoint = opened(tmp_path / "m", config, integers[0], **{k: floats[0], "lm_head": head[0]})
    for layer, values in ((Q, integers[1]), (k, floats[1]), ("lm_head", head[1])):
        assert np.array_equal(checkpoint.weight(f"{layer}.weight").dequantize(), values)
    groups["group_0"]["targets"] = ["re:.*v_proj"]
    assert f"tensor '{Q}.weight_packed' of I32 is not what" in fault(lambda: opened(tmp_path / "n", config, integers[0]))


def replaced(tensors: dict[str, torch.Tensor], part: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    rest = {name: tensor for name, tensor in tensors.items() if name != part}
    return rest if value is None else {**rest, part: value}


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("fp8-blocks", "weight_scale_inv", None, "has no tensor 'model.layers.0.self_attn.q_proj.weight_scale_inv'"),
        ("fp8-blocks", "weight_scale_inv", torch.ones(2, 2), "has the shape [2, 2] where [1, 1] is expected"),
        ("fp8-blocks", "weight_scale_inv", torch.ones(1, 1, dtype=torch.float64), "has the type F64 where F32 or F16 or BF16"),
        ("fp8-static", "input_scale", None, "q_proj.input_scale'"),
        ("fp8-static", "input_scale", torch.tensor(0.0), "holds 0.0: a scale is a number above 0"),
        ("fp8-static", "input_scale", torch.tensor(torch.nan), "holds nan"),
        ("int-zeros", "weight_zero_point", torch.ones(64, 1), "has the type F32 where I8 is expected"),
        ("int-w8a8", "weight_scale", torch.ones(32, 1), "[32, 1] where [64, 1] is expected"),
        ("packed-w4", "weight_shape", torch.tensor([64, 65]), "says [64, 65], which [64, 8] words of 4-bit integers do not hold"),
        ("packed-w4", "weight_shape", torch.tensor([1 << 40, -64]), "says [1099511627776, -64]"),
        ("packed-w4", "weight_shape", None, "q_proj.weight_shape'"),
        ("packed-w4", "weight_packed", torch.ones(64, 8), "has the type F32 where I32 is expected"),
        ("packed-w4", "weight_g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 32, "actorder=group"),
        ("packed-w4-zeros", "weight_zero_point", torch.ones(7, 2, dtype=torch.int32), "[7, 2] where [8, 2] is expected"),
        ("gptq-sym", "g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 32, "desc_act=true"),
        ("gptq-sym", "qzeros", None, "q_proj.qzeros'"),
        ("gptq-sym", "qzeros", torch.ones(2, 7, dtype=torch.int32), "[2, 7] where [2, 8] is expected"),
        ("gptq-sym", "scales", torch.ones(3, 64, dtype=torch.float16), "[3, 64] where [2, 64] is expected"),
        ("gptq-sym", "qweight", torch.ones(3, 64, dtype=torch.int32), "24 inputs, which are no whole groups of 32"),
        ("gptq-sym", "qweight", torch.ones(64, dtype=torch.int32), "has the shape [64] where a matrix is expected"),
        ("gptq-sym", "qweight", torch.ones(0, 64, dtype=torch.int32), "has the shape [0, 64] where a matrix is expected"),
        ("bitsandbytes", "weight_format", torch.tensor(3, dtype=torch.uint8), "is 3, an order of codes made for one kind of GPU"),
        ("bitsandbytes", "SCB", None, "q_proj.SCB'"),
        ("awq", "qzeros", torch.ones(1, 8, dtype=torch.int32), "[1, 8] where [2, 8] is expected"),
        ("awq", "qweight", torch.ones(64, 8, dtype=torch.int64), "has the type I64 where I32 is expected"),
    ],
)
def test_damaged_layers_are_named(tmp_path: Path, name: str, part: str, value: torch.Tensor | None, message: str) -> None:
    form = FORMATS[name]
    tensors = replaced(form.store(np.random.default_rng(1), 64, 64)[0], part, value)

    def use() -> None:
        checkpoint = opened(tmp_path / "m", form.config, tensors)
        checkpoint.shape(f"{Q}.weight")
        checkpoint.weight(f"{Q}.weight")

    assert message in fault(use)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_is_worse_than_a_message(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """A tensor goes missing, or has another type or shape: a matrix of the right shape comes, or a message of one line."""
    form = FORMATS[name]
    tensors, _ = form.store(np.random.default_rng(1), 64, 64)
    part = data.draw(st.sampled_from(sorted(tensors)))
    value = data.draw(
        st.none()
        | st.builds(
            lambda shape, dtype: torch.ones(shape, dtype=dtype),
            st.lists(st.sampled_from([0, 1, 2, 7, 8, 64]), max_size=3),
            st.sampled_from([torch.int32, torch.int8, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
        )
    )
    try:
        weight = opened(tmp_path / "m", form.config, replaced(tensors, part, value)).weight(f"{Q}.weight")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert weight.dequantize().shape == weight.shape


def test_codes_without_a_word_on_what_they_mean_are_refused(tmp_path: Path) -> None:
    for name, message in (("gptq-sym", "quantized tensor 'model.layers.0.self_attn.q_proj.qweight'"), ("fp8-blocks", "type F8_E4M3")):
        tensors = FORMATS[name].store(np.random.default_rng(1), 64, 64)[0]
        directory = write_layers(tmp_path / name, None, {Q: tensors, **EMBEDDING})  # type: ignore[arg-type]
        assert message in fault(lambda path=directory: resolve(Config(model=str(path))))


def test_what_was_made_of_weights_is_made_anew_when_their_meaning_changes(tmp_path: Path) -> None:
    form = FORMATS["gptq-sym"]
    checkpoint = opened(tmp_path / "m", form.config, form.store(np.random.default_rng(1), 64, 64)[0])
    assert checkpoint.files == {tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"}
