"""quantization_config: what is known is read, all else is refused in one line that names it, whatever stands there."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.quantization import Quantization, read_quantization
from headrace.engine.errors import UserError
from tests.workers.loader.quantized import AWQ, DEEPSEEK, FLOAT, FORMATS, GPTQ, INT4, INT8, TOKEN, compressed


def read(config: Any) -> Quantization | None:
    return read_quantization(Path("config.json"), {"quantization_config": config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "method 'hqq': supported are fp8, compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "load_in_4bit=True"),
        ({"quant_method": "bitsandbytes"}, "load_in_8bit=False, which is not supported: load_in_8bit=true is"),
        ({"quant_method": ["gptq"]}, "method ['gptq']"),
        ("gptq", "method 'gptq'"),
        ({}, "method None"),
        ({**GPTQ, "bits": 3}, "(gptq) has bits=3, which is not supported: 4 and 8 are"),
        ({**GPTQ, "bits": "4"}, "quantization_config is damaged: Expected `int`, got `str` - at `$.bits`"),
        ({**GPTQ, "group_size": 0}, "group_size=0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, "dynamic={'-:.*': {}}"),
        ({"quant_method": "gptq"}, "missing required field `bits`"),
        ({**AWQ, "version": "gemv"}, "version='gemv', which is not supported: gemm is"),
        ({**AWQ, "zero_point": False}, "zero_point=False"),
        ({**AWQ, "bits": 8}, "bits=8"),
        ({**DEEPSEEK, "scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        ({**DEEPSEEK, "fmt": "e5m2"}, "fmt='e5m2'"),
        ({**DEEPSEEK, "activation_scheme": "none"}, "activation_scheme='none'"),
        ({**DEEPSEEK, "weight_block_size": [0, 128]}, "weight_block_size=[0, 128]"),
        (
            compressed("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4}),
            "format='nvfp4-pack-quantized', which is not supported: float-quantized",
        ),
        (compressed("marlin-24", INT4), "format='marlin-24'"),
        (compressed("pack-quantized", {**INT4, "num_bits": 3}), "'int of 3 bits', which is not supported: int of 8 bits and int of 4 bits"),
        (compressed("float-quantized", {**FLOAT, "strategy": "tensor_group"}), "strategy='tensor_group'"),
        (compressed("int-quantized", {**INT8, "strategy": "block", "block_structure": [4, 4]}), "strategy='block'"),
        (compressed("float-quantized", {**FLOAT, "strategy": "group"}), "group_size=None"),
        (compressed("float-quantized", FLOAT, {**INT8, "dynamic": True}), "'int of 8 bits', which is not supported: float of 8 bits"),
        (compressed("int-quantized", INT8, {**INT8, "dynamic": True, "symmetric": False}), "input_activations.symmetric=False"),
        (compressed("int-quantized", INT8, {**INT8, "dynamic": "local"}), "dynamic=local"),
        ({**compressed("int-quantized", INT8), "transform_config": {"config_groups": {"u": {}}}}, "transform_config="),
        ({**compressed("int-quantized", INT8), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
        ({**compressed("int-quantized", INT8), "config_groups": {}}, "config_groups={}"),
        ({**compressed("int-quantized", INT8), "config_groups": {"g": {"targets": ["re:("], "weights": INT8}}}, "targets='re:('"),
        ({**compressed("int-quantized", INT8), "config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g.weights=None"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_without_it_is_of_plain_weights() -> None:
    assert read_quantization(Path("config.json"), {"architectures": []}) is None
    assert read(None) is None


def test_words_that_mean_the_same_are_read_alike() -> None:
    channel = compressed("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKEN})
    whole = compressed("int-quantized", {**INT8, "group_size": -1}, {**INT8, "dynamic": True})
    old = read_quantization(Path("config.json"), {"compression_config": channel})
    assert read(channel) == read(whole) == old
    blocks = {**FLOAT, "strategy": "block"}
    listed, written = (compressed("float-quantized", {**blocks, "block_structure": size}) for size in ([128, 64], "128x64"))
    assert read(listed) == read(written)
    assert read({**DEEPSEEK, "weight_block_size": None}) == read(DEEPSEEK)


def test_a_layer_has_the_scheme_that_names_it_before_that_for_its_class() -> None:
    config = compressed("int-quantized", {**INT8, "strategy": "channel"})
    config["config_groups"]["b"] = {"targets": ["re:.*layers.1.*", "model.exact"], "weights": {**INT8, "strategy": "tensor"}}
    config["config_groups"]["c"] = {"targets": ["Embedding"], "weights": {**INT8, "strategy": "group", "group_size": 32}}
    found = read(config)
    assert found is not None
    for layer, block in (
        ("model.layers.0.q", (1, None)),
        ("model.layers.1.q", (None, None)),
        ("model.exact", (None, None)),
        ("model.exactly", (1, None)),
        ("model.embed_tokens", (1, 32)),
    ):
        scheme = found.scheme(layer)
        assert scheme is not None
        assert scheme.block == block


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.just("re:(a"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300)
def test_nothing_that_may_stand_there_is_worse_than_a_message(data: st.DataObject) -> None:
    """One place of a config that can be read, however deep, holds something else."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
            key = data.draw(st.sampled_from(sorted(value)))
            return {**value, key: changed(value[key])}
        return data.draw(JSON)

    config = changed(FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))].config)
    try:
        found = read(config)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
    else:
        assert found is None or found.schemes
