"""What is measured on held-out problems, and how sure one can be of it."""
