"""What is measured on held-out problems, and with what uncertainty."""
