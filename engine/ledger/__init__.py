"""The KV ledger: which page holds which tokens, kept alike by every process that must know.

Pure Python, no clock, no randomness: the same plans and results in the same order give the same page tables everywhere. Read
`pages.py`, then `radix.py`, then `ledger.py`.
"""
