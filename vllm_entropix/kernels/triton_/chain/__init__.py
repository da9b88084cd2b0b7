"""A chain's filters and temperatures on a GPU: what ``samplers.chain.outcome`` does, in one launch and without a sort.

A row is one program's. What the first stage asks of it is found in one pass, and what that stage may keep, if it is few, is
gathered beside the row in another, by ascending id; the other stages work on that. Where more is kept they pass over the row,
which is in the second-level cache by then, until a stage has left few.

``launch`` has the kernel; ``rows``, ``stages`` and ``coin`` have what it does; ``codes`` numbers stages and settings.
"""
