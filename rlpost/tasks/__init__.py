"""Tasks that ship with rlpost: generators of problems and of lessons. No heavy imports."""
