"""Tasks that ship with rlpost: generators of problems and of lessons (supervised examples). No heavy imports."""
