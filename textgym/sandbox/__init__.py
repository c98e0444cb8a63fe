"""Running what cannot be trusted: verifiers over hostile strings, and programs by a model.

Each of the two has a side of the caller, and what is inside the processes that it starts:

| | caller | inside |
|---|---|---|
| strings | `pool`, `dispatch`, `workers` | `worker` |
| programs | `runner`, `process`, `selftest` | `zygote`, and what it forks: `job`, or `probe` |

`frames` is how bytes cross between processes, `plain` and `outcome` what crosses of a program.
`harden` puts the layers of the sandbox on, with `landlock`, `seccomp` and `syscalls`; `levels` says
what they are worth.
"""
