#!/usr/bin/env python3
"""Make the float32 Hugging Face copy of a GGUF file, for peers that read no GGUF.

    scripts/bench/dequantize.py MODEL.gguf DIRECTORY

Every weight is what the file's blocks say, widened to float32, so a peer that serves the copy serves the same model. `transformers` does
the reading; its mark that the weights were once quantized is taken off, since it would refuse to save them.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def load(file: Path) -> PreTrainedModel:
    """The model of a GGUF file in float32, ready to run."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the float32 Hugging Face copy of a GGUF file.")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model)
    plain = type(model)(model.config)
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(arguments.directory)
    AutoTokenizer.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name).save_pretrained(arguments.directory)
    print(f"saved {arguments.directory}")


if __name__ == "__main__":
    main()
