"""The search: its space, its initial plans, the samplers, the ledger of trials, and the choice of finalists."""
