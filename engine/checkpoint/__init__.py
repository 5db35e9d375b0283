"""Models on disk, before any process has loaded them.

Finding them, reading their headers, and refusing in one line what cannot be served. No torch, no tensor arithmetic.
"""
