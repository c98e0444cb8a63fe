"""Running what cannot be trusted: verifiers over hostile strings, and programs that a model wrote."""
