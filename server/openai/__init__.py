"""OpenAI's routes: what a body means (`validate`), how an answer is put together (`choices`, `stream`), and the routes themselves."""
