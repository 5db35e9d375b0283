"""The scheduler: the order of work, admission, and the journal that makes every request repeatable.

`plan.py` decides what a step computes, as a pure function; `journal.py` holds what is needed to run a request again; `scheduler.py` is the
process that moves them.
"""
