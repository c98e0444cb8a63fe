"""Verifiers: rewards that say whether a text is right."""
