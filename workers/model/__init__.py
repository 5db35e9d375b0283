"""One decoder, described by data (`config.py`), run by `decoder.py`; one short file a model family maps its files to that data."""
