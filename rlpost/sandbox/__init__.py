"""Running a policy's programs, which are treated as hostile. What is guaranteed and what is not: docs/sandbox.md.

This folder has two sides. On the host: ``box`` (:class:`~rlpost.sandbox.box.Sandbox`, called by rewards),
``interpreter`` and ``bubblewrap`` (what the sandbox is made of), ``turns`` (which programs run together). Inside, where
only the standard library exists: ``guardian`` forks a child per program, ``confine`` drops its privileges,
``candidate``, ``tester`` and ``script`` are what children run; ``linux``, ``seccomp`` and ``wire`` support them. Both
sides read ``limits``. The inner modules import nothing from rlpost outside this folder, because nothing else is bound
into the sandbox.
"""
