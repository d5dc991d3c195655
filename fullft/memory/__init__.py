"""Where every byte goes: measured while training, planned before it, and told."""
