"""OpenAI's HTTP interface as types: what the endpoint reads and writes, and what the client library writes and reads.

Plain JSON objects (https://platform.openai.com/docs/api-reference), with the extensions that vLLM established for parameters OpenAI lacks.
`requests.py` and `responses.py`; nothing here knows of sockets.
"""
