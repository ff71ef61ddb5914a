"""``rlpost bench learning``: does APRIL learn as well as synchronous rollouts, and does the correction matter?

A study of many runs over several days: ``cells`` defines in advance which runs there are, ``study`` makes the missing
ones, each in a fresh process (``run``), and appends them to a table under version control (``table``); ``analysis``
compares them in pairs, ``figures`` and ``page`` present it. Called by ``cli``; no training code imports it.
"""
