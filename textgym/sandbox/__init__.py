"""Running what cannot be trusted: verifiers over hostile strings, and programs by a model."""
