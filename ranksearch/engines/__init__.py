"""Where jobs run. Every engine is one function `run(jobs, evaluate, *, ...)` of the same signature."""
