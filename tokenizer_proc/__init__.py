"""The tokenizer: text to ids and ids to text.

`vocabulary.py` encodes and decodes, with `gguf.py` and `huggingface.py` as the two ways to load it; `detokenize.py` turns a stream
of ids into a stream of text and `stops.py` looks for stop strings in it; `chat.py` renders conversations; `tokenizer.py` is the
process.
"""
