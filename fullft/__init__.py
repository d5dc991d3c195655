"""fullft: full fine-tuning of language models, explained and done in one readable loop."""

__version__ = "0.1.0"
