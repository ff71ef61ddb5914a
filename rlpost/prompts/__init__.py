"""From data rows to encoded prompts, and the order in which they are drawn."""
