"""What the `textgym` command runs: one command a module, `run(arguments) -> exit status`."""
