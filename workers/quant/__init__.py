"""Stored quantization formats, each read exactly into the canonical weights of `headrace.kernels.weights`."""
