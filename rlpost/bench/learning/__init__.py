"""``rlpost bench learning``: does APRIL learn as well as synchronous rollouts, and does the correction matter?

A study of many runs that goes on over days: ``cells`` says beforehand which runs there are, ``study`` makes those that
are missing, each in a fresh process (``run``), and appends them to a table that is committed (``table``); ``analysis``
compares them in pairs, ``figures`` and ``page`` show it. Called by ``cli``; nothing of a training run imports it.
"""
