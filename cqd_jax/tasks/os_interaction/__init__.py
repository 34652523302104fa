"""Tasks in an operating system, as AgentBench publishes them: a shell that acts and answers, graded by what came of it.

Liu et al. 2023, arXiv:2308.03688. What runs the shells is `cqd_jax.sandbox.os_interaction`.
"""
