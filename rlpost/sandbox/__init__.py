"""Running a policy's programs as what they are: hostile input. What holds and what does not: docs/sandbox.md.

Two sides share this folder. On the host: ``box`` (:class:`~rlpost.sandbox.box.Sandbox`, what rewards call),
``interpreter`` and ``bubblewrap`` (what the sandbox is made of), ``turns`` (who runs beside whom). Inside, where only
the standard library exists: ``guardian`` forks a child per program, ``confine`` takes its rights away, ``candidate``,
``tester`` and ``script`` are what children run; ``linux``, ``seccomp`` and ``wire`` serve them. Both sides read
``limits``. The inner modules import nothing of rlpost outside this folder, because nothing else is bound into the
sandbox.
"""
