"""What can be known about a model without loading it: its files, its shape, its tokenizer."""
