"""Models on disk before any process has loaded them: finding them, reading their headers, and refusing in one line what cannot be served."""
